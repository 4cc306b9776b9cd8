"""Second moments of the inputs of linear layers: all that a weight-only search needs to know of the data.

For a linear y = W x and a changed weight W + D, the mean squared output error over the calibration
tokens is exactly tr(D H D^T) with H = mean of x x^T. H does not grow with the number of tokens, so a
search over many candidate weights costs the same for 64 sequences as for 4096.

X (tokens, in); H, C (in, in)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError

# Rows of a second moment that are added to at a time.
ROWS = 512


@dataclass
class Moments:
    """Running sums over the tokens that passed a linear's input.

    second: float32 (in, in), mean of x x^T once ``mean()`` was called; before, the lower triangle of a
        sum, with blocks of ``ROWS`` on the diagonal
    magnitude: float32 (in,), mean |x| per input column, likewise
    largest: float32 (in,), largest |x| per input column
    above: float32 (in,), share of tokens with |x| >= threshold per input column, a count before
        ``mean()``; None without a threshold
    cross: float32 (in, in), mean of (x' - x) x^T, where x' is the same token's input in the original
        model; None if it was not collected
    tokens: how many rows were added
    """

    second: Tensor
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
    ) -> Moments:
        square = torch.zeros(in_features, in_features, device=device)
        magnitude, largest, above = (torch.zeros(in_features, device=device) for _ in range(3))
        return cls(
            square,
            magnitude,
            largest,
            torch.zeros_like(square) if cross else None,
            None if threshold is None else above,
            threshold,
        )

    def add(self, X: Tensor, original: Tensor | None = None) -> None:
        """Add tokens X (..., in), and with them their inputs in the original model, same shape."""
        X = X.flatten(0, -2)
        with exact_products(X.dtype):
            Xf = X.float()
            # Symmetric: the lower triangle is enough until the mean is taken.
            for start in range(0, X.shape[1], ROWS):
                rows = slice(start, start + ROWS)
                self.second[rows, : rows.stop].addmm_(Xf[:, rows].T, Xf[:, : rows.stop])
            if self.cross is not None:
                assert original is not None
                self.cross.addmm_(original.flatten(0, -2).float().T, Xf)
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

    def mean(self) -> Moments:
        """The means over all tokens, in the memory of the sums, which are used up: with 14,336 inputs a
        square is 0.8 GB. Raises UserError if a sum is not finite."""
        second = self.second
        if not all(torch.isfinite(rows).all() for rows in second.split(ROWS)):
            raise UserError(
                "the calibration activations are not finite: the model's weights are broken, or float16 "
                "is too narrow for it and the model's dtype should be bfloat16"
            )
        for start in range(0, len(second), ROWS):
            rows = slice(start, start + ROWS)
            block = second[rows, rows].tril()
            second[rows, rows] = block + block.tril(-1).T
            second[rows, rows.stop :] = second[rows.stop :, rows].T
        if self.cross is not None:
            self.cross.sub_(second).div_(self.tokens)
        second /= self.tokens
        return replace(
            self,
            magnitude=self.magnitude / self.tokens,
            above=None if self.above is None else self.above / self.tokens,
        )

    def scale(self, s: Tensor) -> None:
        """Make these the moments of x * s. s: (in,)"""
        for square in (self.second, self.cross):
            if square is not None:
                for rows, own in zip(square.split(ROWS), s.split(ROWS), strict=True):
                    rows *= s.unsqueeze(0) * own.unsqueeze(1)
        self.magnitude *= s
        self.largest *= s
        # How often the scaled inputs pass the threshold is not known.
        self.above = None


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
    ``run`` is called with the copy first, for every batch. threshold: counts the larger inputs.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        shared: Iterable[tuple[str, ...]],
        originals: Mapping[str, nn.Linear] | None = None,
        threshold: float | None = None,
    ):
        self._shared = list(shared)
        self._linears, self._originals = linears, originals
        self._sums = {
            names: Moments.zeros(
                linears[names[0]].in_features,
                linears[names[0]].weight.device,
                cross=originals is not None,
                threshold=threshold,
            )
            for names in self._shared
        }
        self._seen: dict[tuple[str, ...], Tensor] = {}

    @contextmanager
    def hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            for names in self._shared:
                last = names is self._shared[-1]
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
        raise AssertionError("the block did not reach the linears it was asked about")

    def means(self) -> dict[str, Moments]:
        """name -> Moments; names that share an input share the object."""
        found: dict[str, Moments] = {}
        for names, sums in self._sums.items():
            found |= dict.fromkeys(names, sums.mean())
        return found
