"""W4A16 on the CPU: y = x W^T with W in 4-bit codes, through torch's packed int4 kernel.

x (tokens, in); W (out, in). Codes of fewer bits fit the same kernel and run at its speed: a 3-bit
weight then takes 4 bits in memory. The kernel takes bf16 activations and stores scale and offset in
bf16: at 4 bits the offset (8 - zero) * scale is rounded, an error of at most 1/64 of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.fusion import Fusion, around
from compress.quantize.qtensor import QTensor

NAME = "int4-cpu"
GROUP_SIZES = (256, 128, 64, 32)
# The kernel works on tiles of this many output rows.
ROWS = 16


def reference(x: Tensor, q: QTensor) -> Tensor:
    """What the kernel computes, in float32 from the dequantized weight."""
    return x.float() @ q.dequantize(torch.float32).T


def supports(q: QTensor, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``Int4Weight`` can run this weight here."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and q.type == "int"
        and q.bits <= 4
        and q.inputs is None
        and q.shape[0] % ROWS == 0
        and _kernel_group(q) is not None
    )


def _kernel_group(q: QTensor) -> int | None:
    """The largest group the kernel knows that divides the weight's own groups."""
    return next((size for size in GROUP_SIZES if q.group_size % size == 0), None)


@dataclass(frozen=True)
class Int4Weight:
    """A weight in the kernel's layout. packed: its own; scales_and_offsets bf16 (groups, out, 2)."""

    packed: Tensor
    scales_and_offsets: Tensor
    group_size: int
    out_features: int

    @classmethod
    def pack(cls, q: QTensor) -> Int4Weight:
        """Repack once at load."""
        group = _kernel_group(q)
        assert group is not None, "supports() comes first"
        repeat = q.group_size // group
        zero = torch.full_like(q.scale, 2 ** (q.bits - 1)) if q.zero is None else q.zero
        # The kernel computes (code - 8) * scale + offset. Codes of fewer bits have room to move up
        # until their zero is at 8, where the offset vanishes and with it its rounding.
        up = (8 - zero.float()).clamp(0, 16 - 2**q.bits)
        codes = q.codes.unflatten(1, (q.scale.shape[1], -1)) + up.unsqueeze(-1)
        offset = (8 - zero.float() - up) * q.scale.float()
        pair = torch.stack([q.scale.float(), offset], dim=-1).repeat_interleave(repeat, dim=1)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            codes.flatten(1).to(torch.int32), 1
        )
        return cls(packed, pair.transpose(0, 1).to(torch.bfloat16).contiguous(), group, q.shape[0])

    def matmul(self, x: Tensor) -> Tensor:
        """x bf16 (..., in) -> bf16 (..., out)."""
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.flatten(0, -2), self.packed, self.group_size, self.scales_and_offsets
        )
        return y.unflatten(0, x.shape[:-1])

    def fused(self, x: Tensor, fusion: Fusion, residual: Tensor | None = None) -> Tensor:
        """The product with what surrounds it, step by step."""
        return around(self.matmul, x, fusion, residual)
