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
from compress.quantize.transforms import AwqClip, AwqScale, Opt
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


TEXTS = ("sotu-since-2009", "boolq-passages")
# Transforms, then rounded to nearest.
METHODS: dict[str, list[Any]] = {
    "rtn": [],
    "awq": [AwqScale(), AwqClip()],
    "opt": [Opt()],
}


class Measured:
    """KL of exported files on both texts (2 windows of 512) after 8 x 256 calibration tokens, by method
    and bits, each measured once."""

    def __init__(self, demo: ModelFolder, path: Path):
        self.demo, self.path = demo, path
        tokenizer = open_tokenizer(demo)
        mix = load_mix("sotu-1960-2004", "text", "train")
        self.tokens = calibration_blocks(mix, tokenizer, sequences=8, length=256, seed=0).tokens
        self.windows = {
            text: evaluation_windows(
                load_texts(text, "text", "train"), tokenizer, tokens=1024, window=512
            ).tokens
            for text in TEXTS
        }
        self.base = load_dense(demo, CPU, torch.float32)
        self._found: dict[tuple[str, int], dict[str, float]] = {}

    def kl(self, method: str, bits: int) -> dict[str, float]:
        if (method, bits) not in self._found:
            self._found[method, bits] = self._of(self.record(method, bits))
        return self._found[method, bits]

    def record(self, method: str, bits: int) -> ModelFolder:
        target = self.path / f"{method}{bits}"
        if not target.exists():
            quantize(
                self.demo,
                target,
                tokens=self.tokens if METHODS[method] else None,
                schemes=Schemes(Scheme(bits)),
                transforms=METHODS[method],
                roundings=[Nearest()],
                device=CPU,
            )
        return ModelFolder(target)

    def _of(self, record: ModelFolder) -> dict[str, float]:
        out = record.path.with_name(f"{record.path.name}-out")
        compressed_tensors.write(record, out)
        model = load_dense(ModelFolder(out), CPU, torch.float32)
        return {
            text: evaluate_text(lambda t: model(t).logits, rows, lambda t: self.base(t).logits)[
                "candidate"
            ]["kl"]
            for text, rows in self.windows.items()
        }


@pytest.fixture(scope="module")
def measured(demo: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return Measured(demo, tmp_path_factory.mktemp("demo"))


@pytest.mark.parametrize(
    ("better", "worse", "bits", "share"),
    [
        ("awq", "rtn", 4, 0.6),
        ("awq", "rtn", 3, 0.7),
        ("opt", "rtn", 3, 0.7),
    ],
)
def test_a_method_costs_less_than_the_one_it_builds_on(
    measured: Measured, better: str, worse: str, bits: int, share: float
) -> None:
    ours, theirs = measured.kl(better, bits), measured.kl(worse, bits)
    for text in TEXTS:
        assert ours[text] < share * theirs[text], (text, ours, theirs)
