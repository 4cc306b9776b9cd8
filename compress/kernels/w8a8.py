"""W8A8 with outlier columns in 16 bits: y = (x8 W8^T) s w + x_k W_k^T, through torch's integer matmul; s is
the scale of the token, w that of the row, k the outlier columns (LLM.int8).

x bf16 (tokens, in); W (out, in)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.kernels.fusion import Fusion, around
from compress.quantize.inputs import InputScheme
from compress.quantize.qtensor import QTensor

NAME = "w8a8"
# On CUDA the integer matmul takes no fewer rows, and sizes in steps of 8.
CUDA_ROWS, CUDA_STEP = 17, 8


def reference(x: Tensor, q: QTensor) -> Tensor:
    """What the kernel computes, in float32 from the dequantized weight and the rounded inputs."""
    assert q.inputs is not None
    rounded = q.inputs.round(x.float(), q.input_scale, q.columns)
    return rounded @ q.dequantize(torch.float32).T


def supports(q: QTensor, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``W8A8Weight`` can run this weight here."""
    if device.type == "cpu":
        runs = cpu_runs()
    else:
        runs = device.type == "cuda" and all(size % CUDA_STEP == 0 for size in q.shape)
    return (
        runs
        and dtype == torch.bfloat16
        and (q.type, q.bits) == ("int", 8)
        and q.zero is None
        and tuple(q.scale.shape) in ((1, 1), (q.shape[0], 1))
        and q.inputs is not None
        and q.inputs.type == "int"
        and q.inputs.per in ("token", "tensor")
    )


@functools.cache
def cpu_runs() -> bool:
    """Whether this CPU's integer matmul is fast and right. Without AVX-512 it is a plain loop, slower than
    floating point; with AVX-512 but without VNNI it adds pairs of products in 16 bits, which saturate."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    x = torch.full((1, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(x, x.T) == 64 * 127**2).all())


@dataclass(frozen=True)
class W8A8Weight:
    """weight: int8 (out, in); scale: float32 (out,); inputs: how x is rounded; input_scale: float32 (), where
    calibration fixed it; columns int64 (k,), others bf16 (in,) 0 in them and 1 elsewhere, kept float32
    (k, out): outlier columns that calibration fixed. In float32 because so thin a product spends its time on
    being called, which costs several times less than in bf16."""

    weight: Tensor
    scale: Tensor
    inputs: InputScheme
    input_scale: Tensor | None
    columns: Tensor | None
    others: Tensor | None
    kept: Tensor | None

    @classmethod
    def pack(cls, q: QTensor, device: torch.device) -> W8A8Weight:
        """Arrange once at load, on the device."""
        assert q.inputs is not None, "supports() comes first"
        weight, scale = (q.codes ^ 128).view(torch.int8), q.scale.float().flatten()
        scale = scale.expand(q.shape[0]).contiguous()
        columns = others = kept = None
        if q.columns is not None and q.kept is not None and len(q.columns):
            columns, kept = q.columns, q.kept.T.float().contiguous()
            others = torch.ones(q.shape[1], dtype=torch.bfloat16).index_fill_(0, columns, 0)
        fixed = (
            None if part is None else part.to(device)
            for part in (q.input_scale, columns, others, kept)
        )
        return cls(weight.contiguous().to(device), scale.to(device), q.inputs, *fixed)

    def matmul(self, x: Tensor) -> Tensor:
        """x bf16 (..., in) -> bf16 (..., out)."""
        flat = x.flatten(0, -2)
        y = self._dynamic(flat) if self.inputs.outliers == "dynamic" else self._fixed(flat)
        return y.unflatten(0, x.shape[:-1])

    def fused(self, x: Tensor, fusion: Fusion, residual: Tensor | None = None) -> Tensor:
        """The product with what surrounds it, step by step."""
        return around(self.matmul, x, fusion, residual)

    def _fixed(self, x: Tensor) -> Tensor:
        if self.columns is None or self.others is None or self.kept is None:
            return self._integers(x).to(x.dtype)
        y = self._integers(x * self.others)
        return y.addmm_(x.index_select(1, self.columns).float(), self.kept).to(x.dtype)

    def _dynamic(self, x: Tensor) -> Tensor:
        above = x.abs() >= self.inputs.threshold
        columns = above.any(0).nonzero().squeeze(1)
        if not len(columns):
            return self._integers(x).to(x.dtype)
        y = self._integers(x.masked_fill(above, 0), columns)
        kept = self.weight.index_select(1, columns) * self.scale.unsqueeze(1)
        return y.addmm_(x.index_select(1, columns).float(), kept.T).to(x.dtype)

    def _integers(self, x: Tensor, empty: Tensor | None = None) -> Tensor:
        """The integer part float32 for inputs without outliers. empty: columns to leave out"""
        scale = self.input_scale
        if scale is None:
            scale = self.inputs.scale_of(x.abs().amax(1, keepdim=True))
        # In float32: a scale of one element without dimensions would leave the quotient in bf16.
        levels = (x.float() / scale).round_()
        if self.inputs.static:
            levels.clamp_(-self.inputs.largest, self.inputs.largest)
        levels = levels.to(torch.int8)
        if empty is not None:
            levels.index_fill_(1, empty, 0)
        return self._multiply(levels).mul(self.scale * scale)

    def _multiply(self, levels: Tensor) -> Tensor:
        """levels int8 (tokens, in) times the weight, int32 (tokens, out)."""
        rows = len(levels)
        if levels.is_cuda and rows < CUDA_ROWS:
            levels = nn.functional.pad(levels, (0, 0, 0, CUDA_ROWS - rows))
        return torch._int_mm(levels, self.weight.T)[:rows]
