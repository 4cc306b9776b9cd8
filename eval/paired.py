"""Two models on the same items: is there a difference, and how large is it.

Per-token figures of a text (a loss against the original's, a divergence) depend on their neighbours, so
intervals come from a block bootstrap: the windows are cut into blocks about as long as the dependence
reaches (Politis and White, Econometric Reviews 23, 2004, corrected by Patton, Politis and White, 28, 2009),
blocks are drawn with replacement, and the mean is studentized by the spread of the drawn blocks
(bootstrap-t, Hall, The Bootstrap and Edgeworth Expansion, 1992), which keeps to its nominal rate for skewed
figures such as divergences. What they cover is other text of the same documents' kind and mix.

Questions are independent of each other: McNemar's exact test on those that one model answers and the other
does not, and an interval of the difference by Agresti and Min (Statistics in Medicine 24, 2005).

per-token figures: a list of tensors (n,), one a window; b: tokens a block; R: resamples
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.stats import binomtest, norm
from torch import Tensor

LEVEL = 0.95
# The least p-value is 2 / (RESAMPLES + 1), which is small enough for ``holm`` of fifty.
RESAMPLES = 2000
# Fewer blocks say nothing of their spread.
FEWEST = 10
# Shorter blocks gain nothing: independent tokens give the same interval in blocks.
SHORTEST = 16
# Of the resamples that are held in memory at a time.
CHUNK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A mean, the ends of its interval, and the two-sided p-value of its being zero, which is below 1 - level
    where the interval is on one side of zero. Ends and p are None of too few tokens, and of a mean that is
    not finite."""

    mean: float
    low: float | None
    high: float | None
    p: float | None

    @property
    def half(self) -> float | None:
        """Half the width: what stands behind ±."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def block_length(figures: Sequence[Tensor]) -> int:
    """Tokens a block: where the bootstrap's variance is best, by the rule of Patton, Politis and White.

    At least SHORTEST, at most a window, or what leaves FEWEST blocks.
    """
    mean = torch.cat(list(figures)).double().mean()
    series = [f.double() - mean for f in figures]
    n, longest = sum(map(len, series)), max(map(len, series))
    most = max(1, min(longest, n // FEWEST))
    room = min(longest - 1, math.ceil(math.sqrt(n)) + max(5, round(math.sqrt(math.log10(n)))))
    R = _autocovariance(series, room)
    if float(R[0]) == 0:
        return min(SHORTEST, most)
    bound = 2 * math.sqrt(math.log10(n) / n)
    run = max(5, round(math.sqrt(math.log10(n))))
    small = (R / R[0]).abs() < bound
    # The first lag after which `run` in a row are nothing but noise.
    cut = next(
        (m for m in range(len(R)) if small[m + 1 : m + 1 + run].all()),
        len(R) - 1,
    )
    M = min(2 * max(cut, 1), len(R) - 1)
    lags = torch.arange(-M, M + 1).abs()
    taper = (2 * (1 - lags / max(M, 1))).clamp(0, 1)
    G = float((taper * lags * R[lags]).sum())
    spread = float((taper * R[lags]).sum())
    best = (1.5 * G**2 / spread**2 * n) ** (1 / 3) if spread > 0 else most
    return max(min(SHORTEST, most), min(round(best), most))


def _autocovariance(series: Sequence[Tensor], room: int) -> Tensor:
    """R(0..room) of centered series, pairs within a window alone."""
    total = torch.zeros(room + 1, dtype=torch.float64)
    for x in series:
        size = 1 << (2 * len(x) - 1).bit_length()
        power = torch.fft.rfft(x, size).abs() ** 2
        found = torch.fft.irfft(power, size)[: min(room + 1, len(x))]
        total[: len(found)] += found
    return total / sum(map(len, series))


def interval(
    figures: Sequence[Tensor],
    *,
    level: float = LEVEL,
    block: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean over all tokens with its interval.

    block: tokens a block; None: as ``block_length`` finds. The resamples are drawn with ``seed``.
    """
    every = torch.cat(list(figures)).double()
    mean = float(every.mean())
    if not math.isfinite(mean):
        return Interval(mean, None, None, None)
    size = block_length(figures) if block is None else block
    blocks = [part for f in figures for part in f.double().split(size)]
    if len(blocks) < FEWEST:
        return Interval(mean, None, None, None)
    sums = torch.stack([part.sum() for part in blocks])
    counts = torch.tensor([len(part) for part in blocks], dtype=torch.float64)
    parts = torch.stack([sums, counts, sums**2, sums * counts, counts**2], dim=1)
    error = float(_error(parts.sum(0), mean))
    if error == 0:
        return Interval(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    drawn = _resampled(parts, resamples, seed)
    means = drawn[:, 0] / drawn[:, 1]
    spread = _error(drawn.T, means)
    # A resample of equal blocks shows no spread, as where few tokens of a share differ: it gets that of the
    # one block that is farthest off.
    least = float((sums - mean * counts).abs().max()) / len(every)
    t = (means - mean) / torch.where(spread > 0, spread, least)
    low, high = torch.quantile(
        t, torch.tensor([(1 + level) / 2, (1 - level) / 2], dtype=t.dtype)
    ).tolist()
    beyond = min(int((t >= mean / error).sum()), int((t <= mean / error).sum()))
    # A mean lies among the figures: a share is at most 1.
    return Interval(
        mean,
        max(mean - low * error, float(every.min())),
        min(mean - high * error, float(every.max())),
        min(1.0, 2 * (beyond + 1) / (resamples + 1)),
    )


def _error(parts: Tensor, mean: Any) -> Tensor:
    """Standard error of a ratio of sums, from the sums over blocks of s, c, s^2, s c, c^2."""
    _, c, ss, sc, cc = parts
    return (ss - 2 * mean * sc + mean**2 * cc).clamp_min(0).sqrt() / c


def _resampled(parts: Tensor, resamples: int, seed: int) -> Tensor:
    """Sums over blocks drawn with replacement: (resamples, columns of parts)."""
    generator = torch.Generator().manual_seed(seed)
    step = max(1, CHUNK // len(parts))
    drawn = []
    for start in range(0, resamples, step):
        size = (min(step, resamples - start), len(parts))
        chosen = torch.randint(len(parts), size, generator=generator)
        times = torch.zeros(size, dtype=torch.float64)
        times.scatter_add_(1, chosen, torch.ones(1, dtype=torch.float64).expand(size))
        drawn.append(times @ parts)
    return torch.cat(drawn)


def paired(
    nll: Sequence[Tensor], base_nll: Sequence[Tensor], kl: Sequence[Tensor], top1: Sequence[Tensor]
) -> dict[str, Any]:
    """A candidate against its original on the same tokens.

    nll, base_nll: negative log-probability of every token by either; kl: of the original to the candidate;
    top1: 1 where both prefer the same token. Returns intervals of nll (candidate - original, nats per
    token, positive is worse), kl and top1 with their level, and the tokens a block of the difference.
    """
    change = [ours.double() - theirs.double() for ours, theirs in zip(nll, base_nll, strict=True)]
    block = block_length(change)
    return {
        "level": LEVEL,
        "block": block,
        "nll": asdict(interval(change, block=block)),
        "kl": asdict(interval(kl)),
        "top1": asdict(interval(top1)),
    }


@dataclass(frozen=True)
class Difference:
    """Two candidates of one original on the same tokens, the second minus the first: intervals of the
    negative log-probability and of the divergence from the original, nats per token."""

    nll: Interval
    kl: Interval

    @property
    def equal(self) -> bool:
        """Neither differs measurably: no p-value below half of 1 - LEVEL (there are two)."""
        found = [self.nll.p, self.kl.p]
        return all(p is not None and p > (1 - LEVEL) / len(found) for p in found)


def difference(
    first: dict[str, Sequence[Tensor]], second: dict[str, Sequence[Tensor]]
) -> Difference:
    """Compare two candidates by their per-token figures ``nll`` and ``kl``.

    Raises ValueError if they are not of the same tokens.
    """
    change = {}
    for key in ("nll", "kl"):
        if [len(f) for f in first[key]] != [len(f) for f in second[key]]:
            raise ValueError("figures of two candidates are not of the same tokens")
        pairs = zip(first[key], second[key], strict=True)
        change[key] = interval([b.double() - a.double() for a, b in pairs])
    return Difference(**change)


def flips(base: Sequence[bool], candidate: Sequence[bool]) -> dict[str, Any]:
    """The same questions answered by an original and a candidate: right or not, in the same order.

    Returns gained and lost (questions that the candidate alone, the original alone answers right), the
    difference of the shares with its interval at LEVEL, and McNemar's exact p-value.
    """
    pairs = list(zip(base, candidate, strict=True))
    n = len(pairs)
    gained = sum(ours and not theirs for theirs, ours in pairs)
    lost = sum(theirs and not ours for theirs, ours in pairs)
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    # Agresti and Min: half a question more in each of the four cells.
    shift = (gained - lost) / (n + 2)
    error = math.sqrt((gained + lost + 1) / (n + 2) - shift**2) / math.sqrt(n + 2)
    reach = float(norm.ppf((1 + LEVEL) / 2)) * error
    return {
        "difference": (gained - lost) / n,
        "low": max(-1.0, shift - reach),
        "high": min(1.0, shift + reach),
        "level": LEVEL,
        "gained": gained,
        "lost": lost,
        "p": p,
    }


def holm(p: Sequence[float], alpha: float = 1 - LEVEL) -> list[bool]:
    """Which of several p-values are significant together (Holm, Scandinavian Journal of Statistics 6,
    1979): at most ``alpha`` is the chance that any is called so without a difference."""
    order = sorted(range(len(p)), key=p.__getitem__)
    significant = [False] * len(p)
    for rank, i in enumerate(order):
        if p[i] > alpha / (len(p) - rank):
            break
        significant[i] = True
    return significant
