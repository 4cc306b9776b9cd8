"""AWQ's activation-aware scaling (arXiv 2306.00978, section 3.2).

W, D (out, in); H (in, in); x, s (in,)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from calibration.moments import Moments
from compress.errors import UserError
from compress.quantize.block import PART, PIECE, Block, row_parts, summed_error
from compress.quantize.scheme import Scheme, fake_quantize, make_grid


@dataclass(frozen=True)
class AwqScale:
    """Scale up the input columns that carry large activations, so that they round more finely.

    grid: exponents tried, s = mean|x| ^ (i / grid) for i in 0 .. grid - 1 (equation 5)
    """

    grid: int = 20

    grouped_integers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise UserError(
                f"transforms.awq_scale.grid={self.grid} is not allowed: choose 1 or more"
            )

    def __call__(self, block: Block) -> None:
        for inputs in block.foldable():
            readers = [
                Readers(
                    [block.weights[name] for name in shared.linears],
                    block.moments_of(shared.linears[0]),
                    block.scheme(shared),
                )
                for shared in inputs
            ]
            s, exponent, ratio = self.search(readers, block.dtype)
            block.fold(inputs, s)
            # Of many experts' inputs, by the first.
            block.notes[f"awq_scale.{'+'.join(inputs[0].linears)}"] = {
                "exponent": exponent,
                "error_ratio": ratio,
            }

    def search(self, inputs: Sequence[Readers], dtype: torch.dtype) -> tuple[Tensor, float, float]:
        """The scale with the least output error of all readers of the inputs that one source makes, each
        token counted as often as it is read.

        Returns s, its exponent, and its error as a share of the error without scaling.
        """
        tokens = sum(readers.moments.tokens for readers in inputs)
        shares = [readers.moments.tokens / tokens if tokens else 0.0 for readers in inputs]
        pairs = list(zip(inputs, shares, strict=True))
        x = sum(
            (share * readers.moments.magnitude for readers, share in pairs),
            torch.zeros_like(inputs[0].moments.magnitude),
        )
        best, errors = torch.ones_like(x), []
        for i in range(self.grid):
            s = x.pow(i / self.grid).clamp(min=1e-4)
            s /= (s.max() * s.min()).sqrt()
            errors.append(sum(share * readers.error(s, dtype) for readers, share in pairs))
            if errors[-1] == min(errors):
                best = s
        exponent = errors.index(min(errors)) / self.grid
        return best, exponent, min(errors) / errors[0] if errors[0] else 1.0


@dataclass(frozen=True)
class Readers:
    """The linears that read an input, (out, in) each, and its moments."""

    weights: list[Tensor]
    moments: Moments
    scheme: Scheme

    def error(self, s: Tensor, dtype: torch.dtype) -> float:
        """Their output error if their columns are scaled by s."""
        rows = sum(map(len, self.weights))
        return summed_error(_changes(self.weights, s, self.scheme, dtype), self.moments.H, rows)


def _changes(
    readers: list[Tensor], s: Tensor, scheme: Scheme, dtype: torch.dtype
) -> Iterator[Tensor]:
    """How rounding changes the weights if their columns are scaled by s, some rows at a time."""
    if not scheme.grouped_integers:
        # Rows share numbers: a scale, or the divisor of all scales.
        W = torch.cat(readers)
        yield _change(W, s, scheme, dtype)
        return
    for W in readers:
        for part in row_parts(W):
            D = torch.empty_like(part)
            # On a GPU a part is one piece: there are no caches to keep to, and each call costs.
            size = PIECE if part.device.type == "cpu" else PART
            for rows, change in zip(row_parts(part, size), row_parts(D, size), strict=True):
                change.copy_(_change(rows, s, scheme, dtype))
            yield D


def _change(W: Tensor, s: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    scaled = W * s
    grid = make_grid(scaled, scheme, dtype)
    return fake_quantize(scaled, grid, scheme).div_(s).sub_(W)
