"""SignRound (arXiv 2309.05516): rounding offsets and clipping learned by signed gradient steps.

W, V, levels and their gradient G (out, groups, columns); scale, zero and range factors (out, groups, 1)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress.errors import UserError
from compress.quantize.block import Block
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Grid, Scheme

# How often, and on how many sequences, the loss is looked at that decides which step is kept.
CHECKS = 3
CHECKED = 8
# How far an end of a group's range may move, as shares of where it starts.
LEAST, MOST = 0.05, 1.25


@dataclass(frozen=True)
class Learned:
    """Learn what to round up and down, and how far to clip, for the block's output error.

    Inputs come from the compressed prefix, targets from the original model. Starts from the integers
    of the method before it, or from nearest. The best of ``CHECKS`` looks at a fixed share of the
    data is kept, the start included.

    iters: steps; the step size is 1 / iters, falling to 0
    batch: sequences a step
    seed: of the order of the sequences
    """

    iters: int = 100
    batch: int = 2
    seed: int = 0

    needs_data: ClassVar[bool] = True
    observes: ClassVar[bool] = False
    needs_original: ClassVar[bool] = True
    grouped_integers: ClassVar[bool] = True
    refines: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("iters", "batch"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"rounding.learned.{name}={getattr(self, name)} is not allowed: choose 1 or more"
                )

    def __call__(self, block: Block, start: Mapping[str, QTensor]) -> dict[str, QTensor]:
        weights = {
            name: LearnedWeight(
                W, start.get(name) or block.grid(name), block.schemes[name], block.dtype
            )
            for name, W in block.weights.items()
        }
        loss = BlockLoss(block, self.batch, self.seed)
        _place(block, weights)
        first = least = loss.check()
        best = {name: weight.state() for name, weight in weights.items()}
        for step in range(self.iters):
            gradients = loss.gradients(list(weights))
            rate = (1 - step / self.iters) / self.iters
            for name, weight in weights.items():
                weight.step(gradients[name], rate)
            _place(block, weights)
            if (step + 1) * CHECKS % self.iters < CHECKS and (found := loss.check()) < least:
                least = found
                best = {name: weight.state() for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.restore(best[name])
        _place(block, weights)
        block.notes["learned"] = {"error_ratio": least / first if first else 1.0}
        return {name: weight.quantized() for name, weight in weights.items()}


def _place(block: Block, weights: Mapping[str, LearnedWeight]) -> None:
    for name, weight in weights.items():
        block.place(name, weight.rounded())


class BlockLoss:
    """How far a block's outputs are from the original's, on mini-batches of the calibration tokens.

    The squared error of a token counts relative to its size: what follows is a norm, which divides by
    it, and a few tokens with huge activations would drown the others.
    """

    def __init__(self, block: Block, batch: int, seed: int = 0):
        assert block.activations is not None
        assert block.activations.targets is not None
        self.block, self.data, self.targets = block, block.activations, block.activations.targets
        # Of all processes: each looks at the same sequences, wherever their states are kept.
        self.count = self.data.states.count(self.targets)
        self.batch = min(batch, self.count)
        self._generator = torch.Generator().manual_seed(seed)
        self._waiting = torch.empty(0, dtype=torch.int64)

    def __call__(self, rows: Tensor) -> Tensor:
        """Mean relative squared error of these sequences."""
        states = self.data.states
        X = states.pick(self.data.inputs, rows)
        Y = self.block.module(X, **self.data.arguments).float()
        T = states.pick(self.targets, rows).float()
        return ((Y - T).pow(2).mean(-1) / T.pow(2).mean(-1).clamp(min=1e-6)).mean()

    def check(self) -> float:
        """The loss of the share of the data that decides which step is kept: always the same."""
        rows = torch.arange(min(CHECKED, self.count)).split(self.batch)
        with torch.no_grad():
            return sum(float(self(r)) * len(r) for r in rows)

    def gradients(self, names: list[str]) -> dict[str, Tensor]:
        """Gradients of the next mini-batch's loss by the weights in the module."""
        if len(self._waiting) < self.batch:
            self._waiting = torch.randperm(self.count, generator=self._generator)
        rows, self._waiting = self._waiting[: self.batch], self._waiting[self.batch :]
        parameters = [self.block.part(name).weight for name in names]
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            found = torch.autograd.grad(self(rows), parameters)
        for parameter in parameters:
            parameter.requires_grad_(False)
        return dict(zip(names, found, strict=True))


class LearnedWeight:
    """One linear's weight with its rounding offsets V and the two range factors of every group.

    q = round(W / scale + zero + V) clamped; the range of a group is [low * factor, high * factor],
    from which scale and zero follow. Gradients pass rounding straight through.
    """

    def __init__(
        self,
        W: Tensor,
        start: QTensor | Grid,
        scheme: Scheme,
        dtype: torch.dtype,
    ):
        self.dtype, self.bits, self.max_code = dtype, scheme.bits, scheme.max_code
        self.symmetric = start.zero is None
        scale = start.scale.float().unsqueeze(-1)
        zero = (
            float(2 ** (self.bits - 1)) if start.zero is None else start.zero.float().unsqueeze(-1)
        )
        self.low, self.high = -zero * scale, (self.max_code - zero) * scale
        self.W = W.unflatten(1, (start.scale.shape[1], -1))
        if isinstance(start, QTensor):
            self.W = _inside(
                self.W, start.codes.unflatten(1, self.W.shape[1:]), scale, zero, self.max_code
            )
        self.V = torch.zeros_like(self.W)
        self.low_factor, self.high_factor = torch.ones_like(scale), torch.ones_like(scale)
        self._grid()

    def _grid(self) -> None:
        """scale, rounded to how it is stored, and zero from the range factors."""
        low, high = self.low * self.low_factor, self.high * self.high_factor
        self.scale = ((high - low) / self.max_code).to(self.dtype).float()
        if self.symmetric:
            self.zero = torch.full_like(self.scale, 2 ** (self.bits - 1))
        else:
            self.zero = (-low / self.scale).round_().clamp_(0, self.max_code)

    def _levels(self) -> tuple[Tensor, Tensor]:
        """code - zero of every weight after the clamp, and where the clamp changed nothing."""
        unclamped = torch.addcdiv(self.V, self.W, self.scale).add_(self.zero).round_()
        q = unclamped.clamp(0, self.max_code)
        inside = q == unclamped
        return q.sub_(self.zero), inside

    def rounded(self) -> Tensor:
        """The weight as it comes back from its codes, (out, in) in the model's dtype."""
        self._last = self._levels()
        return (self._last[0] * self.scale).flatten(1).to(self.dtype)

    def step(self, gradient: Tensor, rate: float) -> None:
        """One signed step against the gradient (out, in) of the loss by the last ``rounded()``."""
        levels, inside = self._last
        G = gradient.unflatten(1, self.W.shape[1:]).float()
        G_inside = G * inside
        # d rounded / d scale, with rounding passed straight through (LSQ, arXiv 1902.08153, eq. 3).
        by_scale = _sums(levels, G).sub_(_sums(self.W, G_inside).div_(self.scale))
        outside = G.sum(-1, keepdim=True) - G_inside.sum(-1, keepdim=True)
        self.V.sub_(G_inside.sign_(), alpha=rate).clamp_(-0.5, 0.5)
        if self.symmetric:
            self.high_factor.sub_(by_scale.sign_(), alpha=rate).clamp_(LEAST, MOST)
            self.low_factor.copy_(self.high_factor)
        else:
            by_zero = -outside * self.scale
            by_low = -self.low / self.max_code * by_scale
            by_low -= (
                self.low * self.high * self.high_factor / (self.max_code * self.scale**2) * by_zero
            )
            by_high = self.high / self.max_code * by_scale
            by_high += (
                self.low * self.low_factor * self.high / (self.max_code * self.scale**2) * by_zero
            )
            self.low_factor.sub_(by_low.sign_(), alpha=rate).clamp_(LEAST, MOST)
            self.high_factor.sub_(by_high.sign_(), alpha=rate).clamp_(LEAST, MOST)
        self._grid()

    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.V.clone(), self.low_factor.clone(), self.high_factor.clone()

    def restore(self, state: tuple[Tensor, Tensor, Tensor]) -> None:
        self.V, self.low_factor, self.high_factor = state
        self._grid()

    def quantized(self) -> QTensor:
        levels, _ = self._levels()
        codes = levels.add_(self.zero).flatten(1).to(torch.uint8)
        zero = None if self.symmetric else self.zero.squeeze(-1).to(torch.uint8)
        return QTensor(codes, self.scale.squeeze(-1).to(self.dtype), zero, self.bits)


def _sums(A: Tensor, B: Tensor) -> Tensor:
    """The sum of A * B over the columns of every group, (out, groups, 1)."""
    return torch.linalg.vecdot(A, B).unsqueeze(-1)


def _inside(W: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | float, max_code: int) -> Tensor:
    """W moved as little as needed to round to ``codes``; what lies beyond the range stays there."""
    low = torch.where(codes == 0, -torch.inf, codes.float() - 0.49)
    high = torch.where(codes == max_code, torch.inf, codes.float() + 0.49)
    return ((W / scale + zero).clamp(low, high) - zero) * scale
