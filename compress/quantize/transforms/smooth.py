"""SmoothQuant (arXiv 2211.10438, section 4): part of the inputs' spread moves into the weights.

W (out, in) all readers of one input, stacked; x, w, s (in,)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress.errors import UserError
from compress.quantize.block import Block


@dataclass(frozen=True)
class Smooth:
    """Divide every input column by s = max|x|^alpha / max|w|^(1 - alpha), multiply its weights by it.

    alpha: how much of the spread moves, 0 to 1; null takes the family's
    """

    alpha: float | None = None

    grouped_integers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UserError(
                f"transforms.smooth.alpha={self.alpha} is not allowed: choose 0 to 1, or null"
            )

    def __call__(self, block: Block) -> None:
        alpha = block.family.smooth_alpha if self.alpha is None else self.alpha
        for inputs in block.foldable():
            names = [name for shared in inputs for name in shared.linears]
            W = torch.stack([block.weights[name].abs().amax(0) for name in names])
            x = torch.stack([block.moments_of(shared.linears[0]).largest for shared in inputs])
            block.fold(inputs, smoothing(x.amax(0), W.amax(0), alpha))


def smoothing(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """s (equation 4), with its largest and least value around 1; 1 for columns without input or weight.

    x, w: largest |input| and |weight| of each column
    """
    s = x.clamp(min=1e-5).pow(alpha) / w.clamp(min=1e-5).pow(1 - alpha)
    used = (x > 0) & (w > 0)
    if not used.any():
        return torch.ones_like(s)
    s = s / (s[used].max() * s[used].min()).sqrt()
    return torch.where(used, s, torch.ones_like(s))
