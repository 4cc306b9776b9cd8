"""Rounded inputs: what a linear computes with, against sums done the other way round."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.errors import UserError
from compress.quantize.inputs import InputScheme

X = torch.randn(3, 5, 384, generator=torch.Generator().manual_seed(0)) * 4


def test_a_token_keeps_its_own_scale() -> None:
    scheme = InputScheme()
    found = scheme.round(X)
    scale = X.abs().amax(-1, keepdim=True) / 127
    levels = found / scale
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert ((found - X).abs() <= scale / 2 + 1e-6).all()
    # Another token in the batch changes nothing.
    assert torch.equal(scheme.round(X[:1]), found[:1])


def test_groups_of_columns_have_scales_of_their_own() -> None:
    found = InputScheme("float", "group").round(X)
    parts = [InputScheme("float", "token").round(part) for part in X.split(128, dim=-1)]
    assert torch.equal(found, torch.cat(parts, dim=-1))


def test_a_fixed_scale_clips() -> None:
    found = InputScheme(per="tensor").round(X, torch.tensor(0.01))
    assert found.abs().max() == pytest.approx(1.27)
    inside = X.abs() < 1.27
    assert ((found - X).abs()[inside] <= 0.005 + 1e-6).all()


def test_zeros_stay_zeros() -> None:
    for scheme in (InputScheme(), InputScheme("float"), InputScheme("float", "group")):
        assert torch.equal(scheme.round(torch.zeros(2, 384)), torch.zeros(2, 384))


def test_columns_with_outliers_stay_as_they_are() -> None:
    """And the rest is rounded as if they were not there: the batch decides in dynamic mode."""
    calm = X.clamp(-5, 5)
    wild = calm.clone()
    wild[1, 2, 7], wild[0, 0, 9] = 80.0, -70.0
    found = InputScheme(outliers="dynamic").round(wild)
    assert torch.equal(found[..., [7, 9]], wild[..., [7, 9]])
    rest = torch.ones(384, dtype=torch.bool)
    rest[[7, 9]] = False
    without = wild.masked_fill(wild.abs() >= 6, 0)
    assert torch.equal(found[..., rest], InputScheme().round(without)[..., rest])
    # The same columns, when they are fixed.
    columns = torch.tensor([7, 9])
    static = InputScheme(outliers="static").round(wild, columns=columns)
    emptied = wild.index_fill(-1, columns, 0)
    assert torch.equal(static[..., rest], InputScheme().round(emptied)[..., rest])
    assert torch.equal(static[..., [7, 9]], wild[..., [7, 9]])
    # Without an outlier nothing is left out.
    assert torch.equal(InputScheme(outliers="dynamic").round(calm), InputScheme().round(calm))


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"type": "int4"}, "scheme.inputs.type=int4 is not allowed: choose int, float"),
        ({"per": "row"}, "choose token, tensor, group"),
        ({"outliers": "some"}, "choose none, dynamic, static"),
        ({"threshold": 0.0}, "choose more than 0"),
        ({"outliers": "static", "per": "tensor"}, "needs scheme.inputs.type=int"),
    ],
)
def test_mistakes(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        InputScheme(**knobs)
