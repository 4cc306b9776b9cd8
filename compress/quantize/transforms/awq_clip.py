"""AWQ's weight clipping: give up the ends of a group's range where that lowers the output error.

The paper's code searches it after scaling; see ``auto_clip`` there. W (out, in); H (in, in);
D (groups, out, columns); Hg (groups, columns, columns)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from calibration.moments import Tokens
from compress.errors import UserError
from compress.quantize.block import Block, group_moments
from compress.quantize.scheme import Grid, Scheme, fake_quantize, make_grid

# Rows handled at a time: keeps the temporaries of a wide layer small.
ROWS = 2048


@dataclass(frozen=True)
class AwqClip:
    """Search the range of every group separately. The linears before the softmax are left out.

    steps: ranges tried, absmax * (1 - i / (2 * steps)) for i in 0 .. steps - 1
    """

    steps: int = 10

    grouped_integers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(
                f"transforms.awq_clip.steps={self.steps} is not allowed: choose 1 or more"
            )

    def __call__(self, block: Block) -> None:
        for name, W in block.weights.items():
            if name not in block.family.attention_logits:
                H = block.moments_of(name).H
                block.grids[name] = self.search(W, H, block.schemes[name], block.dtype)

    def search(self, W: Tensor, H: Tensor | Tokens, scheme: Scheme, dtype: torch.dtype) -> Grid:
        """The grid of each group whose own output error is least; groups are taken as independent."""
        Hg = group_moments(H, scheme.columns_per_group(W.shape[1]))
        bounds = [self._bounds(rows, Hg, scheme, dtype) for rows in W.split(ROWS)]
        return make_grid(W, scheme, dtype, torch.cat(bounds))

    def _bounds(self, W: Tensor, Hg: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
        absmax = W.unflatten(1, (Hg.shape[0], -1)).abs().amax(-1)
        best, least = absmax, torch.full_like(absmax, torch.inf)
        for i in range(self.steps):
            bound = absmax * (1 - i / (2 * self.steps))
            D = fake_quantize(W, make_grid(W, scheme, dtype, bound), scheme).sub_(W)
            D = D.unflatten(1, (Hg.shape[0], -1)).transpose(0, 1)
            error = (D @ Hg).mul_(D).sum(-1).T
            best = torch.where(error < least, bound, best)
            least = torch.minimum(error, least)
        return best
