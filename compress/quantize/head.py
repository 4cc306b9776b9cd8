"""Embedding and language-model head as integers: rows of the vocabulary, groups along hidden.

No calibration input reaches the embedding, so a grid is judged by the error of the weights alone.
W (vocabulary, hidden); a grid (vocabulary, groups)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Grid, Scheme, fake_quantize, make_grid, to_codes

# Rows handled at a time: a vocabulary of 150,000 by 8,192 in float32 is 5 GB.
ROWS = 4096
# Tried ranges, as shares of the largest weight of a group.
SHARES = tuple(1 - 0.04 * i for i in range(11))


def quantize_rows(
    name: str, W: Tensor, scheme: Scheme, device: torch.device
) -> tuple[QTensor, dict[str, Any]]:
    """Round W to the nearest values of the grids with the least squared error of the weights.

    W: (vocabulary, hidden) in the dtype of the checkpoint, which is also that of the scales.
    Returns the QTensor on the CPU, and its bits per weight and relative error |Wq - W|^2 / |W|^2.
    Raises UserError if W holds NaN or Inf.
    """
    parts, lost, energy = [], 0.0, 0.0
    for rows in W.split(ROWS):
        X = rows.to(device=device, dtype=torch.float32)
        if not torch.isfinite(X).all():
            raise UserError(f"tensor {name}.weight holds NaN or Inf")
        q = to_codes(X, searched_grid(X, scheme, W.dtype), scheme)
        lost += float((q.dequantize(W.dtype).float() - X).square().sum())
        energy += float(X.square().sum())
        zero = None if q.zero is None else q.zero.cpu()
        parts.append(QTensor(q.codes.cpu(), q.scale.cpu(), zero, q.bits))
    zeros = [q.zero for q in parts if q.zero is not None]
    whole = QTensor(
        torch.cat([q.codes for q in parts]),
        torch.cat([q.scale for q in parts]),
        torch.cat(zeros) if zeros else None,
        scheme.bits,
    )
    relative = lost / energy if energy else 0.0
    return whole, {"bits_per_weight": whole.bits_per_weight, "relative_error": relative}


def searched_grid(W: Tensor, scheme: Scheme, dtype: torch.dtype) -> Grid:
    """The grid of each group, of those with a range of SHARES, that gives back W best.

    W: float32 (rows, hidden). The min-max grid is among them.
    """
    groups = W.unflatten(1, (-1, scheme.columns_per_group(W.shape[1])))
    absmax = groups.abs().amax(-1)
    best = make_grid(W, scheme, dtype)
    least = _error(W, best, scheme)
    for share in SHARES[1:]:
        grid = make_grid(W, scheme, dtype, bound=share * absmax)
        error = _error(W, grid, scheme)
        better = error < least
        least = torch.where(better, error, least)
        zero = None
        if best.zero is not None and grid.zero is not None:
            zero = torch.where(better, grid.zero, best.zero)
        best = Grid(torch.where(better, grid.scale, best.scale), zero)
    return best


def _error(W: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """Squared error of every group, (rows, groups)."""
    D = fake_quantize(W, grid, scheme).sub_(W)
    return D.unflatten(1, (grid.scale.shape[1], -1)).square().sum(-1)
