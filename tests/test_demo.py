"""Quality on the demo model itself, with fewer tokens than the table uses: a broken search, fold or
rounding cannot hide here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.texts import load_mix, load_texts
from calibration.tokens import calibration_blocks, evaluation_windows
from compress.compose import compose_settings
from compress.export import compressed_tensors
from compress.model.folder import ModelFolder
from compress.model.sources import open_tokenizer, resolve_model
from compress.quantize.rounding import Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize
from compress.quantize.transforms import AwqClip, AwqScale
from compress.runtime.load import load_dense
from eval.text import evaluate_text

pytestmark = pytest.mark.demo
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def demo() -> ModelFolder:
    source = compose_settings(["model=smollm2"]).model.source
    return ModelFolder(resolve_model(source, None))


def test_the_demo_model_is_whole(demo: ModelFolder) -> None:
    assert demo.config["model_type"] == "llama"
    assert "quantization_config" not in demo.config
    assert demo.dtype == torch.bfloat16
    model = load_dense(demo, CPU, torch.bfloat16)
    tokenizer = open_tokenizer(demo)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


@pytest.mark.parametrize(("bits", "share"), [(4, 0.6), (3, 0.7)])
def test_awq_costs_less_than_rounding(
    demo: ModelFolder, tmp_path: Path, bits: int, share: float
) -> None:
    """KL of the exported files on both texts, 8 x 256 calibration tokens, 2 windows of 512."""
    tokenizer = open_tokenizer(demo)
    mix = load_mix("sotu-1960-2004", "text", "train")
    blocks = calibration_blocks(mix, tokenizer, sequences=8, length=256, seed=0)
    windows = {
        text: evaluation_windows(
            load_texts(text, "text", "train"), tokenizer, tokens=1024, window=512
        ).tokens
        for text in ("sotu-since-2009", "boolq-passages")
    }
    base = load_dense(demo, CPU, torch.float32)
    kl: dict[str, dict[str, float]] = {}
    methods: dict[str, list[Any]] = {"rtn": [], "awq": [AwqScale(), AwqClip()]}
    for name, transforms in methods.items():
        quantize(
            demo,
            tmp_path / name,
            tokens=blocks.tokens if transforms else None,
            schemes=Schemes(Scheme(bits)),
            transforms=transforms,
            roundings=[Nearest()],
            device=CPU,
        )
        compressed_tensors.write(ModelFolder(tmp_path / name), tmp_path / f"{name}-out")
        model = load_dense(ModelFolder(tmp_path / f"{name}-out"), CPU, torch.float32)
        kl[name] = {
            text: evaluate_text(
                lambda t, model=model: model(t).logits, rows, lambda t: base(t).logits
            )["candidate"]["kl"]
            for text, rows in windows.items()
        }
    for text in windows:
        assert kl["awq"][text] < share * kl["rtn"][text], kl
