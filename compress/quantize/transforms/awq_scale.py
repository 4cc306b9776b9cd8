"""AWQ's activation-aware scaling (arXiv 2306.00978, section 3.2).

W, D (out, in); H (in, in); x, s (in,)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from calibration.moments import Tokens
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
        for shared in block.family.inputs:
            if not block.can_fold(shared):
                continue
            readers = [block.weights[name] for name in shared.linears]
            moments = block.moments_of(shared.linears[0])
            s, exponent, ratio = self.search(
                readers, moments.H, moments.magnitude, block.scheme(shared), block.dtype
            )
            block.fold(shared, s)
            block.notes[f"awq_scale.{'+'.join(shared.linears)}"] = {
                "exponent": exponent,
                "error_ratio": ratio,
            }

    def search(
        self,
        readers: list[Tensor],
        H: Tensor | Tokens,
        x: Tensor,
        scheme: Scheme,
        dtype: torch.dtype,
    ) -> tuple[Tensor, float, float]:
        """The scale with the least output error of all readers of an input, each (out, in).

        Returns s, its exponent, and its error as a share of the error without scaling.
        """
        best, errors, rows = torch.ones_like(x), [], sum(map(len, readers))
        for i in range(self.grid):
            s = x.pow(i / self.grid).clamp(min=1e-4)
            s /= (s.max() * s.min()).sqrt()
            errors.append(summed_error(_changes(readers, s, scheme, dtype), H, rows))
            if errors[-1] == min(errors):
                best = s
        exponent = errors.index(min(errors)) / self.grid
        return best, exponent, min(errors) / errors[0] if errors[0] else 1.0


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
