"""AWQ clipping against a search over the tokens, group by group, in float64."""

from __future__ import annotations

import pytest
import torch

from compress.model.families import LLAMA
from compress.quantize.block import Block
from compress.quantize.scheme import Scheme
from compress.quantize.transforms import AwqClip

SCHEME = Scheme(3, 32)
STEPS = 10


def textbook_bound(w: torch.Tensor, X: torch.Tensor) -> float:
    """The bound of one group (32,) with the least error on its tokens X (tokens, 32)."""
    errors = []
    absmax = float(w.abs().max())
    for i in range(STEPS):
        bound = absmax * (1 - i / (2 * STEPS))
        low = max(min(float(w.min()), 0.0), -bound)
        high = min(max(float(w.max()), 0.0), bound)
        scale = torch.tensor((high - low) / 7, dtype=torch.float32).bfloat16().double()
        zero = (-low / scale).round().clamp(0, 7)
        wq = ((w / scale + zero).round().clamp(0, 7) - zero) * scale
        errors.append(float((X @ (wq - w)).pow(2).mean()))
    return absmax * (1 - errors.index(min(errors)) / (2 * STEPS))


def test_bounds_equal_the_textbook() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(200, 96, generator=generator) * torch.randn(96, generator=generator).exp()
    # Long tails, so that clipping pays.
    W = torch.randn(8, 96, generator=generator) ** 3
    H = X.T @ X / len(X)
    bounds = AwqClip(STEPS)._bounds(W, _diagonal_blocks(H), SCHEME, torch.bfloat16)
    clipped = 0
    for row in range(8):
        for g in range(3):
            part = slice(32 * g, 32 * g + 32)
            expected = textbook_bound(W[row, part].double(), X[:, part].double())
            assert float(bounds[row, g]) == pytest.approx(expected, rel=1e-5)
            clipped += expected < float(W[row, part].abs().max()) * 0.99
    assert clipped > 4, "the case must need clipping, or the test shows nothing"


def _diagonal_blocks(H: torch.Tensor) -> torch.Tensor:
    return torch.stack([H[i : i + 32, i : i + 32] for i in range(0, len(H), 32)])


def test_query_and_key_are_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    weights = {name: torch.randn(8, 64, generator=generator) ** 3 for name in names}
    X = torch.randn(100, 64, generator=generator)
    from calibration.moments import Moments

    moments = Moments.zeros(64, X.device)
    moments.add(X)
    block = Block(
        torch.nn.Module(),
        LLAMA,
        dict.fromkeys(names, SCHEME),
        torch.bfloat16,
        weights,
        moments=dict.fromkeys(names, moments.mean()),
    )
    AwqClip()(block)
    assert set(block.grids) == {"self_attn.v_proj"}
