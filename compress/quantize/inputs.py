"""How the inputs of a linear are rounded while it runs, as an engine would do it.

X (..., in) inputs of a linear; scale (...,  1), (..., groups) or ()
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.quantize.numbers import FLOATS, round_float

TYPES = ("int", "float")
SHARES = ("token", "tensor", "group")
OUTLIERS = ("none", "dynamic", "static")
# Input columns that share a scale in "group", as the kernels for weights in 128 x 128 blocks take it.
COLUMNS = 128


@dataclass(frozen=True)
class InputScheme:
    """8-bit inputs, symmetric.

    type: int or float (e4m3)
    per: what shares a scale: each token's own (``token``), its groups of 128 columns (``group``), both
        found while it runs; or ``tensor``: one for all, fixed by calibration
    outliers: columns that stay in 16 bits (LLM.int8, arXiv 2208.07339): none; ``dynamic``: those in which
        an input of the running batch reaches the threshold, while their weights are dequantized; or
        ``static``: those that stood out in calibration, with weights in 16 bits
    threshold: least |x| of an outlier, for ``dynamic`` and for the outlier report
    ratio: ``static`` keeps the columns whose largest |x| is this many times that of the median column. A
        token's scale is set by its largest column, so those cost most that are far above the others,
        wherever the others are
    """

    type: str = "int"
    per: str = "token"
    outliers: str = "none"
    threshold: float = 6.0
    ratio: float = 3.0

    def __post_init__(self) -> None:
        for name, allowed in (("type", TYPES), ("per", SHARES), ("outliers", OUTLIERS)):
            if (value := getattr(self, name)) not in allowed:
                raise UserError(
                    f"scheme.inputs.{name}={value} is not allowed: choose {', '.join(allowed)}"
                )
        for name, least in (("threshold", 0), ("ratio", 1)):
            if not (value := getattr(self, name)) > least:
                raise UserError(
                    f"scheme.inputs.{name}={value} is not allowed: choose more than {least}"
                )
        if self.outliers != "none" and (self.type, self.per) != ("int", "token"):
            raise UserError(
                f"scheme.inputs.outliers={self.outliers} needs scheme.inputs.type=int and per=token"
            )

    @property
    def running(self) -> InputScheme:
        """What of it matters while a linear runs, which is all that a checkpoint holds."""
        return InputScheme(
            self.type,
            self.per,
            self.outliers,
            **({"threshold": self.threshold} if self.outliers == "dynamic" else {}),
        )

    @property
    def static(self) -> bool:
        """Whether one scale is fixed by calibration."""
        return self.per == "tensor"

    @property
    def needs_data(self) -> bool:
        return self.static or self.outliers != "none"

    @property
    def name(self) -> str:
        name = f"{'int8' if self.type == 'int' else 'fp8'}-{self.per}"
        return name if self.outliers == "none" else f"{name}-{self.outliers}-outliers"

    @property
    def largest(self) -> float:
        """127 (the 128th negative level is left out, as in the int8 kernels of engines) or 448."""
        return 127.0 if self.type == "int" else FLOATS["float", 8]

    def scale_of(self, absmax: Tensor) -> Tensor:
        """The scale float32 that puts absmax on the largest level; above 0 where everything is 0."""
        return (absmax.float() / self.largest).clamp_(min=torch.finfo(torch.float32).tiny)

    def outlier_columns(self, largest: Tensor) -> Tensor:
        """The columns int64 (k,) that ``static`` keeps. largest: (in,) largest |x| of each in calibration"""
        used = largest[largest > 0]
        if not len(used):
            return torch.empty(0, dtype=torch.int64, device=largest.device)
        return (largest >= self.ratio * used.median()).nonzero().squeeze(1)

    def round(
        self, X: Tensor, scale: Tensor | None = None, columns: Tensor | None = None
    ) -> Tensor:
        """X as it comes back from 8 bits, in its own dtype.

        scale: float32, one element, for ``tensor``; columns: int64, those of static outliers
        """
        if self.outliers == "none":
            return self._rounded(X, scale)
        if self.outliers == "static":
            assert columns is not None
            rounded = self._rounded(X.index_fill(-1, columns, 0), scale)
            return rounded.index_copy_(-1, columns, X.index_select(-1, columns))
        above = X.abs() >= self.threshold
        # bitsandbytes leaves only the large numbers themselves out of the scale, then the whole column.
        rounded = self._rounded(X.masked_fill(above, 0), scale)
        return torch.where(above.flatten(0, -2).any(0), X, rounded)

    def attach(self, linear: nn.Module, scale: Tensor | None, columns: Tensor | None) -> None:
        """Let a linear round its inputs from now on."""
        linear.register_forward_pre_hook(lambda _, args: (self.round(args[0], scale, columns),))

    def _rounded(self, X: Tensor, scale: Tensor | None) -> Tensor:
        if self.static:
            assert scale is not None
            return self._levels(X.float() / scale).mul_(scale).to(X.dtype)
        groups = X.unflatten(-1, (1, -1) if self.per == "token" else (-1, COLUMNS))
        scale = self.scale_of(groups.abs().amax(-1, keepdim=True))
        rounded = self._levels(groups.float() / scale).mul_(scale)
        return rounded.flatten(-2).to(X.dtype)

    def _levels(self, scaled: Tensor) -> Tensor:
        if self.type == "float":
            return round_float(scaled, 8)
        return scaled.round_().clamp_(-self.largest, self.largest)
