"""GPTQ (arXiv 2210.17323, algorithm 1): each column's rounding error is made up for by the columns
that are still free. And GPTAQ (arXiv 2504.02692), which aims at the original model's output.

W (out, in); H, C, U (in, in); Wt, S, Z (in, out), transposed so that a column lies in one piece
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress.errors import UserError
from compress.model.families import Input
from compress.quantize.block import Block
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Grid

log = logging.getLogger(__name__)

# Columns whose updates are kept back and applied to the rest as one product.
COLUMNS = 128


@dataclass(frozen=True)
class Gptq:
    """Columns by descending activation energy; inside a block q, k, v -> o -> gate, up -> down, each
    with inputs from what is quantized before it. Grids are fixed first (a transform's, or min-max),
    so the order of columns leaves no trace in the file.

    damping: share of the mean of H's diagonal that is added to it; raised tenfold, with a warning
        and a count in metrics.json, as often as H still cannot be factored
    """

    damping: float = 0.01

    needs_data: ClassVar[bool] = True
    observes: ClassVar[bool] = True
    needs_original: ClassVar[bool] = False
    grouped_integers: ClassVar[bool] = True
    refines: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise UserError(
                f"rounding.gptq.damping={self.damping} is not allowed: choose a share above 0, to 1"
            )

    def __call__(self, block: Block, start: Mapping[str, QTensor]) -> dict[str, QTensor]:
        return round_in_order(block, self.damping)


@dataclass(frozen=True)
class Gptaq:
    """GPTQ whose target is the original model's output: min |Q X - W X'|, X' the original's inputs.

    When a column is fixed, the columns that are still free make up for its rounding error as in GPTQ,
    and for what its input lost on the way here: W[:, j] (X' - X)[j], by C = E[(X' - X) X^T].

    damping: as in gptq
    correction: share of what the inputs lost that is made up for; 1 as in the paper, while its
        published code takes a quarter
    """

    damping: float = 0.01
    correction: float = 1.0

    needs_data: ClassVar[bool] = True
    observes: ClassVar[bool] = True
    needs_original: ClassVar[bool] = True
    grouped_integers: ClassVar[bool] = True
    refines: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise UserError(
                f"rounding.gptaq.damping={self.damping} is not allowed: choose a share above 0, to 1"
            )
        if not 0 <= self.correction <= 1:
            raise UserError(
                f"rounding.gptaq.correction={self.correction} is not allowed: choose 0 to 1"
            )

    def __call__(self, block: Block, start: Mapping[str, QTensor]) -> dict[str, QTensor]:
        block.original = copy.deepcopy(block.module)
        quantized = round_in_order(block, self.damping, self.correction)
        block.original = None
        return quantized


def round_in_order(block: Block, damping: float, correction: float = 0.0) -> dict[str, QTensor]:
    """Quantize the linears of a block in the order in which they run."""
    quantized: dict[str, QTensor] = {}
    for shared in block.family.inputs:
        label = "+".join(shared.linears)
        block.observe(shared)
        moments = block.moments[shared.linears[0]].summed()
        H, dead = isolate_dead(moments.second)
        if dead:
            block.notes[f"dead_columns.{label}"] = dead
        order = H.diagonal().argsort(descending=True, stable=True)
        U, used = factor(H, damping, order)
        del H
        if used > damping:
            block.notes[f"damping_raised.{label}"] = used
            log.warning("%s: damping had to be raised to %g to factor H", label, used)
        # The readers of one input share H: their rows are quantized together.
        W = torch.cat([block.weights[name] for name in shared.linears])
        cross = None if moments.cross is None else correction * moments.cross
        grids = [block.grid(name) for name in shared.linears]
        codes = solve(W, U, _stack(grids), block.scheme(shared).bits, order, cross)
        parts = zip(shared.linears, codes.split(_sizes(block, shared)), grids, strict=True)
        for name, rows, grid in parts:
            q = QTensor(rows.contiguous(), grid.scale, grid.zero, block.schemes[name].bits)
            quantized[name] = q
            block.place(name, q.dequantize(block.dtype))
    return quantized


def _sizes(block: Block, shared: Input) -> list[int]:
    return [block.weights[name].shape[0] for name in shared.linears]


def _stack(grids: list[Grid]) -> Grid:
    zeros = [grid.zero for grid in grids if grid.zero is not None]
    return Grid(torch.cat([grid.scale for grid in grids]), torch.cat(zeros) if zeros else None)


def isolate_dead(H: Tensor) -> tuple[Tensor, int]:
    """H with its dead columns (inputs that were always 0) made independent of the others.

    They are then rounded to nearest: calibration says nothing of them, but other text may use them.
    Returns a copy, or H itself if there are none, and how many there are.
    """
    dead = H.diagonal() == 0
    if not dead.any():
        return H, 0
    H = H.clone()
    H.diagonal()[dead] = H.diagonal().mean() if not dead.all() else 1.0
    return H, int(dead.sum())


def damped_inverse(H: Tensor, damping: float) -> tuple[Tensor, float]:
    """The float64 inverse of H + damping * mean(diag H) * I, and the damping that was needed.

    The damping is raised tenfold until the Cholesky factorisation succeeds. Raises RuntimeError if
    the mean of the diagonal itself is not enough.
    """
    assert damping > 0, "nothing raised tenfold stays nothing"
    mean = H.diagonal().double().mean()
    while True:
        damped = H.to(torch.float64, copy=True)
        damped.diagonal().add_(damping * mean)
        L, failed = torch.linalg.cholesky_ex(damped)
        # With 14,336 inputs each is 1.6 GB, as is what isfinite makes of it.
        del damped
        if not failed and torch.isfinite(L.sum()):
            return torch.cholesky_inverse(L), damping
        if damping >= 1:
            raise RuntimeError("the second moments of a linear cannot be factored")
        damping = min(10 * damping, 1.0)


def factor(H: Tensor, damping: float, order: Tensor) -> tuple[Tensor, float]:
    """U, float64 and upper, with U^T U the inverse of the damped H, columns in this order; and the damping
    that was needed. Two squares of float64 beside H at a time."""
    inverse, used = damped_inverse(H, damping)
    inverse = inverse[order]
    inverse = inverse[:, order]
    return torch.linalg.cholesky(inverse, upper=True), used


def solve(
    W: Tensor,
    U: Tensor,
    grid: Grid,
    bits: int,
    order: Tensor,
    cross: Tensor | None = None,
) -> Tensor:
    """Codes uint8 (out, in) of W, columns taken in this order. U: as ``factor`` gives it.

    The last column's error cannot be made up for; the first one's is spread over all others.
    cross: C (in, in) of inputs that the free columns are to make up for too (GPTAQ).
    """
    out_features, in_features = W.shape
    P = None
    if cross is not None:
        # Row j of P is C[j, free] H[free, free]^-1, free = the columns after j (GPTAQ, eq. 15).
        C = cross[order][:, order].double()
        P = (C @ U.T).triu_(1)
        del C
        P = (P @ U).float()
    U = U.float()
    group = order // (in_features // grid.scale.shape[1])
    Wt = W.T[order].contiguous()
    S = grid.scale.float().T[group].contiguous()
    zero = (
        grid.scale.new_full(grid.scale.shape, 2 ** (bits - 1)) if grid.zero is None else grid.zero
    )
    Z = zero.float().T[group].contiguous()
    codes = torch.empty_like(Wt)
    for start in range(0, in_features, COLUMNS):
        end = min(start + COLUMNS, in_features)
        errors = torch.empty(end - start, out_features, device=W.device)
        for j in range(start, end):
            codes[j] = (Wt[j] / S[j]).add_(Z[j]).round_().clamp_(0, 2**bits - 1)
            error = (Wt[j] - (codes[j] - Z[j]) * S[j]) / U[j, j]
            Wt[j + 1 : end].addr_(U[j, j + 1 : end], error, alpha=-1)
            if P is not None:
                Wt[j + 1 : end].addr_(P[j, j + 1 : end], Wt[j])
            errors[j - start] = error
        Wt[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
        if P is not None:
            # A row of Wt is what it was when its turn came: nothing after it has changed it.
            Wt[end:].addmm_(P[start:end, end:].T, Wt[start:end])
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.to(torch.uint8)
