"""Fewer tokens than half the inputs are kept as they are: the same numbers as from their second moments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import calibration.moments as moments_module
from calibration.moments import Moments, Tokens
from compress.model.folder import ModelFolder
from compress.quantize.block import group_moments, output_error
from compress.quantize.rounding import Gptaq, Gptq, Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize
from compress.quantize.transforms import AwqClip, AwqScale, Opt
from compress.quantize.transforms.awq_scale import Readers
from tests.blocks import quantized_blocks

IN, GROUP = 192, 32
SCHEME, BF16 = Scheme(3, GROUP), torch.bfloat16


@pytest.fixture
def both() -> tuple[Moments, Moments]:
    """Moments of 80 tokens kept and summed up, then scaled."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(IN, IN, generator=generator) / IN**0.5
    X = torch.randn(2, 40, IN, generator=generator)
    X = ((X + 2 * X @ mixing) * torch.randn(IN, generator=generator).exp()).to(BF16)
    found = Moments.zeros(IN, X.device, tokens=80), Moments.zeros(IN, X.device)
    s = torch.rand(IN, generator=generator) + 0.5
    for moments in found:
        for batch in X:
            moments.add(batch)
    kept, summed = (moments.mean() for moments in found)
    for moments in (kept, summed):
        moments.scale(s)
        moments.scale(1 / s.square())
    assert isinstance(kept.H, Tokens)
    assert isinstance(summed.H, Tensor)
    return kept, summed


def test_errors_and_groups_are_those_of_the_squares(both: tuple[Moments, Moments]) -> None:
    kept, summed = both
    D = torch.randn(6, IN, generator=torch.Generator().manual_seed(1))
    exact = float(((D.double() @ summed.second.double()) * D.double()).sum())
    assert output_error(D, kept.H) == pytest.approx(exact, rel=1e-5)
    assert output_error(D, summed.H) == pytest.approx(exact, rel=1e-5)
    for columns in (GROUP, IN):
        Hg, expected = (group_moments(moments.H, columns) for moments in both)
        assert Hg.shape == (IN // columns, columns, columns)
        assert (Hg - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("seed", range(4))
def test_searches_choose_the_same(both: tuple[Moments, Moments], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    readers = [torch.randn(rows, IN, generator=generator) for rows in (24, 8)]
    (s, exponent, ratio), expected = (
        AwqScale().search([Readers(readers, m, SCHEME)], BF16) for m in both
    )
    assert exponent == expected[1]
    assert exponent > 0, "the case must need scaling, or the test shows nothing"
    assert torch.equal(s, expected[0])
    assert ratio == pytest.approx(expected[2], rel=1e-4)
    for method in (AwqClip(), Opt()):
        ours, theirs = (method.search(readers[0], m.H, SCHEME, BF16) for m in both)
        assert torch.equal(ours.scale, theirs.scale)
        assert ours.zero is not None
        assert theirs.zero is not None
        assert torch.equal(ours.zero, theirs.zero)


@pytest.mark.parametrize("method", [Gptq(), Gptaq()])
def test_what_needs_the_square_has_it_to_the_last_bit(
    tiny: ModelFolder, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, method: Gptq | Gptaq
) -> None:
    """64 of 256 inputs of down_proj, and the first input of a block, which 64 tokens are half of."""
    few = tokens[:2]
    runs = []
    for limit in (moments_module.are_few, lambda *_: False):
        monkeypatch.setattr(moments_module, "are_few", limit)
        runs.append([q for _, q, _ in quantized_blocks(tiny, few, [method], SCHEME, original=True)])
    for ours, theirs in zip(*runs, strict=True):
        assert all(torch.equal(q.codes, theirs[name].codes) for name, q in ours.items())


class Squares(TorchDispatchMode):
    """Counts results whose last two sides are one of these."""

    def __init__(self, sides: set[int]):
        super().__init__()
        self.sides, self.found = sides, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.ndim > 1 and result.shape[-1] in self.sides:
                self.found += result.shape[-1] == result.shape[-2]
        return results


@pytest.mark.parametrize(("sequences", "squares"), [(2, False), (8, True)])
def test_awq_makes_no_square_of_few_tokens(
    make_model: Callable[..., ModelFolder], tmp_path: Path, sequences: int, squares: bool
) -> None:
    # No weight is square: inputs of 128, 256 (of o_proj) and 384, keys of 64.
    folder = make_model(head_dim=64, num_key_value_heads=1, intermediate_size=384)
    tokens = torch.randint(256, (sequences, 30), generator=torch.Generator().manual_seed(0))
    with Squares({128, 256, 384}) as mode:
        report = quantize(
            folder,
            tmp_path / "record",
            tokens=tokens,
            schemes=Schemes(Scheme(4, GROUP)),
            transforms=[AwqScale(), AwqClip()],
            roundings=[Nearest()],
            device=torch.device("cpu"),
        )
    assert len(report["blocks"]) == 3
    assert bool(mode.found) == squares
