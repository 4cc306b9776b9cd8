"""Which kernel runs a weight here, and the weight in that kernel's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compress.kernels import cpu_linear, dense, int4_cpu, int8_cpu, packed_linear, tuning, w8a8
from compress.kernels.fusion import Fusion, around
from compress.quantize.qtensor import QTensor


class PackedWeight(Protocol):
    """A weight in the layout of a kernel."""

    def matmul(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        ...

    def fused(self, x: Tensor, fusion: Fusion, residual: Tensor | None = None) -> Tensor:
        """With what surrounds the product; see compress.kernels.fusion."""
        ...


def pack(q: QTensor, device: torch.device, dtype: torch.dtype) -> tuple[str, PackedWeight] | None:
    """The weight in the layout of the kernel that runs it here, and that kernel's name; None if none does."""
    if cpu_linear.supports(q, device, dtype):
        return cpu_linear.name(q), cpu_linear.CpuWeight.pack(q)
    if int4_cpu.supports(q, device, dtype):
        return int4_cpu.NAME, int4_cpu.Int4Weight.pack(q)
    if int8_cpu.supports(q, device, dtype):
        return int8_cpu.NAME, int8_cpu.Int8Weight.pack(q)
    if packed_linear.supports(q, device, dtype):
        return packed_linear.name(q), packed_linear.TritonWeight.pack(q, device)
    if w8a8.supports(q, device, dtype):
        return w8a8.NAME, w8a8.W8A8Weight.pack(q, device)
    return None


def runs(q: QTensor, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``pack`` finds a kernel, from sizes and numbers alone."""
    kernels = (cpu_linear, int4_cpu, int8_cpu, packed_linear, w8a8)
    return any(kernel.supports(q, device, dtype) for kernel in kernels)


def pack_dense(weight: Tensor) -> tuple[str, PackedWeight]:
    """The same of a weight that was never quantized; it is kept as it is."""
    if cpu_linear.supports_dense(weight):
        return cpu_linear.UNQUANTIZED, cpu_linear.CpuWeight.dense(weight)
    if packed_linear.supports_dense(weight):
        packed = packed_linear.TritonWeight.dense(weight)
        return packed.name, packed
    return dense.UNQUANTIZED, dense.DenseWeight(weight)


def unpacked(q: QTensor, device: torch.device, dtype: torch.dtype) -> tuple[str, PackedWeight]:
    """A quantized weight that no kernel runs here: dequantized, its inputs still rounded."""
    fixed = [None if part is None else part.to(device) for part in (q.input_scale, q.columns)]
    weight = q.dequantize(dtype).to(device)
    return dense.name_of(q), dense.DenseWeight(weight, q.inputs, *fixed)


@dataclass(frozen=True)
class Side:
    """Weights that read the same inputs and do not fit one kernel, side by side."""

    weights: Sequence[PackedWeight]

    def matmul(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., the rows of all)."""
        return torch.cat([weight.matmul(x) for weight in self.weights], dim=-1)

    def fused(self, x: Tensor, fusion: Fusion, residual: Tensor | None = None) -> Tensor:
        """With what surrounds the product."""
        return around(self.matmul, x, fusion, residual)


def waits(weight: PackedWeight) -> bool:
    """Whether a product waits for what its inputs are, so that no graph can hold it."""
    if isinstance(weight, Side):
        return any(map(waits, weight.weights))
    inputs = getattr(weight, "inputs", None)
    return inputs is not None and inputs.outliers == "dynamic"


def tune(weight: PackedWeight, rows: int, dtype: torch.dtype) -> None:
    """Measure how a product of so many rows runs best, where there is a choice that was not measured yet."""
    if isinstance(weight, Side):
        for part in weight.weights:
            tune(part, rows, dtype)
        return
    if not isinstance(weight, packed_linear.TritonWeight):
        return
    if weight.key(rows, dtype).text not in tuning.table().found:
        packed_linear.tune(weight, rows, dtype)


def nbytes(weight: PackedWeight) -> int:
    """Bytes of the tensors that a weight keeps, which a product with few rows reads once."""
    if isinstance(weight, Side):
        return sum(map(nbytes, weight.weights))
    if isinstance(weight, packed_linear.TritonWeight | cpu_linear.CpuWeight):
        return weight.nbytes
    return sum(part.nbytes for part in vars(weight).values() if isinstance(part, Tensor))
