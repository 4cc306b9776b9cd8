"""QTensor: a quantized weight exactly as it was decided, before any file format.

Methods write it, exporters and the runtime read it; nothing in it belongs to a format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QTensor:
    """Integers, scales and zero points of one linear weight: ``w = (code - zero) * scale``.

    codes: uint8 (out, in), values in 0 .. 2**bits - 1
    scale: floating point (out, groups); a group is ``in / groups`` consecutive input columns
    zero:  uint8 (out, groups), or None for a symmetric scheme, where it is ``2**(bits - 1)``
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int

    def __post_init__(self) -> None:
        out_features, in_features = self.codes.shape
        groups = self.scale.shape[1]
        assert self.codes.dtype == torch.uint8, self.codes.dtype
        assert self.scale.shape[0] == out_features, (self.scale.shape, self.codes.shape)
        assert in_features % groups == 0, (in_features, groups)
        if self.zero is not None:
            assert self.zero.dtype == torch.uint8, self.zero.dtype
            assert self.zero.shape == self.scale.shape, (self.zero.shape, self.scale.shape)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def symmetric(self) -> bool:
        return self.zero is None

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """Bits that the format-neutral content needs: codes, scales and zero points."""
        per_group = self.scale.element_size() * 8 + (0 if self.zero is None else self.bits)
        return self.bits + per_group / self.group_size

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight these integers stand for, (out, in).

        The product is taken in float32 and rounded once to ``dtype``.
        """
        zero = 2 ** (self.bits - 1) if self.zero is None else self.zero.float().unsqueeze(-1)
        codes = self.codes.unflatten(1, (self.scale.shape[1], self.group_size)).float()
        return ((codes - zero) * self.scale.float().unsqueeze(-1)).flatten(1).to(dtype)
