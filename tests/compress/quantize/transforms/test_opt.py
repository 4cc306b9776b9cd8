"""Searched grids: a case worked by hand, then the same candidates one by one in float64.

W (out, in); X (tokens, in); H (in, in)
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.errors import UserError
from compress.model.families import LLAMA
from compress.model.folder import ModelFolder
from compress.model.walk import Walk
from compress.quantize.block import Block
from compress.quantize.scheme import Grid, Scheme, Schemes, fake_quantize, make_grid
from compress.quantize.stage import open_block
from compress.quantize.transforms import Opt

BF16, FP32 = torch.bfloat16, torch.float32
SCHEMES = [Scheme(3, 32), Scheme(3, 32, symmetric=True), Scheme(2, "channel"), Scheme(4, 16)]


def test_worked_by_hand() -> None:
    # Two groups of four columns, 2 bits. In the first the last column hardly counts: drawing the
    # upper end in to 0.75 * 3.5 gives scale 0.875 and 0, 0.875, 1.75, 2.625, error 0.086; the whole
    # range (scale 3.5 / 3) has 0.139. In the second all count alike: the whole range fits exactly.
    W = torch.tensor([[0.0, 1.0, 2.0, 3.5, -1.0, 0.0, 1.0, 2.0]])
    H = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.01, 1.0, 1.0, 1.0, 1.0]))
    grid = Opt(steps=2, shrink=0.5, rounds=0).search(W, H, Scheme(2, 4), FP32)
    assert grid.scale.tolist() == [[0.875, 1.0]]
    assert grid.zero is not None
    assert grid.zero.tolist() == [[0, 1]]
    # Refitted to the codes 0 1 2 3: (1 * 1 + 2 * 2 + 0.01 * 3 * 3.5) / (1 + 4 + 0.01 * 9).
    grid = Opt(steps=2, shrink=0.5, rounds=1).search(W, H, Scheme(2, 4), FP32)
    assert grid.scale[0, 0] == pytest.approx(5.105 / 5.09, rel=1e-6)
    assert grid.scale[0, 1] == 1.0


def stored(scale: float) -> float:
    return float(torch.tensor(scale if scale > 0 else 1.0, dtype=FP32).to(BF16))


class Textbook:
    """The best grid of one group w (columns,) by its error on tokens X (tokens, columns)."""

    def __init__(self, w: Tensor, X: Tensor, scheme: Scheme):
        self.w, self.X, self.max_code = w.double(), X.double(), scheme.max_code
        self.least, self.scale, self.zero = float("inf"), 1.0, 0.0

    def levels(self, scale: float, zero: float) -> Tensor:
        return (self.w / scale + zero).round().clamp(0, self.max_code) - zero

    def error(self, scale: float, zero: float) -> float:
        D = self.levels(scale, zero) * scale - self.w
        return float((self.X @ D).pow(2).mean())

    def offer(self, scale: float, zero: float) -> bool:
        error = self.error(stored(scale), zero)
        if error >= self.least:
            return False
        self.least, self.scale, self.zero = error, stored(scale), zero
        return True

    def refit(self) -> None:
        """Least squares for the scale on the outputs of the codes."""
        y, target = self.X @ self.levels(self.scale, self.zero), self.X @ self.w
        if float(y @ y) > 0 and float(y @ target) > 0:
            self.offer(float(y @ target / (y @ y)), self.zero)


def textbook(w: Tensor, X: Tensor, scheme: Scheme, knobs: Opt) -> Textbook:
    best = Textbook(w, X, scheme)
    shares = [1 - i * knobs.shrink / knobs.steps for i in range(knobs.steps)]
    low, high = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
    if scheme.symmetric:
        for share in shares:
            best.offer(2 * max(-low, high) * share / scheme.max_code, 2 ** (scheme.bits - 1))
    else:
        # Both ends together, then the lower alone, then the upper alone, from the best so far.
        at = (1.0, 1.0)
        for ends in ((True, True), (True, False), (False, True)):
            start = at
            for share in shares:
                tried = tuple(s * share if e else s for s, e in zip(start, ends, strict=True))
                scale = stored((high * tried[1] - low * tried[0]) / scheme.max_code)
                zero = min(max(round(-low * tried[0] / scale), 0), scheme.max_code)
                if best.offer(scale, zero):
                    at = tried
    for _ in range(knobs.rounds):
        best.refit()
    return best


def case(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights with long tails and correlated inputs of different size, and their second moment."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(96) + 0.1 * torch.randn(96, 96, generator=generator)
    X = torch.randn(200, 96, generator=generator) @ mixing
    X = X * torch.randn(96, generator=generator).exp()
    W = torch.randn(6, 96, generator=generator).pow(3)
    # The second row is of one sign: its range ends at 0.
    W[1].abs_()
    return W, X, X.T @ X / len(X)


def errors_of(W: Tensor, X: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """Error of every group on the tokens, (out, groups), float64."""
    columns = scheme.columns_per_group(W.shape[1])
    D = (fake_quantize(W, grid, scheme) - W).double().unflatten(1, (-1, columns))
    outputs = torch.einsum("tgc,ogc->tog", X.double().unflatten(1, (-1, columns)), D)
    return outputs.pow(2).mean(0)


@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_search_equals_the_textbook(scheme: Scheme, rounds: int) -> None:
    W, X, H = case(0)
    knobs = Opt(steps=5, shrink=0.6, rounds=rounds)
    grid = knobs.search(W, H, scheme, BF16)
    columns = scheme.columns_per_group(96)
    found, same = errors_of(W, X, grid, scheme), []
    for row in range(len(W)):
        for g in range(96 // columns):
            part = slice(columns * g, columns * (g + 1))
            best = textbook(W[row, part], X[:, part], scheme, knobs)
            assert float(found[row, g]) == pytest.approx(best.least, rel=1e-3)
            zero = 2 ** (scheme.bits - 1) if grid.zero is None else int(grid.zero[row, g])
            same.append(float(grid.scale[row, g]) == best.scale and zero == best.zero)
    # Two candidates may be as good as each other to float32.
    assert sum(same) >= 0.95 * len(same)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_it_is_never_worse_than_the_whole_range(scheme: Scheme) -> None:
    W, X, H = case(1)
    plain = errors_of(W, X, make_grid(W, scheme, BF16), scheme)
    searched = errors_of(W, X, Opt(rounds=0).search(W, H, scheme, BF16), scheme)
    refitted = errors_of(W, X, Opt(rounds=2).search(W, H, scheme, BF16), scheme)
    assert (searched <= plain * (1 + 1e-4)).all()
    assert (refitted <= searched * (1 + 1e-4)).all()
    assert searched.sum() < 0.9 * plain.sum()
    assert refitted.sum() < searched.sum()


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_of_zeros_stays_zero(symmetric: bool) -> None:
    W, _, H = case(2)
    W[2, 32:64] = 0
    scheme = Scheme(3, 32, symmetric)
    for dtype in (BF16, torch.float16):
        grid = Opt().search(W, H, scheme, dtype)
        assert grid.scale.dtype == dtype
        assert torch.isfinite(grid.scale).all()
        assert (grid.scale > 0).all()
        assert (fake_quantize(W, grid, scheme)[2, 32:64] == 0).all()
    # Nothing is known of inputs that were always 0: any grid, but a usable one.
    grid = Opt().search(W, torch.zeros_like(H), scheme, BF16)
    assert torch.equal(grid.scale, make_grid(W, scheme, BF16).scale)


def test_groups_do_not_see_each_other() -> None:
    W, _, H = case(3)
    scheme = Scheme(3, 32)
    whole = Opt().search(W, H, scheme, BF16)
    part = Opt().search(W[:, 32:64], H[32:64, 32:64], scheme, BF16)
    assert whole.zero is not None
    assert part.zero is not None
    assert torch.equal(whole.scale[:, 1:2], part.scale)
    assert torch.equal(whole.zero[:, 1:2], part.zero)


def test_it_chooses_grids_and_changes_no_weight(tiny: ModelFolder, tokens: Tensor) -> None:
    walk = Walk(tiny, LLAMA, torch.device("cpu"))
    walk.embed(tokens)
    with walk.open(0) as module, torch.no_grad():
        block: Block = open_block(module, walk.prefix(0), LLAMA, Schemes(Scheme(3, 32)), tiny.dtype)
        block.activations = walk.enter(0)
        weights = {name: W.clone() for name, W in block.weights.items()}
        stored_ = {name: p.clone() for name, p in module.named_parameters()}
        opt, name = Opt(steps=3), "mlp.down_proj"
        opt(block)
        # Grids are chosen when they are asked for, on the moments as they are then.
        assert not block.grids
        block.grid("mlp.up_proj")
        block.moments[name].second.mul_(torch.rand(block.weights[name].shape[1]))
        expected = opt.search(
            block.weights[name], block.moments[name].second, block.schemes[name], block.dtype
        )
        assert torch.equal(block.grid(name).scale, expected.scale)
        before = block.grid(name)
        block.moments[name].second.fill_(1.0)
        assert block.grid(name) is before, "a grid that was chosen stays"
        assert all(torch.equal(W, block.weights[name]) for name, W in weights.items())
        assert all(torch.equal(p, stored_[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("knobs", [{"steps": 0}, {"rounds": -1}, {"shrink": 1.0}, {"shrink": -0.1}])
def test_wrong_knobs_are_refused(knobs: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"transforms.opt"):
        Opt(**knobs)  # type: ignore[arg-type]
