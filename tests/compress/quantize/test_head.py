"""Quantized embedding and head: the record, and the grids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress.compose import compose_settings
from compress.config import parse
from compress.errors import UserError
from compress.model.folder import ModelFolder
from compress.quantize.head import ROWS, quantize_rows
from compress.quantize.record import linears, read_linear
from compress.quantize.rounding import Nearest
from compress.quantize.scheme import Scheme, Schemes, fake_quantize, make_grid
from compress.quantize.stage import quantize

CPU = torch.device("cpu")
INT8 = Scheme(8, "channel", symmetric=True)


def record(source: ModelFolder, target: Path, schemes: Schemes) -> tuple[ModelFolder, dict]:
    report = quantize(
        source,
        target,
        tokens=None,
        schemes=schemes,
        transforms=[],
        roundings=[Nearest()],
        device=CPU,
    )
    return ModelFolder(target), report["head"]


@pytest.mark.parametrize("tied", [True, False])
def test_record_holds_each_matrix_once(
    make_model: Callable[..., ModelFolder], tmp_path: Path, tied: bool
) -> None:
    source = make_model(tie_word_embeddings=tied)
    found, report = record(source, tmp_path / "record", Schemes(Scheme(4, 32), head=INT8))
    expected = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    assert [name for name in linears(found) if "layers" not in name] == expected
    assert list(report) == expected
    for name in expected:
        W = source.tensor(f"{name}.weight").float()
        Wq = read_linear(found, name).dequantize(torch.bfloat16).float()
        error = float((Wq - W).square().sum() / W.square().sum())
        assert report[name]["relative_error"] == pytest.approx(error, rel=1e-3)
        assert report[name]["relative_error"] < 1e-4
        assert report[name]["bits_per_weight"] == 8 + 16 / 128


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 32, True), INT8], ids=lambda s: s.name)
def test_searched_grid_is_never_worse(scheme: Scheme) -> None:
    W = torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    W[3] = 0
    W = W.bfloat16().float()
    plain = fake_quantize(W, make_grid(W, scheme, torch.bfloat16), scheme)
    q, _ = quantize_rows(W.bfloat16(), scheme, CPU)
    found = q.dequantize(torch.float32)
    groups = (-1, scheme.columns_per_group(128))
    before = (plain - W).unflatten(1, groups).square().sum(-1)
    after = (found - W).unflatten(1, groups).square().sum(-1)
    assert (after <= before * 1.0001).all()
    assert after.sum() < 0.98 * before.sum() or scheme.bits == 8


def test_rows_in_parts_are_the_same_as_at_once() -> None:
    W = torch.randn(ROWS + 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole, _ = quantize_rows(W, Scheme(4, 32), CPU)
    tail, _ = quantize_rows(W[ROWS:], Scheme(4, 32), CPU)
    assert torch.equal(whole.codes[ROWS:], tail.codes)
    assert whole.zero is not None
    assert tail.zero is not None
    assert torch.equal(whole.zero[ROWS:], tail.zero)


@pytest.mark.parametrize(
    "words",
    [
        ["head=int4", "head.bits=3", "scheme=int3"],
        ["head=int8"],
        ["head=int4", "scheme=int3"],
        ["head=int8", "head.symmetric=false", "scheme.symmetric=true"],
    ],
)
def test_heads_that_engines_cannot_load_are_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match="head"):
        parse(compose_settings(["recipe=rtn-int4", *words]))


def test_heads_that_load() -> None:
    run = parse(compose_settings(["recipe=rtn-int4", "head=int4"]))
    assert run.schemes.head == run.schemes.linears
    run = parse(compose_settings(["recipe=rtn-int3", "head=int8", "scheme.symmetric=true"]))
    assert run.schemes.head == INT8
