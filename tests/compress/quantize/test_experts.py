"""Experts that no token reaches: named, rounded all the same, and shown all tokens if that is asked."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.export.audit import audit
from compress.export.formats import FORMATS
from compress.model.folder import SINGLE, ModelFolder, save_tensors, write_json
from compress.quantize.inputs import InputScheme
from compress.quantize.record import read_linear
from compress.quantize.rounding import Gptq, Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize
from compress.quantize.transforms import AwqClip, AwqScale
from eval.engines.family_models import written_model

CPU = torch.device("cpu")
FOUR = Schemes(Scheme(4, 32))
# In the second block no token is sent to it.
LONELY = "mlp.experts.3"
BLOCK = "model.layers.1"


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory, tokens: Tensor) -> ModelFolder:
    """A model whose second router never chooses its last expert: the row of that is against what all tokens
    have in common, which the norm before it is given a lot of."""
    path = tmp_path_factory.mktemp("lonely")
    _, folder = written_model("qwen3_moe", path / "plain")
    tensors = {name: folder.tensor(name) for name in folder.names}
    # One channel of the residual stream is the same for all tokens, and only this row looks at it.
    tensors["model.embed_tokens.weight"][:, 0] = 4.0
    for block in ("model.layers.0", BLOCK):
        tensors[f"{block}.mlp.gate.weight"][:, 0] = 0
    router = tensors[f"{BLOCK}.mlp.gate.weight"]
    router[3] = 0
    router[3, 0] = -50.0
    tensors[f"{BLOCK}.post_attention_layernorm.weight"][0] = 1.0
    (path / "lonely").mkdir()
    folder.copy_companions(path / "lonely")
    save_tensors(path / "lonely" / SINGLE, {n: t.contiguous() for n, t in tensors.items()})
    write_json(path / "lonely" / "config.json", folder.config)
    return ModelFolder(path / "lonely")


def compressed(source: ModelFolder, target: Path, tokens: Tensor, **changes: Any) -> dict[str, Any]:
    settings = {"schemes": FOUR, "transforms": [AwqScale(4), AwqClip(2)], "roundings": [Nearest()]}
    return quantize(source, target, tokens=tokens, device=CPU, **(settings | changes))


def test_an_expert_that_no_token_is_sent_to_is_named_and_rounded(
    lonely: ModelFolder, tokens: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        report = compressed(lonely, tmp_path / "record", tokens)
    seen = report["blocks"][1]["expert_tokens"]
    assert seen[LONELY] == 0
    others = [count for name, count in seen.items() if name != LONELY]
    # Each token is sent to two.
    assert sum(others) == 2 * tokens.numel()
    assert min(others) > 0
    assert f"{BLOCK}: no token of the calibration text was sent to {LONELY}" in caplog.text
    assert f"{BLOCK}.{LONELY}.up_proj" in report["few_tokens"]
    assert "relative_error" not in report["blocks"][1]["linears"][f"{LONELY}.gate_proj"]
    # Without data it is rounded as it would be by itself.
    plain = tmp_path / "plain"
    compressed(lonely, plain, tokens, transforms=[])
    record = ModelFolder(plain)
    W = lonely.tensor(f"{BLOCK}.{LONELY}.gate_proj.weight")
    q = read_linear(record, f"{BLOCK}.{LONELY}.gate_proj")
    step = q.scale.float().repeat_interleave(32, 1)
    assert ((q.dequantize(torch.float32) - W).abs() <= step * 0.51).all()
    FORMATS["compressed-tensors"].write(ModelFolder(tmp_path / "record"), tmp_path / "out")
    audit(ModelFolder(tmp_path / "record"), ModelFolder(tmp_path / "out"))


def test_every_token_is_shown_to_every_expert_if_asked(
    lonely: ModelFolder, tokens: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        report = compressed(lonely, tmp_path / "all", tokens, all_experts=True, roundings=[Gptq()])
    for block in report["blocks"]:
        assert set(block["expert_tokens"].values()) == {tokens.numel()}
    assert not [name for name in report["few_tokens"] if ".experts." in name]
    assert "no token" not in caplog.text


def test_what_leaves_a_block_is_the_same_however_experts_are_observed(
    lonely: ModelFolder, tokens: Tensor, tmp_path: Path
) -> None:
    """Rounded without data, records with and without are the same bits, and so are later blocks' inputs."""
    reports = [
        compressed(lonely, tmp_path / str(every), tokens, transforms=[], all_experts=every)
        for every in (False, True)
    ]
    one, other = (ModelFolder(tmp_path / str(every)) for every in (False, True))
    assert all(torch.equal(one.tensor(name), other.tensor(name)) for name in one.names)
    errors = [report["blocks"][1]["linears"]["self_attn.q_proj"] for report in reports]
    assert errors[0] == errors[1]


def test_fixed_scales_of_its_inputs_are_those_of_the_others(
    lonely: ModelFolder, tokens: Tensor, tmp_path: Path
) -> None:
    fixed = Schemes(Scheme(8, "channel", True, inputs=InputScheme(type="int", per="tensor")))
    compressed(lonely, tmp_path / "record", tokens, schemes=fixed, transforms=[])
    record = ModelFolder(tmp_path / "record")
    scales = [
        float(record.tensor(f"{BLOCK}.mlp.experts.{n}.gate_proj.input_scale")) for n in range(4)
    ]
    assert scales[3] == max(scales[:3]) > 0
