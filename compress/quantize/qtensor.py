"""QTensor: a quantized weight exactly as it was decided, before any file format.

Methods write it, exporters and the runtime read it; nothing in it belongs to a format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.quantize.inputs import InputScheme
from compress.quantize.numbers import decode_float, decode_scale


@dataclass(frozen=True)
class QTensor:
    """Codes, scales and zero points of one linear weight: ``w = level * scale``.

    codes: uint8 (out, in). Integers: 0 .. 2**bits - 1, level = code - zero; floating point: the code of
        ``numbers``, level = what it stands for
    scale: (out, groups), or (row blocks, groups) with ``rows`` > 1; a group is so many consecutive
        input columns. 16- or 32-bit floating point, e4m3, or uint8 for e8m0
    zero:  uint8 (out, groups), or None for a symmetric scheme, where it is ``2**(bits - 1)``
    type:  int or float
    block: (rows, columns) that share a scale where they need not divide the weight; None: one row,
        in / groups columns
    divisor: float32 (), all scales are divided by it, as in NVFP4; None: 1
    inputs: how the linear rounds its inputs; None: not at all
    input_scale: float32 (), where calibration fixed it
    columns, kept: int64 (k,) input columns whose weights stay in 16 bits, and these weights (out, k)
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    type: str = "int"
    block: tuple[int, int] | None = None
    divisor: Tensor | None = None
    inputs: InputScheme | None = None
    input_scale: Tensor | None = None
    columns: Tensor | None = None
    kept: Tensor | None = None

    def __post_init__(self) -> None:
        out_features, in_features = self.codes.shape
        groups = self.scale.shape[1]
        assert self.codes.dtype == torch.uint8, self.codes.dtype
        if self.block is None:
            assert self.scale.shape[0] == out_features, (self.scale.shape, self.codes.shape)
            assert in_features % groups == 0, (in_features, groups)
        else:
            rows, columns = self.block
            blocks = (-(-out_features // rows), -(-in_features // columns))
            assert tuple(self.scale.shape) == blocks, (self.scale.shape, self.codes.shape)
        if self.zero is not None:
            assert self.type == "int", self.type
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
        """Input columns that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1] if self.block is None else self.block[1]

    @property
    def bits_per_weight(self) -> float:
        """Bits that the format-neutral content needs: codes, scales and zero points."""
        stored = 8 * self.scale.nbytes
        if self.zero is not None:
            stored += self.zero.numel() * self.bits
        if self.kept is not None:
            stored += 8 * self.kept.nbytes
        return self.bits + stored / self.codes.numel()

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight these codes stand for, (out, in).

        The product is taken in float32 and rounded once to ``dtype``.
        """
        W = self._product().to(dtype)
        if self.columns is not None:
            assert self.kept is not None
            W[:, self.columns] = self.kept.to(dtype)
        return W

    def _product(self) -> Tensor:
        scale = decode_scale(self.scale)
        if self.divisor is not None:
            scale = scale / self.divisor
        is_float = self.type == "float"
        levels = decode_float(self.codes, self.bits) if is_float else self.codes.float()
        if self.block is not None:
            zero = 0 if is_float else 2 ** (self.bits - 1)
            return levels.sub_(zero) * spread(scale, self.block, self.shape)
        levels = levels.unflatten(1, (self.scale.shape[1], self.group_size))
        if not is_float:
            levels -= 2 ** (self.bits - 1) if self.zero is None else self.zero.float().unsqueeze(-1)
        return (levels * scale.unsqueeze(-1)).flatten(1)


def spread(scale: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """The scale of every weight, (out, in), from one a block."""
    rows, columns = block
    whole = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return whole[: shape[0], : shape[1]]


def stack(parts: Sequence[QTensor]) -> QTensor | None:
    """One weight of the rows of several that read the same inputs, (out1 + out2 + ..., in); None where they
    differ in more than their numbers, so that one kernel could not run them in one go."""
    parts = [_scaled_by_row(q) for q in parts]
    first = parts[0]
    if not all(_alike(first, q) for q in parts[1:]):
        return None
    if first.block is not None and any(len(q.codes) % first.block[0] for q in parts[:-1]):
        return None
    zeros = [q.zero for q in parts if q.zero is not None]
    kept = [q.kept for q in parts if q.kept is not None]
    return replace(
        first,
        codes=torch.cat([q.codes for q in parts]),
        scale=torch.cat([q.scale for q in parts]),
        zero=torch.cat(zeros) if zeros else None,
        kept=torch.cat(kept) if kept else None,
    )


def _scaled_by_row(q: QTensor) -> QTensor:
    """The same with a scale a row, where blocks are as wide as the weight: those of another may be taller."""
    if q.block is None or q.scale.shape[1] > 1:
        return q
    scale = q.scale.repeat_interleave(q.block[0], 0)[: len(q.codes)]
    return replace(q, scale=scale, block=None)


def _alike(first: QTensor, other: QTensor) -> bool:
    """Whether two weights have the same numbers, groups and inputs."""
    same = ("bits", "type", "block", "inputs", "group_size", "symmetric")
    tensors = ("divisor", "input_scale", "columns")
    return (
        all(getattr(first, name) == getattr(other, name) for name in same)
        and first.scale.dtype == other.scale.dtype
        and all(_equal(getattr(first, name), getattr(other, name)) for name in tensors)
    )


def _equal(first: Tensor | None, other: Tensor | None) -> bool:
    if first is None or other is None:
        return first is other
    return torch.equal(first, other)
