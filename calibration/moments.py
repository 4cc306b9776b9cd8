"""Second moments of the inputs of linear layers: all that a weight-only search needs to know of the data.

For a linear y = W x and a changed weight W + D, the mean squared output error over the calibration
tokens is exactly tr(D H D^T) with H = mean of x x^T. H does not grow with the number of tokens, so a
search over many candidate weights costs the same for 64 sequences as for 4096.

Of few tokens H is a large square of a small rank, and the same error is |D X^T|^2 / tokens: their X is
kept as it is, which takes less memory and makes a candidate cheaper by in / tokens. What needs H has it made.

X (tokens, in); H, C (in, in); A (tokens, in) with A^T A = H; s (in,)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.processes import ALONE, Team

# Rows of a second moment that are added to at a time.
ROWS = 512


def are_few(tokens: int, inputs: int) -> bool:
    """Whether so many tokens are kept rather than summed up: fewer than half the inputs of their linear.

    A candidate's error costs tokens / in of what it does with H (measured: 0.06 at a sixteenth, 0.26 at a
    quarter, 0.5 at half), and a search's float32 copy of them as much of its memory.
    """
    return 2 * tokens < inputs


@dataclass
class Tokens:
    """H as the tokens that it is the mean of.

    batches: X, and the same tokens in the original model if cross moments are collected; in the dtype in
        which they came, so that nothing is lost
    s: float32 (in,), what their columns are to be multiplied by
    """

    batches: list[tuple[Tensor, Tensor | None]]
    s: Tensor

    def root(self) -> Tensor:
        """A, float32 (tokens, in)."""
        X = torch.cat([X.float() for X, _ in self.batches])
        return X.mul_(self.s / len(X) ** 0.5)


@dataclass
class Moments:
    """Running sums over the tokens that passed a linear's input.

    H: mean of x x^T, either float32 (in, in), which it is once ``mean()`` was called; before, the lower
        triangle of a sum, with blocks of ``ROWS`` on the diagonal. Or the tokens themselves, if they are few
    magnitude: float32 (in,), mean |x| per input column, likewise
    largest: float32 (in,), largest |x| per input column
    above: float32 (in,), share of tokens with |x| >= threshold per input column, a count before
        ``mean()``; None without a threshold
    cross: float32 (in, in), mean of (x' - x) x^T, where x' is the same token's input in the original
        model; None if it was not collected, or the tokens are kept (``summed`` has it then)
    tokens: how many rows were added
    """

    H: Tensor | Tokens
    magnitude: Tensor
    largest: Tensor
    cross: Tensor | None = None
    above: Tensor | None = None
    threshold: float | None = None
    tokens: int = 0

    @classmethod
    def zeros(
        cls,
        in_features: int,
        device: torch.device,
        cross: bool = False,
        threshold: float | None = None,
        tokens: int | None = None,
    ) -> Moments:
        """Moments of nothing yet. tokens: how many will come; they are summed up if that is not known."""
        kept = tokens is not None and are_few(tokens, in_features)
        square = (in_features, in_features)
        magnitude, largest, above = (torch.zeros(in_features, device=device) for _ in range(3))
        return cls(
            Tokens([], torch.ones_like(magnitude)) if kept else torch.zeros(square, device=device),
            magnitude,
            largest,
            torch.zeros(square, device=device) if cross and not kept else None,
            None if threshold is None else above,
            threshold,
        )

    @property
    def second(self) -> Tensor:
        """H as float32 (in, in), made anew each time if the tokens are kept."""
        H = self.summed().H
        assert isinstance(H, Tensor)
        return H

    def summed(self) -> Moments:
        """The same with squares, as if the tokens had been summed up when they came."""
        if not isinstance(self.H, Tokens):
            return self
        cross = self.H.batches[0][1] is not None
        sums = Moments.zeros(len(self.magnitude), self.magnitude.device, cross)
        for X, original in self.H.batches:
            sums.add(X, original)
        sums = sums.mean()
        sums.scale(self.H.s)
        return replace(self, H=sums.H, cross=sums.cross)

    def add(self, X: Tensor, original: Tensor | None = None) -> None:
        """Add tokens X (..., in), and with them their inputs in the original model, same shape."""
        X = X.flatten(0, -2)
        original = None if original is None else original.flatten(0, -2)
        if isinstance(self.H, Tokens):
            # Copies: what passes through a block is not ours.
            self.H.batches.append((X.clone(), None if original is None else original.clone()))
        else:
            self._add_products(self.H, X, original)
        size = X.abs()
        self.magnitude += size.sum(0, dtype=torch.float32)
        peaks = size.amax(0).float()
        self.largest = torch.maximum(self.largest, peaks)
        if self.above is not None:
            assert self.threshold is not None
            # Most columns have none: counting is left to those that do.
            columns = (peaks >= self.threshold).nonzero().squeeze(1)
            self.above[columns] += (size[:, columns] >= self.threshold).sum(0)
        self.tokens += X.shape[0]

    def _add_products(self, second: Tensor, X: Tensor, original: Tensor | None) -> None:
        with exact_products(X.dtype):
            Xf = X.float()
            # Symmetric: the lower triangle is enough until the mean is taken.
            for start in range(0, X.shape[1], ROWS):
                rows = slice(start, start + ROWS)
                second[rows, : rows.stop].addmm_(Xf[:, rows].T, Xf[:, : rows.stop])
            if self.cross is not None:
                assert original is not None
                self.cross.addmm_(original.float().T, Xf)

    def together(self, team: Team) -> None:
        """Make these the sums over the tokens of all processes, or their tokens in order."""
        if team.count == 1:
            return
        if isinstance(self.H, Tokens):
            batches, self.tokens = _gathered(self.H.batches, team), 0
            self.H.batches = []
            for sums in (self.magnitude, self.above):
                if sums is not None:
                    sums.zero_()
            # As one process does, in the same order: the same bits.
            for X, original in batches:
                self.add(X, original)
            return
        team.sum(self.H)
        for sums in (self.cross, self.magnitude, self.above):
            if sums is not None:
                team.sum(sums)
        team.largest(self.largest)
        self.tokens = sum(team.exchange(self.tokens))

    def mean(self) -> Moments:
        """The means over all tokens, in the memory of the sums, which are used up: with 14,336 inputs a
        square is 0.8 GB. Of no tokens they are 0. Raises UserError if a sum is not finite."""
        if not self.tokens:
            return self
        if isinstance(self.H, Tokens):
            # The diagonal: no other sum is larger.
            _check_finite(X.float().square().sum(0) for X, _ in self.H.batches)
        else:
            _check_finite(self.H.split(ROWS))
            self._average(self.H)
        return replace(
            self,
            magnitude=self.magnitude / self.tokens,
            above=None if self.above is None else self.above / self.tokens,
        )

    def _average(self, second: Tensor) -> None:
        for start in range(0, len(second), ROWS):
            rows = slice(start, start + ROWS)
            block = second[rows, rows].tril()
            second[rows, rows] = block + block.tril(-1).T
            second[rows, rows.stop :] = second[rows.stop :, rows].T
        if self.cross is not None:
            self.cross.sub_(second).div_(self.tokens)
        second /= self.tokens

    def scale(self, s: Tensor) -> None:
        """Make these the moments of x * s. s: (in,)"""
        if isinstance(self.H, Tokens):
            self.H.s = self.H.s * s
        for square in (self.H, self.cross):
            if isinstance(square, Tensor):
                for rows, own in zip(square.split(ROWS), s.split(ROWS), strict=True):
                    rows *= s.unsqueeze(0) * own.unsqueeze(1)
        self.magnitude *= s
        self.largest *= s
        # How often the scaled inputs pass the threshold is not known.
        self.above = None


def _gathered(
    batches: list[tuple[Tensor, Tensor | None]], team: Team
) -> list[tuple[Tensor, Tensor | None]]:
    """The batches of all processes: those that one process alone would have."""
    lengths = [n for own in team.exchange([len(X) for X, _ in batches]) for n in own]
    X = torch.cat(team.gather(torch.cat([X for X, _ in batches]))).split(lengths)
    originals = [original for _, original in batches if original is not None]
    if not originals:
        return [(x, None) for x in X]
    theirs = torch.cat(team.gather(torch.cat(originals))).split(lengths)
    return list(zip(X, theirs, strict=True))


def _check_finite(sums: Iterable[Tensor]) -> None:
    if not all(torch.isfinite(rows).all() for rows in sums):
        raise UserError(
            "the calibration activations are not finite: the model's weights are broken, or float16 "
            "is too narrow for it and the model's dtype should be bfloat16"
        )


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 matmuls use the bf16 (CPU) or tf32 (GPU) units where that loses nothing.

    A product of two bf16 numbers is exact in float32 and the units accumulate in float32, so inputs
    that came from bf16 give the same sums, three to five times faster.
    """
    if dtype != torch.bfloat16:
        yield
        return
    cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set at run time
    cuda = torch.backends.cuda.matmul
    before = cpu.fp32_precision, cuda.fp32_precision
    cpu.fp32_precision, cuda.fp32_precision = "bf16", "tf32"
    try:
        yield
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before


class _Done(Exception):
    """The last input that was asked for has been seen: the rest of the block need not run."""


class Collector:
    """Collects the moments of the inputs of linears while their block runs.

    linears: local name -> module; shared: names that read one tensor (q, k, v ...), which is counted
    once, at the first of them, in the order in which they run. originals: the same linears in a copy
    of the block that keeps its original weights; with it the cross moments are collected too, and
    ``run`` is called with the copy first, for every batch. threshold: counts the larger inputs. tokens: how
    many will come, if that is known, in all processes of the team, which share them. routed: linears that are
    sent some of the tokens, or none.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        shared: Iterable[tuple[str, ...]],
        originals: Mapping[str, nn.Linear] | None = None,
        threshold: float | None = None,
        tokens: int | None = None,
        routed: Collection[str] = (),
        team: Team = ALONE,
    ):
        self._shared, self._team = list(shared), team
        self._routed = set(routed)
        self._linears, self._originals = linears, originals
        self._sums = {
            names: Moments.zeros(
                linears[names[0]].in_features,
                linears[names[0]].weight.device,
                cross=originals is not None,
                threshold=threshold,
                tokens=None if names[0] in self._routed else tokens,
            )
            for names in self._shared
        }
        self._seen: dict[tuple[str, ...], Tensor] = {}

    @contextmanager
    def hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            for names in self._shared:
                last = names is self._shared[-1] and names[0] not in self._routed
                if self._originals is not None:
                    hook = self._hook(names, last, original=True)
                    handle = self._originals[names[0]].register_forward_pre_hook(hook)
                    stack.callback(handle.remove)
                hook = self._hook(names, last, original=False)
                stack.callback(self._linears[names[0]].register_forward_pre_hook(hook).remove)
            yield

    def _hook(self, names: tuple[str, ...], last: bool, original: bool) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            if original:
                self._seen[names] = args[0]
            else:
                self._sums[names].add(args[0], self._seen.pop(names, None))
            if last:
                raise _Done

        return hook

    def run(self, block: nn.Module, X: Tensor, arguments: Mapping[str, Any]) -> None:
        """Run a block on one batch, as far as needed."""
        try:
            block(X, **arguments)
        except _Done:
            return
        if self._shared[-1][0] not in self._routed:
            raise AssertionError("the block did not reach the linears it was asked about")

    def means(self) -> dict[str, Moments]:
        """name -> Moments; names that share an input share the object."""
        found: dict[str, Moments] = {}
        for names, sums in self._sums.items():
            sums.together(self._team)
            found |= dict.fromkeys(names, sums.mean())
        return found
