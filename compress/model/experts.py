"""Experts as linears of their own: what compresses and what stores sees each by its name in checkpoints.

transformers holds the weights of a block's experts in two tensors, (expert, 2 * intermediate, hidden) and
(expert, hidden, intermediate), and reads checkpoints that name every linear of every expert; engines read
these names too.

x (tokens, hidden); index int64 and weights (tokens, experts a token is sent to)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.model.families import Experts


class Blank(nn.Linear):
    """A linear whose weights come later: of thousands, making up the first ones takes most of the time."""

    def reset_parameters(self) -> None:
        pass


class Expert(nn.Module):
    """The gated MLP of one expert, its linears named as in checkpoints and without weights."""

    def __init__(self, names: Experts, sizes: tuple[int, int], bias: bool, dtype: torch.dtype):
        super().__init__()
        hidden, inner = sizes
        self.names = names
        shapes = {
            names.gate: (hidden, inner),
            names.up: (hidden, inner),
            names.down: (inner, hidden),
        }
        for name, (columns, rows) in shapes.items():
            self.add_module(name, Blank(columns, rows, bias, device="meta", dtype=dtype))

    def forward(self, x: Tensor, gated: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        gate, up = (self.get_submodule(name)(x) for name in (self.names.gate, self.names.up))
        return self.get_submodule(self.names.down)(gated(gate, up))


class ExpertList(nn.ModuleList):
    """Stands in for transformers' module of all experts and is called as it is.

    every: all tokens run through all experts, so that what watches their linears sees all; the result is
        that of the experts that tokens were sent to, as ever
    """

    def __init__(self, packed: Any, names: Experts):
        down = packed.down_proj
        count, (a, b) = down.shape[0], down.shape[1:]
        sizes = (b, a) if names.packed else (a, b)
        bias = hasattr(packed, "down_proj_bias")
        super().__init__(Expert(names, sizes, bias, down.dtype) for _ in range(count))
        self.every = False
        # What it knows beside weights, not as a module of this one.
        packed._parameters.clear()
        object.__setattr__(self, "_packed", packed)
        self._in_turn = names.packed

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        packed: Any = self._packed
        if self._in_turn:
            rows = torch.stack((gate, up), -1).flatten(-2)
            return packed._apply_gate(rows)
        return packed.act_fn(gate) * up

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for number in range(len(self)):
            expert = self[number]
            places, ranks = torch.where(index == number)
            if self.every:
                y = expert(x, self.gated)[places]
            elif len(places):
                y = expert(x[places], self.gated)
            else:
                continue
            result.index_add_(0, places, (y * weights[places, ranks, None]).to(x.dtype))
        return result


@contextmanager
def every_token(module: nn.Module, asked: bool) -> Iterator[None]:
    """Within it, if that is asked for, all tokens run through all experts of a module."""
    lists = [part for part in module.modules() if isinstance(part, ExpertList)]
    for part in lists:
        part.every = asked
    try:
        yield
    finally:
        for part in lists:
            part.every = False


def unpack(layer: nn.Module, names: Experts) -> None:
    """Give the experts of a decoder layer, if it has any, linears and the names of checkpoints."""
    owner = dict(layer.named_modules()).get(names.module)
    packed = getattr(owner, "experts", None)
    if owner is None or packed is None or not hasattr(packed, "gate_up_proj"):
        return
    owner.experts = ExpertList(packed, names)
    if names.module != names.mlp:
        delattr(layer, names.module)
        layer.add_module(names.mlp, owner)
        # The layer calls it by the name it had: an attribute beside its modules.
        object.__setattr__(layer, names.module, owner)
