"""AWQ's activation-aware scaling (arXiv 2306.00978, section 3.2).

W (out, in) all readers of one input, stacked; H (in, in); x, s (in,)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress.errors import UserError
from compress.quantize.block import Block, output_error
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
            W = torch.cat([block.weights[name] for name in shared.linears])
            moments = block.moments_of(shared.linears[0])
            s, exponent, ratio = self.search(
                W, moments.second, moments.magnitude, block.scheme(shared), block.dtype
            )
            block.fold(shared, s)
            block.notes[f"awq_scale.{'+'.join(shared.linears)}"] = {
                "exponent": exponent,
                "error_ratio": ratio,
            }

    def search(
        self, W: Tensor, H: Tensor, x: Tensor, scheme: Scheme, dtype: torch.dtype
    ) -> tuple[Tensor, float, float]:
        """The scale with the least output error.

        Returns s, its exponent, and its error as a share of the error without scaling.
        """
        best, errors = torch.ones_like(x), []
        for i in range(self.grid):
            s = x.pow(i / self.grid).clamp(min=1e-4)
            s /= (s.max() * s.min()).sqrt()
            scaled = W * s
            D = fake_quantize(scaled, make_grid(scaled, scheme, dtype), scheme).div_(s).sub_(W)
            errors.append(output_error(D, H))
            if errors[-1] == min(errors):
                best = s
        exponent = errors.index(min(errors)) / self.grid
        return best, exponent, min(errors) / errors[0] if errors[0] else 1.0
