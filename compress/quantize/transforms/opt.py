"""Grids by search: the scale and zero of every group with the least output error, no gradients.

The range of a group may shrink at both ends separately, then scale is refitted to the codes by least
squares (the weighted search of GGUF's importance matrices and of AutoRound's OPT-RTN, arXiv
2512.04746). W (out, in); H (in, in); D (groups, out, columns); Hg (groups, columns, columns)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from calibration.moments import Tokens
from compress.errors import UserError
from compress.quantize.block import Block, group_moments
from compress.quantize.scheme import Grid, Scheme

# Rows handled at a time: keeps the temporaries of a wide layer small.
ROWS = 2048


@dataclass(frozen=True)
class Opt:
    """Search the range of every group at both ends, then refit its scale.

    steps: shares tried for each end, 1 - i * shrink / steps for i in 0 .. steps - 1
    shrink: the most that an end is drawn in
    rounds: least-squares refits of the scale to the codes it gives
    """

    steps: int = 8
    shrink: float = 0.6
    rounds: int = 2

    grouped_integers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rounds < 0:
            raise UserError("transforms.opt: steps must be 1 or more and rounds 0 or more")
        if not 0 <= self.shrink < 1:
            raise UserError(
                f"transforms.opt.shrink={self.shrink} is not allowed: choose 0 to below 1"
            )

    def __call__(self, block: Block) -> None:
        block.grids.clear()
        block.search = self.search

    def search(self, W: Tensor, H: Tensor | Tokens, scheme: Scheme, dtype: torch.dtype) -> Grid:
        """The grid of each group whose own output error is least; groups are taken as independent."""
        Hg = group_moments(H, scheme.columns_per_group(W.shape[1]))
        grids = [self._rows(rows, Hg, scheme, dtype) for rows in W.split(ROWS)]
        zero = (
            None if scheme.symmetric else torch.cat([g.zero for g in grids if g.zero is not None])
        )
        return Grid(torch.cat([g.scale for g in grids]), zero)

    def _rows(self, W: Tensor, Hg: Tensor, scheme: Scheme, dtype: torch.dtype) -> Grid:
        groups = W.unflatten(1, (Hg.shape[0], -1))
        low, high = groups.amin(-1, True).clamp(max=0), groups.amax(-1, True).clamp(min=0)
        best = _Best(groups, Hg, scheme, dtype)
        shares = [1 - i * self.shrink / self.steps for i in range(self.steps)]
        if scheme.symmetric:
            span = 2 * torch.maximum(-low, high)
            middle = torch.full_like(span, 2 ** (scheme.bits - 1))
            for share in shares:
                best.offer(span * share / scheme.max_code, middle)
        else:
            # Both ends together, then each by itself: a fifth of the work of all pairs.
            low_share = high_share = torch.ones_like(low)
            for ends in ((1, 1), (1, 0), (0, 1)):
                start = low_share, high_share
                for share in shares:
                    a = start[0] * share if ends[0] else start[0]
                    b = start[1] * share if ends[1] else start[1]
                    scale = _stored((high * b - low * a) / scheme.max_code, dtype)
                    zero = (-low * a / scale).round().clamp(0, scheme.max_code)
                    better = best.offer(scale, zero)
                    low_share = torch.where(better, a, low_share)
                    high_share = torch.where(better, b, high_share)
        for _ in range(self.rounds):
            best.offer(best.refitted(), best.zero)
        zero = None if scheme.symmetric else best.zero.squeeze(-1).to(torch.uint8)
        return Grid(best.scale.squeeze(-1).to(dtype), zero)


class _Best:
    """The best scale and zero so far of every group, (out, groups, 1), by D Hg D^T."""

    def __init__(self, groups: Tensor, Hg: Tensor, scheme: Scheme, dtype: torch.dtype):
        self.groups, self.Hg, self.max_code, self.dtype = groups, Hg, scheme.max_code, dtype
        self.scale = torch.ones_like(groups[..., :1])
        self.zero = torch.zeros_like(self.scale)
        self.error = torch.full_like(self.scale, torch.inf)

    def _levels(self, scale: Tensor, zero: Tensor) -> Tensor:
        """code - zero of every weight, (out, groups, columns)."""
        codes = (self.groups / scale).add_(zero).round_().clamp_(0, self.max_code)
        return codes.sub_(zero)

    def _product(self, A: Tensor, B: Tensor) -> Tensor:
        """A Hg B^T of every group, (out, groups, 1)."""
        projected = torch.bmm(A.transpose(0, 1), self.Hg).transpose(0, 1)
        return (projected * B).sum(-1, keepdim=True)

    def offer(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Keep this grid where it is better. Returns where that is."""
        scale = _stored(scale, self.dtype)
        D = self._levels(scale, zero).mul_(scale).sub_(self.groups)
        error = self._product(D, D)
        better = error < self.error
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)
        self.error = torch.where(better, error, self.error)
        return better

    def refitted(self) -> Tensor:
        """The scale with the least error for the codes of the best grid."""
        levels = self._levels(self.scale, self.zero)
        energy = self._product(levels, levels)
        fitted = self._product(levels, self.groups) / energy
        return torch.where((energy > 0) & (fitted > 0), fitted, self.scale)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as it is stored; a group of zeros has no range, any scale gives zeros back."""
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale.to(dtype).clamp(min=torch.finfo(dtype).tiny).float()
