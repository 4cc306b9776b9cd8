"""Schemes: which numbers a linear's weights and inputs may take, and which weights share a scale.

W (out, in); a grid holds scale and zero, each (out, groups), or one scale a block of rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.quantize.inputs import COLUMNS, InputScheme
from compress.quantize.numbers import E8M0_BIAS, FLOATS, decode_scale, encode_float, round_float
from compress.quantize.qtensor import QTensor, spread

AUTO_GROUP_SIZES = (128, 64, 32)
TYPES = ("int", "float")
SHARES = ("auto", "channel", "tensor", "block")
# Rows and columns that share a scale in "block".
BLOCK = (128, 128)
# Columns that share a scale in 4-bit floating point: the two formats differ in nothing else one chooses.
NVFP4, MXFP4 = 16, 32


@dataclass(frozen=True)
class Scheme:
    """Which numbers a weight may take, and its inputs.

    bits: 2 to 8; 8 or 4 for floating point (e4m3, e2m1)
    group_size: input columns that share a scale; "channel" = the whole row; "tensor" = all; "block" =
        128 x 128; "auto" = the largest of 128, 64, 32 that divides the inputs of every linear of the
        model. 4-bit floating point has groups of 16 (NVFP4: scales in e4m3 and one divisor for all) or of
        32 (MXFP4: scales in e8m0)
    symmetric: no zero point; the grid is centred on code ``2**(bits - 1)``. Floating point always is
    type: int or float
    inputs: how the linear's input is rounded; None leaves it as it is
    """

    bits: int = 4
    group_size: int | str = "auto"
    symmetric: bool = False
    type: str = "int"
    inputs: InputScheme | None = None

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise UserError(f"scheme.type={self.type} is not allowed: choose {', '.join(TYPES)}")
        size = self.group_size
        if isinstance(size, str) and size not in SHARES:
            raise UserError(
                f"scheme.group_size={size} is not allowed: choose a number of columns, "
                f"{', '.join(SHARES)}"
            )
        if isinstance(size, int) and size < 1:
            raise UserError(f"scheme.group_size={size} is not allowed: choose 1 or more columns")
        if self.type == "float":
            self._check_float()
            return
        if not 2 <= self.bits <= 8:
            raise UserError(f"scheme.bits={self.bits} is not allowed: choose 2 to 8")
        needs = "scheme.inputs" if self.inputs is not None else f"scheme.group_size={size}"
        if (self.inputs is not None or size in ("tensor", "block")) and not self.symmetric:
            raise UserError(f"{needs} needs scheme.symmetric=true: engines have no other kernels")

    def _check_float(self) -> None:
        if (self.type, self.bits) not in FLOATS:
            raise UserError(
                f"scheme.bits={self.bits} is not allowed with type=float: choose 4 or 8"
            )
        if not self.symmetric:
            raise UserError("scheme.type=float has no zero points: set scheme.symmetric=true")
        if self.bits == 4 and self.group_size not in (NVFP4, MXFP4):
            raise UserError(
                f"scheme.group_size={self.group_size} is not allowed in 4-bit floating point: choose "
                f"{NVFP4} (NVFP4) or {MXFP4} (MXFP4)"
            )

    @property
    def name(self) -> str:
        """As in ``int4-g128-asym``, ``int8-channel-sym+int8-token``, ``fp8-block+fp8-group``, ``nvfp4``."""
        size = self.group_size if isinstance(self.group_size, str) else f"g{self.group_size}"
        if self.group_size == "auto":
            size = "gauto"
        if self.type == "int":
            name = f"int{self.bits}-{size}-{'sym' if self.symmetric else 'asym'}"
        elif self.bits == 8:
            name = f"fp8-{size}"
        else:
            name = "nvfp4" if self.group_size == NVFP4 else "mxfp4"
        return name if self.inputs is None else f"{name}+{self.inputs.name}"

    @property
    def grouped_integers(self) -> bool:
        """Whether weights are integers with a scale for each group of columns, or each row."""
        return self.type == "int" and self.group_size not in ("tensor", "block")

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    def resolve(self, shapes: dict[str, tuple[int, int]]) -> Scheme:
        """The same scheme with ``group_size`` settled for linears of these (out, in) shapes.

        Raises UserError if a given group size does not divide the inputs of a linear, or none of
        the automatic ones does, or groups of inputs that are rounded do not.
        """
        if self.inputs is not None and self.inputs.per == "group":
            for name, (out_features, in_features) in shapes.items():
                if in_features % COLUMNS or out_features % COLUMNS:
                    raise UserError(
                        f"scheme.inputs.per=group works in blocks of {COLUMNS}, which do not divide the "
                        f"{out_features} x {in_features} of {name}, and no engine fills them up: choose "
                        "token with scheme.group_size=channel (recipe=fp8)"
                    )
        if self.group_size in ("channel", "tensor", "block"):
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
        return replace(self, group_size=size)

    def columns_per_group(self, in_features: int) -> int:
        assert self.group_size not in ("auto", "tensor", "block"), self.group_size
        return in_features if self.group_size == "channel" else int(self.group_size)

    def block(self, shape: torch.Size) -> tuple[int, int] | None:
        """Rows and columns that share a scale, where it is not a group of columns in one row."""
        if self.group_size == "tensor":
            return shape[0], shape[1]
        return BLOCK if self.group_size == "block" else None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Scheme:
        """The scheme that ``dataclasses.asdict`` made this of."""
        inputs = config["inputs"]
        return cls(**{**config, "inputs": None if inputs is None else InputScheme(**inputs)})


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
            Scheme.from_config(config["linears"]),
            {name: Scheme.from_config(s) for name, s in config["exceptions"].items()},
            None if config["head"] is None else Scheme.from_config(config["head"]),
        )


def _common_group_size(in_features: Iterable[int]) -> int | None:
    sizes = list(in_features)
    for size in AUTO_GROUP_SIZES:
        if all(n % size == 0 for n in sizes):
            return size
    return None


@dataclass(frozen=True)
class Grid:
    """The values a weight may round to, as in QTensor: scale, zero uint8 or None, divisor or None."""

    scale: Tensor
    zero: Tensor | None
    divisor: Tensor | None = None


def make_grid(
    W: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    bound: Tensor | None = None,
    largest: Tensor | None = None,
) -> Grid:
    """The min-max grid of each group of W, within +-bound where one is given.

    W: float32 (out, in); bound: float32 (out, groups), at least 0; largest: float32 (), the absmax that
    one number for the whole tensor is made of (its scale, the divisor of NVFP4), of W alone if not
    given. ``dtype`` is what the scale is stored in where the format leaves that open: the scale is
    rounded to it here, so codes are chosen for the scale that will be used.

    Asymmetric: scale = (max - min) / (2^b - 1), zero = round(-min / scale); the range always holds 0.
    Symmetric: scale = 2 absmax / (2^b - 1), as compressed-tensors has it (absmax lands on a half step
    and its positive side is clipped by half a step). Floating point: scale = absmax / its largest value.
    """
    low, high = _range(W, scheme)
    if bound is not None:
        low, high = torch.maximum(low, -bound), torch.minimum(high, bound)
    absmax = torch.maximum(-low, high)
    if scheme.group_size == "tensor" and largest is not None:
        absmax = largest.reshape(1, 1)
    if scheme.type == "float" and scheme.bits == 4:
        return _fp4_grid(absmax, scheme, W.abs().max() if largest is None else largest)
    if scheme.type == "float":
        span, levels = absmax, FLOATS["float", scheme.bits]
    else:
        span, levels = 2 * absmax if scheme.symmetric else high - low, scheme.max_code
    # float16 has no scale for the tiniest groups: take the smallest it has, not none.
    scale = (span / levels).to(dtype).clamp(min=torch.finfo(dtype).tiny)
    # A group of zeros has no range; any scale gives zeros back.
    scale = torch.where(span == 0, torch.ones_like(scale), scale)
    if scheme.symmetric:
        return Grid(scale, None)
    zero = (-low / scale.float()).round().clamp(0, scheme.max_code)
    return Grid(scale, zero.to(torch.uint8))


def _range(W: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Least and largest value of what shares a scale, 0 included; each in the shape of the scales."""
    block = scheme.block(W.shape)
    if block is None:
        groups = W.unflatten(1, (-1, scheme.columns_per_group(W.shape[1])))
        # By themselves: on a CPU ``aminmax`` takes six times as long.
        low, high = groups.amin(-1), groups.amax(-1)
    else:
        rows, columns = block
        # Zeros fill the last blocks: 0 is in every range anyway.
        padded = nn.functional.pad(W, (0, -W.shape[1] % columns, 0, -W.shape[0] % rows))
        blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    return low.clamp(max=0), high.clamp(min=0)


def _fp4_grid(absmax: Tensor, scheme: Scheme, largest: Tensor) -> Grid:
    """NVFP4: scales in e4m3, used to the full by one divisor (448 * 6 / absmax of the tensor). MXFP4: the
    power of two that puts absmax into e2m1's top binade, absmax rounded up to the next power where it
    would round beyond the largest value."""
    top = FLOATS["float", 4]
    if scheme.group_size == NVFP4:
        # Below this the divisor would not be finite; a tensor of zeros has none, and any gives zeros back.
        least = FLOATS["float", 8] * top / torch.finfo(torch.float32).max
        divisor = FLOATS["float", 8] * top / largest.clamp(min=2 * least)
        scale = (absmax / top * divisor).clamp(max=FLOATS["float", 8]).to(torch.float8_e4m3fn)
        # What rounds to no scale at all takes the one that engines put there.
        none = scale.float() == 0
        return Grid(torch.where(none, torch.full_like(scale, 0.125), scale), None, divisor)
    mantissa, exponent = torch.frexp(absmax)
    # absmax = m 2^e, m in [.5, 1): 6 is 1.5 * 2^2, and from 1.75 * 2^k on the next power is taken.
    exponent = exponent - 1 + (mantissa >= 0.875).int() - 2
    exponent = torch.where(absmax == 0, torch.full_like(exponent, -E8M0_BIAS), exponent)
    return Grid((exponent + E8M0_BIAS).clamp(0, 254).to(torch.uint8), None)


def to_codes(W: Tensor, grid: Grid, scheme: Scheme) -> QTensor:
    """W rounded to the nearest value of its grid. W: float32 (out, in)."""
    groups, scale = _grouped(W, grid, scheme)
    scaled = groups / scale
    if scheme.type == "float":
        codes = encode_float(scaled, scheme.bits)
    else:
        zero = 2 ** (scheme.bits - 1) if grid.zero is None else grid.zero.float().unsqueeze(-1)
        codes = scaled.add_(zero).round_().clamp_(0, scheme.max_code).to(torch.uint8)
    return QTensor(
        codes.reshape(W.shape),
        grid.scale,
        grid.zero,
        scheme.bits,
        scheme.type,
        scheme.block(W.shape),
        grid.divisor,
    )


def _grouped(W: Tensor, grid: Grid, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """W in groups, (out, groups, columns), and the scale float32 that goes with each of them."""
    scale, block = decode_scale(grid.scale), scheme.block(W.shape)
    if grid.divisor is not None:
        scale = scale / grid.divisor
    if block is None:
        return W.unflatten(1, (scale.shape[1], -1)), scale.unsqueeze(-1)
    return W.unsqueeze(-1), spread(scale, block, W.shape).unsqueeze(-1)


def fake_quantize(W: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """W as it comes back from its nearest codes, float32 (out, in): quantize and dequantize at once."""
    groups, scale = _grouped(W, grid, scheme)
    if scheme.type == "float":
        return round_float(groups / scale, scheme.bits).mul_(scale).flatten(1)
    zero = 2 ** (scheme.bits - 1) if grid.zero is None else grid.zero.float().unsqueeze(-1)
    codes = (groups / scale).add_(zero).round_().clamp_(0, scheme.max_code)
    return codes.sub_(zero).mul_(scale).flatten(1)
