"""One decoder block while it is being quantized: what transforms change and rounding reads.

W (out, in); H (in, in); s (in,)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from calibration.moments import Moments
from compress.errors import UserError
from compress.model.families import Family, Input
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Grid, Scheme, make_grid


@dataclass
class Block:
    """A block handed from transform to transform, then to rounding.

    module: the decoder layer in the model's dtype; its norms and biases change in place
    weights: local name -> float32 (out, in) working copy of each linear that gets quantized
    moments: local name -> moments of that linear's input; empty if no method asked for them
    grids: local name -> grid chosen by a transform; min-max where there is none
    notes: what a method has to tell, for metrics.json
    """

    module: nn.Module
    family: Family
    scheme: Scheme
    dtype: torch.dtype
    weights: dict[str, Tensor]
    moments: dict[str, Moments] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> Any:
        """The norm or linear of this local name."""
        return self.module.get_submodule(name)

    def grid(self, name: str) -> Grid:
        if name in self.grids:
            return self.grids[name]
        return make_grid(self.weights[name], self.scheme, self.dtype)

    def can_fold(self, shared: Input) -> bool:
        """Whether the source's outputs are the readers' inputs one to one.

        They are not where heads share their values (grouped-query attention): there o_proj reads
        more columns than v_proj has rows.
        """
        if shared.source is None:
            return False
        in_features = self.weights[shared.linears[0]].shape[1]
        return bool(self.part(shared.source).weight.shape[0] == in_features)

    def fold(self, shared: Input, s: Tensor) -> None:
        """Multiply the readers' input columns by s > 0 and divide the source's output by it.

        The function of the block stays the same. A norm's weight is rounded to the model's dtype
        when it is stored, so the readers take the ratio that was really stored rather than s.
        Raises UserError if one of them has a grid already.
        """
        assert shared.source is not None
        if chosen := [n for n in (shared.source, *shared.linears) if n in self.grids]:
            raise UserError(
                f"a transform chose the grid of {chosen[0]} and a later one scales it: "
                "list transforms that scale (awq_scale) before those that narrow (awq_clip)"
            )
        source = self.part(shared.source)
        if shared.source in self.weights:
            self.weights[shared.source] /= s.unsqueeze(1)
            divided = [source.bias] if source.bias is not None else []
        else:
            divided = [p for p in (source.weight, getattr(source, "bias", None)) if p is not None]
            before = divided[0].detach().float()
            stored = (before / s).to(self.dtype).float()
            s = torch.where(stored == 0, torch.ones_like(s), before / stored)
        for parameter in divided:
            parameter.data = (parameter.data.float() / s).to(self.dtype)
        for name in shared.linears:
            self.weights[name] *= s
        for moments in {id(m): m for m in map(self.moments.get, shared.linears) if m}.values():
            moments.second /= s.unsqueeze(0) * s.unsqueeze(1)
            moments.magnitude /= s


def output_error(D: Tensor, H: Tensor) -> float:
    """Mean squared output error of a weight change D (out, in) on inputs with second moment H."""
    return float(((D @ H) * D).sum())


class Transform(Protocol):
    """Changes a block without changing its function, or narrows its grids. Needs the moments."""

    def __call__(self, block: Block) -> None: ...


class Rounding(Protocol):
    """Picks the integers of every linear of a block."""

    needs_moments: bool

    def __call__(self, block: Block) -> dict[str, QTensor]: ...
