"""W2A16 to W8A16, FP8 and 16 bits on a CPU with AVX-512 and its bf16 instructions: y = x W^T at the speed at
which memory gives W, with what surrounds the product on the way (``cpu.cpp``).

x bf16 (..., in); W (out, in); y bf16 (..., out). Sums are float32, scales what the record holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from compress.kernels import cpu_library
from compress.kernels.fusion import PLAIN, Fusion, around, rms_norm
from compress.quantize.inputs import InputScheme
from compress.quantize.numbers import decode_scale
from compress.quantize.qtensor import QTensor

UNQUANTIZED = "bf16-avx512"
# A block of codes; columns of a group are a multiple of its columns.
ROWS, COLUMNS = 16, 32
# Bits that codes are kept in; those of 5 to 7 take a byte.
STORED = (2, 3, 4, 8)
DENSE = 16
# What cpu.cpp calls the floating-point formats.
FLOATS = {4: 104, 8: 108}
# Tokens up to which the kernel is faster than torch's product with the whole weight in bf16, dequantized for
# it where it is not in bf16: codes of a byte are two products each.
FEW = {2: 128, 3: 128, 4: 128, 8: 48, DENSE: 64}


def reference(x: Tensor, q: QTensor) -> Tensor:
    """What the kernel computes, in float32 from the dequantized weight."""
    if q.inputs is not None:
        x = q.inputs.round(x, q.input_scale)
    return x.float() @ q.dequantize(torch.float32).T


def name(q: QTensor) -> str:
    """As in ``int4-avx512``, by the bits that the weight takes in memory."""
    return f"{'fp' if q.type == 'float' else 'int'}{_stored(q)}-avx512"


def supports(q: QTensor, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``CpuWeight.pack`` can run this weight here."""
    columns = q.shape[1]
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and columns % COLUMNS == 0
        and (q.group_size % COLUMNS == 0 or q.group_size >= columns)
        and q.columns is None
        and (q.inputs is None or (q.type == "float" and q.inputs.type == "float"))
        and cpu_library.available()
    )


def supports_dense(W: Tensor) -> bool:
    """Whether ``CpuWeight.dense`` can run this weight here."""
    return (
        W.device.type == "cpu"
        and W.dtype == torch.bfloat16
        and W.is_contiguous()
        and cpu_library.available()
    )


def _stored(q: QTensor) -> int:
    return next(bits for bits in STORED if bits >= q.bits)


@dataclass(frozen=True)
class CpuWeight:
    """A weight in the kernel's layout.

    codes: int16 (out / 16, in / 32, registers, 16 rows, 2), filled up to whole blocks of rows; or bf16
        (out, in), the weight itself
    scales: bf16, fp16 or float32 (out / 16, groups, 16 rows); zeros: uint8, the same shape
    format: as cpu.cpp calls it; group: columns that share a scale
    few: elements of x up to which the kernel runs
    """

    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    format: int
    group: int
    out_features: int
    in_features: int
    few: int
    inputs: InputScheme | None = None
    input_scale: Tensor | None = None

    @classmethod
    def dense(cls, W: Tensor) -> CpuWeight:
        """A weight in 16 bits, of which no copy is made."""
        assert cpu_library.available(), "supports_dense() comes first"
        out_features, in_features = W.shape
        few = FEW[DENSE] * in_features
        return cls(W, None, None, DENSE, in_features, out_features, in_features, few)

    @classmethod
    def pack(cls, q: QTensor) -> CpuWeight:
        """Arrange once at load."""
        assert cpu_library.available(), "supports() comes first"
        out_features, in_features = q.shape
        bits = _stored(q)
        # Codes of fewer bits than are stored move up until their zero is in the middle of those.
        up = 0 if q.type == "float" else 2 ** (bits - 1) - 2 ** (q.bits - 1)
        return cls(
            pack_codes(_padded(q.codes + up), bits),
            _interleaved(_scales(q)),
            None if q.zero is None else _interleaved(q.zero + up),
            FLOATS[bits] if q.type == "float" else bits,
            min(q.group_size, in_features),
            out_features,
            in_features,
            FEW[bits] * in_features,
            q.inputs,
            q.input_scale,
        )

    @property
    def nbytes(self) -> int:
        parts = (self.codes, self.scales, self.zeros)
        return sum(part.nbytes for part in parts if part is not None)

    def matmul(self, x: Tensor) -> Tensor:
        """x bf16 (..., in) -> bf16 (..., out)."""
        return self.fused(x, PLAIN)

    def fused(self, x: Tensor, fusion: Fusion, residual: Tensor | None = None) -> Tensor:
        """As ``fusion.around``, with one rounding at the end instead of one a step."""
        if self.inputs is not None:
            if fusion.norm is not None:
                x, fusion = rms_norm(x, fusion.norm, fusion.eps), replace(fusion, norm=None)
            x = self.inputs.round(x, self.input_scale)
        # Two halves of rows are two parts of a weight only where blocks end between them.
        if x.numel() > self.few or (fusion.gated and self.out_features % (2 * ROWS)):
            return around(self._many, x, fusion, residual)
        return self._run(x, fusion, residual)

    def _run(self, x: Tensor, fusion: Fusion, residual: Tensor | None) -> Tensor:
        return torch.ops.compress.linear.default(
            x,
            self.codes,
            self.scales,
            self.zeros,
            self.format,
            self.group,
            self.out_features,
            fusion.norm,
            fusion.eps,
            fusion.bias,
            fusion.gated,
            residual,
        )

    def _many(self, x: Tensor) -> Tensor:
        if x.numel() <= self.few:
            return self._run(x, PLAIN, None)
        return linear(x, self.codes if self.scales is None else self.dequantize())

    def rows(self, index: Tensor) -> Tensor:
        """Some rows of the weight, bf16 (n, in), as ``dequantize`` gives them. index: int64 (n,)"""
        if self.scales is None:
            return self.codes[index]
        block = index // ROWS
        few = replace(
            self,
            codes=self.codes[block],
            scales=self.scales[block],
            zeros=None if self.zeros is None else self.zeros[block],
            out_features=ROWS * len(index),
        )
        return few.dequantize()[torch.arange(len(index)) * ROWS + index % ROWS]

    def dequantize(self) -> Tensor:
        """The weight bf16 (out, in), each element rounded once."""
        return torch.ops.compress.dequantize.default(
            self.codes,
            self.scales,
            self.zeros,
            self.format,
            self.group,
            self.out_features,
            self.in_features,
        )


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """codes uint8 (out, in) in whole blocks -> int16 (out / 16, in / 32, registers, 16 rows, 2).

    A word holds as many pairs of columns as its bits allow, from the lowest bit on; of 3 bits it holds five,
    and three words share the sixteenth pair in their top bits.
    """
    held = 16 // bits
    pairs = codes.unflatten(1, (-1, 16, 2)).unflatten(0, (-1, ROWS)).permute(0, 2, 3, 1, 4)
    words = torch.zeros(*pairs.shape[:2], bits, ROWS, 2, dtype=torch.int16)
    for register in range(bits):
        for place in range(held):
            pair = pairs[:, :, held * register + place].to(torch.int16)
            words[:, :, register] |= pair << (bits * place)
        if bits == 3:
            words[:, :, register] |= (pairs[:, :, 15].to(torch.int16) >> register) << 15
    return words


def _padded(rows: Tensor) -> Tensor:
    """Filled up to whole blocks of rows."""
    return torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % ROWS))


def _interleaved(values: Tensor) -> Tensor:
    """(out, groups) -> (out / 16, groups, 16 rows)."""
    return _padded(values).unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous()


def _scales(q: QTensor) -> Tensor:
    """(out, groups), in 16 bits where the record's fit into 16."""
    scale = decode_scale(q.scale)
    if q.divisor is not None:
        scale = scale / q.divisor
    elif q.scale.dtype != torch.float32:
        # e8m0 and e4m3 fit into bf16; 16-bit scales stay what they are.
        scale = scale.to(q.scale.dtype if q.scale.itemsize == 2 else torch.bfloat16)
    if q.block is not None:
        scale = scale.repeat_interleave(q.block[0], 0)
    return scale[: q.shape[0]].expand(q.shape[0], -1)
