"""Learned rounding: gradients against autograd in float64, and what is kept of a run.

W, V, G (out, groups, columns); scale, zero and range factors (out, groups, 1)
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.errors import UserError
from compress.model.folder import ModelFolder
from compress.quantize.block import Block
from compress.quantize.qtensor import QTensor
from compress.quantize.rounding import Gptq, Learned, Nearest
from compress.quantize.rounding.learned import CHECKED, BlockLoss, LearnedWeight
from compress.quantize.scheme import Grid, Scheme, make_grid, to_codes
from tests.blocks import quantized_blocks

BF16, FP32 = torch.bfloat16, torch.float32
SCHEMES = [Scheme(3, 32), Scheme(3, 32, symmetric=True), Scheme(2, "channel")]


class Round(torch.autograd.Function):
    """Rounding that lets the gradient pass as it is."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient


def textbook_gradients(learned: LearnedWeight, W: Tensor, G: Tensor) -> list[Tensor]:
    """Gradients of sum(G * rounded weight) by V and both range factors (by their common one if
    symmetric), with autograd in float64; scale is stored in 16 bits, which its gradient ignores."""
    V, a, b = (t.double().requires_grad_() for t in learned.state())
    if learned.symmetric:
        a = b
    max_code = 2**learned.bits - 1
    scale = (learned.high.double() * b - learned.low.double() * a) / max_code
    scale = scale + (learned.scale.double() - scale).detach()
    zero: Tensor | int = 2 ** (learned.bits - 1)
    if not learned.symmetric:
        zero = Round.apply(-learned.low.double() * a / scale)
    q = Round.apply(W.double() / scale + zero + V).clamp(0, max_code)
    loss = (G.double() * (q - zero) * scale).sum()
    wanted = [V, b] if learned.symmetric else [V, a, b]
    return list(torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_a_step_follows_the_signs_of_autograd(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(8, 96, generator=generator)
    learned = LearnedWeight(W, make_grid(W, scheme, BF16), scheme, BF16)
    # Somewhere on the way: offsets of both signs, ends drawn in, so that much is beyond the range.
    V = 0.3 * torch.randn(learned.V.shape, generator=generator).clamp(-1, 1)
    low, high = (0.6 + 0.4 * torch.rand(learned.scale.shape, generator=generator) for _ in "lh")
    before = (V, high if scheme.symmetric else low, high)
    learned.restore(tuple(t.clone() for t in before))
    G = torch.randn(8, 96, generator=generator)
    shaped = G.unflatten(1, V.shape[1:])
    expected = textbook_gradients(learned, W.unflatten(1, V.shape[1:]), shaped)
    beyond = (expected[0] == 0).double().mean()
    assert 0.02 < beyond < 0.5, "weights beyond the range must be there, and others"
    learned.rounded()
    learned.step(G, rate=0.01)
    after = learned.state()
    if scheme.symmetric:
        assert torch.equal(after[1], after[2])
        before, after = (before[0], before[2]), (after[0], after[2])
    for old, new, gradient in zip(before, after, expected, strict=True):
        # A gradient next to 0 may have either sign in float32.
        clear = (gradient.abs() > 1e-4 * gradient.abs().max()) | (gradient == 0)
        assert clear.double().mean() > 0.9
        moved = old - 0.01 * gradient.sign().float()
        assert torch.allclose(new[clear], moved[clear], atol=1e-6)


def test_a_step_worked_by_hand() -> None:
    # One group, 2 bits, scale 1, zero 0, codes 0 to 3: 1.4 -> 1, 2.0 -> 2, 3.6 is beyond the range.
    W = torch.tensor([[1.4, 2.0, 3.6]])
    grid = Grid(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8))
    learned = LearnedWeight(W, grid, Scheme(2, "channel"), FP32)
    assert learned.rounded().tolist() == [[1.0, 2.0, 3.0]]
    # To raise the first, to lower the second, to raise the third, which no offset can: only a wider
    # range. By scale: -1 * (1 - 1.4) + 2 * (2 - 2) - 1 * 3 = -2.6 < 0, so the upper end goes up.
    learned.step(torch.tensor([[-1.0, 2.0, -1.0]]), rate=0.125)
    V, _, high = learned.state()
    assert V.tolist() == [[[0.125, -0.125, 0.0]]]
    assert high.tolist() == [[[1.125]]]
    assert learned.scale.tolist() == [[[1.125]]]
    # 1.4 / 1.125 + 0.125 = 1.37 -> 1; 2 / 1.125 - 0.125 = 1.65 -> 2; 3.6 / 1.125 = 3.2 -> 3.
    assert learned.quantized().codes.tolist() == [[1, 2, 3]]


def test_offsets_and_ends_have_bounds() -> None:
    W = torch.randn(4, 64)
    learned = LearnedWeight(W, make_grid(W, Scheme(3, 32), BF16), Scheme(3, 32), BF16)
    for _ in range(30):
        learned.rounded()
        learned.step(torch.randn(4, 64), rate=0.5)
        V, low, high = learned.state()
        assert V.abs().max() <= 0.5
        assert min(low.min(), high.min()) >= 0.05
        assert max(low.max(), high.max()) <= 1.25
        q = learned.quantized()
        assert q.codes.max() <= 7
        assert (q.scale > 0).all()
        assert torch.equal(q.dequantize(BF16), learned.rounded())


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_given_integers_are_where_it_starts(scheme: Scheme, dtype: torch.dtype) -> None:
    """Also integers that are far from the nearest ones, as error feedback leaves them."""
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(16, 96, generator=generator)
    near = to_codes(W, make_grid(W, scheme, dtype), scheme)
    away = torch.randint(-3, 4, W.shape, generator=generator)
    codes = (near.codes.int() + away).clamp(0, scheme.max_code).to(torch.uint8)
    start = QTensor(codes, near.scale, near.zero, scheme.bits)
    found = LearnedWeight(W, start, scheme, dtype).quantized()
    assert torch.equal(found.codes, codes)
    assert found.scale.dtype == dtype
    assert torch.allclose(found.scale.float(), start.scale.float(), rtol=1e-6)
    if dtype == BF16:
        assert torch.equal(found.scale, start.scale)
    assert (found.zero is None) == scheme.symmetric
    if start.zero is not None:
        assert torch.equal(found.zero, start.zero)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_without_integers_it_starts_from_nearest(scheme: Scheme) -> None:
    W = torch.randn(16, 96, generator=torch.Generator().manual_seed(2))
    grid = make_grid(0.8 * W, scheme, BF16)
    assert torch.equal(
        LearnedWeight(W, grid, scheme, BF16).quantized().codes,
        to_codes(W, grid, scheme).codes,
    )


def first_block(tiny: ModelFolder, tokens: Tensor, methods: list[Any], scheme: Scheme) -> Any:
    return next(quantized_blocks(tiny, tokens, methods, scheme, original=True))


def distance(block: Block, Y: Tensor) -> float:
    """Mean relative squared error of the block's outputs, token by token."""
    assert block.activations is not None
    assert block.activations.targets is not None
    Y, T = Y.double(), block.activations.targets.double()
    return float(((Y - T).pow(2).sum(-1) / T.pow(2).sum(-1)).mean())


@pytest.mark.parametrize("first", [Nearest(), Gptq()])
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_ends_nearer_to_the_original(
    tiny: ModelFolder, tokens: Tensor, first: Nearest | Gptq, symmetric: bool
) -> None:
    scheme = Scheme(3, 32, symmetric)
    block, start, Y = first_block(tiny, tokens, [first], scheme)
    refined, found, Z = first_block(tiny, tokens, [first, Learned(iters=30)], scheme)
    before, after = distance(block, Y), distance(refined, Z)
    assert after < 0.9 * before
    assert refined.notes["learned"]["error_ratio"] == pytest.approx(after / before, rel=0.02)
    changed = 0.0
    for name, q in found.items():
        assert torch.equal(refined.weights[name], block.weights[name]), "only integers are picked"
        assert q.codes.max() <= scheme.max_code
        assert q.scale.dtype == tiny.dtype
        assert q.symmetric == symmetric
        changed += float((q.codes != start[name].codes).double().mean()) / len(found)
    # It refines: most integers stay what the method before it picked.
    assert 0 < changed < 0.5


def test_a_run_that_only_gets_worse_returns_its_start(tiny: ModelFolder, tokens: Tensor) -> None:
    """One step of size 1 throws every offset and every end to its bound."""
    scheme = Scheme(3, 32)
    _, start, Y = first_block(tiny, tokens, [Gptq()], scheme)
    block, found, Z = first_block(tiny, tokens, [Gptq(), Learned(iters=1)], scheme)
    assert block.notes["learned"] == {"error_ratio": 1.0}
    for name, q in found.items():
        assert torch.equal(q.codes, start[name].codes)
        assert torch.equal(q.scale, start[name].scale)
        assert torch.equal(q.zero, start[name].zero)
    assert torch.equal(Y, Z)


def test_the_best_look_is_kept_not_the_last(
    tiny: ModelFolder, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[dict[str, Tensor]] = []
    losses = iter([3.0, 1.0, 1.0, 4.0])

    def check(loss: BlockLoss) -> float:
        names = loss.block.weights
        looks.append({name: loss.block.part(name).weight.clone() for name in names})
        return next(losses)

    monkeypatch.setattr(BlockLoss, "check", check)
    block, found, _ = first_block(tiny, tokens, [Learned(iters=10)], Scheme(3, 32))
    assert len(looks) == 4, "before the first step, then three times"
    assert block.notes["learned"]["error_ratio"] == pytest.approx(1 / 3)
    for name, q in found.items():
        assert torch.equal(q.dequantize(tiny.dtype), looks[1][name])
        assert not torch.equal(looks[1][name], looks[3][name])


def test_looks_are_at_the_first_sequences(tiny: ModelFolder) -> None:
    """Changes beyond the looked-at share do not count, one within it does."""
    many = torch.randint(256, (CHECKED + 2, 16), generator=torch.Generator().manual_seed(0))
    blocks = quantized_blocks(tiny, many, [Learned(iters=1)], Scheme(3, 32), original=True)
    block, _, _ = next(blocks)
    loss = BlockLoss(block, 2)
    before = loss.check()
    loss.targets[CHECKED:] += 1
    assert loss.check() == before
    loss.targets[CHECKED - 1] += 1
    assert loss.check() > before


def test_a_block_is_left_without_gradients(tiny: ModelFolder, tokens: Tensor) -> None:
    block, _, _ = first_block(tiny, tokens, [Learned(iters=2)], Scheme(3, 32))
    assert not any(p.requires_grad for p in block.module.parameters())


@pytest.mark.parametrize("knobs", [{"iters": 0}, {"batch": 0}])
def test_wrong_knobs_are_refused(knobs: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"rounding.learned.* is not allowed: choose 1 or more"):
        Learned(**knobs)
