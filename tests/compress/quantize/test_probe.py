"""What an unknown architecture is made of, found by running it, and runs on it without a line of code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from compress.commands.families import main
from compress.errors import UserError
from compress.export.formats import FORMATS
from compress.model.added import families_dir, read_family
from compress.model.families import FAMILIES, family_of
from compress.model.folder import ModelFolder
from compress.quantize.probe import probe
from compress.quantize.rounding import Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize
from compress.quantize.transforms import AwqScale
from compress.runtime.load import load_dense
from eval.engines.family_models import KINDS, LLAMA, ROUTED
from eval.faults.tiny import byte_tokenizer

CPU = torch.device("cpu")
# Types that no family here has: LayerNorms and partial rotation; norms that add one; attention and MLP beside
# each other behind one norm; experts.
UNKNOWN: dict[str, dict[str, Any]] = {
    "stablelm": LLAMA,
    "gemma": {**LLAMA, "head_dim": 16},
    "phi": LLAMA,
    "olmoe": {**LLAMA, **ROUTED},
}


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))


def folder_of(kind: str, settings: dict[str, Any], path: Path) -> tuple[Any, ModelFolder]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
        elif parameter.dim() > 1:
            parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return model, ModelFolder(path)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_family_that_was_probed_runs(
    kind: str, tokens: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kind not in {name for family in FAMILIES for name in family.model_types}
    model, folder = folder_of(kind, UNKNOWN[kind], tmp_path / "model")
    with pytest.raises(UserError, match=f"'{kind}' is not known here"):
        family_of(folder.config)
    assert main(["--probe", str(folder.path), "--add"]) == 0
    assert f"filed as {families_dir() / kind}.json" in capsys.readouterr().out
    assert family_of(folder.config).inputs
    quantize(
        folder, tmp_path / "record", tokens=tokens, schemes=Schemes(Scheme(8, 32)),
        transforms=[AwqScale(4)], roundings=[Nearest()], device=CPU,
    )  # fmt: skip
    FORMATS["compressed-tensors"].write(ModelFolder(tmp_path / "record"), tmp_path / "out")
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits.log_softmax(-1)
        ours = load_dense(ModelFolder(tmp_path / "out"), CPU, torch.float32)
        found = ours(tokens, use_cache=False).logits.log_softmax(-1)
    assert (expected.exp() * (expected - found)).sum(-1).mean() < (
        0.05 if kind == "olmoe" else 1e-3
    )


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "falcon-7b", "deepseek_v3", "jamba", "mamba2"])
def test_known_families_are_found_again(kind: str, tmp_path: Path) -> None:
    model_type, settings = KINDS[kind]
    AutoConfig.for_model(model_type, **settings).save_pretrained(tmp_path)
    folder = ModelFolder(tmp_path)
    known, found = family_of(folder.config), probe(folder)
    for field in ("blocks", "embedding", "final_norm", "norm_shift", "transposed", "tuples"):
        assert getattr(found, field) == getattr(known, field), field
    sources = {linear: shared.source for shared in known.inputs for linear in shared.linears}
    for shared in found.inputs:
        for linear in shared.linears:
            # Grouped heads share values: there nothing takes a scale.
            assert shared.source == sources[linear] or linear.endswith("o_proj"), linear


def test_a_file_that_holds_no_family(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    cases = {
        '{"name": "x"}': "model_types is missing",
        '{"name": "x", "model_types": ["x"], "colour": "red"}': "colour is not known",
        '{"name": "x", "model_types": "x"}': "model_types='x' is not of its kind",
        '{"name": "x", "model_types": ["x"], "inputs": [{"linears": ["a"]}]}': "source is missing",
    }
    for text, sentence in cases.items():
        file.write_text(text)
        with pytest.raises(UserError, match=sentence):
            read_family(file)
