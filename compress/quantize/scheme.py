"""Weight-only integer schemes: how many bits, which weights share a scale, with or without a zero.

W (out, in); a grid holds scale and zero, each (out, groups).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.quantize.qtensor import QTensor

AUTO_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class Scheme:
    """Which numbers a weight may take.

    bits: 2 to 8
    group_size: input columns that share a scale; "channel" = the whole row; "auto" = the largest of
        128, 64, 32 that divides the inputs of every linear of the model
    symmetric: no zero point; the grid is centred on code ``2**(bits - 1)``
    """

    bits: int = 4
    group_size: int | str = "auto"
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UserError(f"scheme.bits={self.bits} is not allowed: choose 2 to 8")
        size = self.group_size
        if isinstance(size, str) and size not in ("auto", "channel"):
            raise UserError(
                f"scheme.group_size={size} is not allowed: choose a number of columns, auto, or channel"
            )
        if isinstance(size, int) and size < 1:
            raise UserError(f"scheme.group_size={size} is not allowed: choose 1 or more columns")

    @property
    def name(self) -> str:
        size = self.group_size if self.group_size == "channel" else f"g{self.group_size}"
        return f"int{self.bits}-{size}-{'sym' if self.symmetric else 'asym'}"

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    def resolve(self, shapes: dict[str, tuple[int, int]]) -> Scheme:
        """The same scheme with ``group_size`` settled for linears of these (out, in) shapes.

        Raises UserError if a given group size does not divide the inputs of a linear, or none of
        the automatic ones does.
        """
        if self.group_size == "channel":
            return self
        if isinstance(self.group_size, int):
            for name, (_, in_features) in shapes.items():
                if in_features % self.group_size:
                    raise UserError(
                        f"scheme.group_size={self.group_size} does not divide the {in_features} inputs "
                        f"of {name}: choose a divisor, auto, or channel"
                    )
            return self
        size = _common_group_size(in_features for _, in_features in shapes.values())
        if size is None:
            raise UserError(
                f"no group size of {AUTO_GROUP_SIZES} divides the inputs of every linear: "
                "set scheme.group_size to a divisor, or to channel"
            )
        return Scheme(self.bits, size, self.symmetric)

    def columns_per_group(self, in_features: int) -> int:
        assert self.group_size != "auto", "resolve() settles the group size first"
        return in_features if self.group_size == "channel" else int(self.group_size)


@dataclass(frozen=True)
class Schemes:
    """The scheme of every linear: one for all, and those that differ.

    linears: of the linears of the decoder blocks
    exceptions: full name of a linear -> its own scheme
    head: of the embedding and the language-model head; None leaves them in 16 bits
    """

    linears: Scheme
    exceptions: Mapping[str, Scheme] = field(default_factory=dict)
    head: Scheme | None = None

    def of(self, name: str) -> Scheme:
        return self.exceptions.get(name, self.linears)

    @property
    def name(self) -> str:
        mixed = "mixed-" if self.exceptions else ""
        head = f"+head-{self.head.name}" if self.head else ""
        return f"{mixed}{self.linears.name}{head}"

    def as_config(self) -> dict[str, Any]:
        """What a record keeps of it, as JSON."""
        return {
            "linears": asdict(self.linears),
            "exceptions": {name: asdict(scheme) for name, scheme in self.exceptions.items()},
            "head": None if self.head is None else asdict(self.head),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schemes:
        return cls(
            Scheme(**config["linears"]),
            {name: Scheme(**scheme) for name, scheme in config["exceptions"].items()},
            None if config["head"] is None else Scheme(**config["head"]),
        )


def _common_group_size(in_features: Iterable[int]) -> int | None:
    sizes = list(in_features)
    for size in AUTO_GROUP_SIZES:
        if all(n % size == 0 for n in sizes):
            return size
    return None


@dataclass(frozen=True)
class Grid:
    """The values a weight may round to. scale (out, groups) in the model's dtype; zero uint8 or None."""

    scale: Tensor
    zero: Tensor | None


def make_grid(W: Tensor, scheme: Scheme, dtype: torch.dtype, bound: Tensor | None = None) -> Grid:
    """The min-max grid of each group of W, within +-bound where one is given.

    W: float32 (out, in); bound: float32 (out, groups), at least 0. ``dtype`` is what the scale is
    stored in: the scale is rounded to it here, so codes are chosen for the scale that will be used.

    Asymmetric: scale = (max - min) / (2^b - 1), zero = round(-min / scale); the range always holds 0.
    Symmetric: scale = 2 absmax / (2^b - 1), as compressed-tensors has it (absmax lands on a half step
    and its positive side is clipped by half a step).
    """
    columns = scheme.columns_per_group(W.shape[1])
    groups = W.unflatten(1, (-1, columns))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if bound is not None:
        low, high = torch.maximum(low, -bound), torch.minimum(high, bound)
    span = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    # float16 has no scale for the tiniest groups: take the smallest it has, not none.
    scale = (span / scheme.max_code).to(dtype).clamp(min=torch.finfo(dtype).tiny)
    # A group of zeros has no range; any scale gives zeros back.
    scale = torch.where(span == 0, torch.ones_like(scale), scale)
    if scheme.symmetric:
        return Grid(scale, None)
    zero = (-low / scale.float()).round().clamp(0, scheme.max_code)
    return Grid(scale, zero.to(torch.uint8))


def to_codes(W: Tensor, grid: Grid, scheme: Scheme) -> QTensor:
    """W rounded to the nearest value of its grid. W: float32 (out, in)."""
    groups = W.unflatten(1, (grid.scale.shape[1], -1))
    zero = 2 ** (scheme.bits - 1) if grid.zero is None else grid.zero.float().unsqueeze(-1)
    codes = groups / grid.scale.float().unsqueeze(-1) + zero
    codes = codes.round_().clamp_(0, scheme.max_code)
    return QTensor(codes.flatten(1).to(torch.uint8), grid.scale, grid.zero, scheme.bits)


def fake_quantize(W: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """W as it comes back from its nearest codes, float32 (out, in): quantize and dequantize at once."""
    groups = W.unflatten(1, (grid.scale.shape[1], -1))
    scale = grid.scale.float().unsqueeze(-1)
    zero = 2 ** (scheme.bits - 1) if grid.zero is None else grid.zero.float().unsqueeze(-1)
    codes = (groups / scale).add_(zero).round_().clamp_(0, scheme.max_code)
    return codes.sub_(zero).mul_(scale).flatten(1)
