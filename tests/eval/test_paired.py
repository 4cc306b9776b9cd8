"""Intervals and tests of paired figures, on pairs whose difference is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.signal import lfilter
from torch import Tensor

from eval.paired import (
    FEWEST,
    block_length,
    difference,
    flips,
    holm,
    interval,
    paired,
)

TRUE = 0.3


def _series(phi: float, skewed: bool, n: int, seed: int) -> Tensor:
    """Mean TRUE; each figure depends on the one before it by ``phi``; skewed as divergences are."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n + 200, generator=generator, dtype=torch.float64)
    x = torch.from_numpy(lfilter([math.sqrt(1 - phi**2)], [1, -phi], noise.numpy()))[200:]
    return TRUE + (x.exp() - math.exp(0.5) if skewed else x)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("skewed", [False, True])
def test_intervals_cover_at_their_rate(phi: float, skewed: bool) -> None:
    """95 of 100 intervals hold the truth; 300 trials know it to 2.5 points (two standard errors)."""
    trials, hits = 300, 0
    for seed in range(trials):
        found = interval(list(_series(phi, skewed, 3000, seed).view(3, -1)), resamples=500)
        hits += found.low <= TRUE <= found.high
    assert 0.915 <= hits / trials <= 0.985


def test_intervals_that_ignore_the_neighbours_do_not_cover() -> None:
    """What blocks are for: token by token the same figures cover far too rarely."""
    hits = 0
    for seed in range(50):
        found = interval([_series(0.9, False, 1000, seed)], block=1, resamples=200)
        hits += found.low <= TRUE <= found.high
    assert hits < 30


def test_level_and_p_value_agree() -> None:
    """A difference of 0 lies outside the 95 % interval where p is below .05, and inside above it."""
    for seed in range(30):
        x = [_series(0.5, seed % 2 == 1, 1500, seed) - TRUE]
        found = interval(x, resamples=4000)
        outside = found.low > 0 or found.high < 0
        # The ends are interpolated between two resamples.
        if abs(found.p - 0.05) > 0.001:
            assert outside == (found.p < 0.05)
        narrow = interval(x, level=0.5)
        assert narrow.high - narrow.low < found.high - found.low


def test_block_length_grows_with_the_dependence() -> None:
    lengths = [block_length([_series(phi, False, 6000, 1)]) for phi in (0.0, 0.5, 0.9)]
    assert lengths[0] < lengths[1] < lengths[2]
    # Never so long that too few are left, or longer than a window.
    assert block_length([_series(0.9, False, 100, 1)]) <= 100 // FEWEST
    assert block_length(list(_series(0.99, False, 600, 1).view(20, 30))) <= 30


def test_of_too_little_there_is_no_interval() -> None:
    found = interval([torch.tensor([1.0, 2.0, 4.0])])
    assert found.mean == pytest.approx(7 / 3)
    assert found.low is found.high is found.p is found.half is None


def test_no_difference_at_all() -> None:
    found = interval([torch.zeros(500), torch.zeros(500)])
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)
    constant = interval([torch.ones(500)])
    assert (constant.low, constant.high, constant.p) == (1, 1, 0)


@pytest.mark.parametrize("different", [1, 2, 3])
def test_where_few_tokens_differ_the_share_has_an_interval(different: int) -> None:
    """Many resamples hold none of them, and show no spread."""
    same = torch.ones(10, 1000)
    same[:different, 500] = 0
    found = interval(list(same))
    assert found.mean == pytest.approx(1 - different / 10000)
    assert 1 - 12 * different / 10000 < found.low < found.mean < found.high <= 1


def test_what_is_not_finite_has_no_interval() -> None:
    change = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    change[1, 7] = math.nan
    found = interval(list(change))
    assert math.isnan(found.mean)
    assert found.low is found.high is found.p is None


def test_windows_of_different_lengths_count_by_their_tokens() -> None:
    found = interval([torch.zeros(300), torch.ones(100)], block=10)
    assert found.mean == 0.25
    assert found.low < 0.25 < found.high


def test_paired_intervals_are_narrower_than_those_of_either() -> None:
    """The tokens' own difficulty cancels."""
    hard = _series(0.5, True, 4000, 3) * 4
    ours = hard + 0.05 + 0.1 * torch.randn(4000, generator=torch.Generator().manual_seed(4))
    alone = interval([ours.float()])
    zero = [torch.zeros(4000)]
    found = paired([ours.float()], [hard.float()], zero, zero)["nll"]
    half = (found["high"] - found["low"]) / 2
    assert abs(found["mean"] - 0.05) < 2 * half
    assert half < 0.1 * alone.half


def _candidate(scale: float, seed: int, base: Tensor) -> dict[str, list[Tensor]]:
    noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(seed))
    nll = base + scale * noise + scale**2 / 2
    return {"nll": list(nll), "kl": list((scale * noise).square() / 2)}


@pytest.fixture
def base() -> Tensor:
    return _series(0.5, True, 6 * 1000, 7).view(6, -1)


def test_the_same_candidate_twice_is_equal(base: Tensor) -> None:
    first = _candidate(0.3, 1, base)
    assert difference(first, first).equal
    # Other noise of the same size: another checkpoint that is as good.
    assert difference(first, _candidate(0.3, 2, base)).equal


def test_a_worse_candidate_is_different(base: Tensor) -> None:
    found = difference(_candidate(0.3, 1, base), _candidate(0.4, 2, base))
    assert not found.equal
    assert found.kl.mean == pytest.approx((0.16 - 0.09) / 2, rel=0.15)
    assert found.kl.low > 0
    with pytest.raises(ValueError, match="not of the same tokens"):
        difference(_candidate(0.3, 1, base), _candidate(0.3, 1, base[:, :-1]))


def test_mcnemar_by_hand() -> None:
    """9 lost, 1 gained: two-sided binomial of 1 in 10 is 2 (1 + 10) / 1024."""
    base = [True] * 60 + [False] * 40
    candidate = [False] * 9 + [True] * 51 + [True] + [False] * 39
    found = flips(base, candidate)
    assert (found["gained"], found["lost"], found["difference"]) == (1, 9, -0.08)
    assert found["p"] == pytest.approx(22 / 1024)
    assert found["low"] < -0.08 < found["high"] < 0
    same = flips(base, base)
    assert (same["p"], same["difference"]) == (1, 0)
    assert same["low"] < 0 < same["high"]


@pytest.mark.parametrize(("gain", "loss"), [(0.05, 0.05), (0.02, 0.1), (0.01, 0.03)])
def test_intervals_of_flips_cover(gain: float, loss: float) -> None:
    generator, hits, trials = torch.Generator().manual_seed(0), 0, 1000
    for _ in range(trials):
        draw = torch.rand(200, generator=generator)
        base = ((draw < loss) | (draw > 0.5)).tolist()
        candidate = ((draw > 0.5) | ((draw > loss) & (draw < loss + gain))).tolist()
        found = flips(base, candidate)
        hits += found["low"] <= gain - loss <= found["high"]
    assert 0.93 <= hits / trials <= 0.99


def test_holm_by_hand() -> None:
    """.01 <= .05 / 4, .015 <= .05 / 3, .03 > .05 / 2: the rest is not looked at."""
    assert holm([0.03, 0.01, 0.04, 0.015]) == [False, True, False, True]
    assert holm([0.04]) == [True]
    assert holm([]) == []
    assert holm([0.03, 0.04]) == [False, False]


def _rejects(draw: Callable[[int], float], trials: int) -> float:
    return sum(any(holm([draw(4 * i + j) for j in range(4)])) for i in range(trials)) / trials


def test_holm_calls_nothing_too_often() -> None:
    """Of four comparisons without a difference at most one family in twenty has a find."""
    p = torch.rand(8000, generator=torch.Generator().manual_seed(0)).tolist()
    assert _rejects(p.__getitem__, 2000) == pytest.approx(0.05, abs=0.012)
