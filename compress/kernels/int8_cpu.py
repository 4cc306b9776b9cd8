"""W8A16 on the CPU: y = x W^T with W in int8, one scale a row, through torch's packed int8 kernel for a few
tokens and the bf16 matmul for more.

x bf16 (tokens, in); W (out, in)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.fusion import Fusion, around
from compress.quantize.qtensor import QTensor

NAME = "int8-cpu"
# The kernel reads rows in steps of this many columns, and beyond their end if they are shorter.
COLUMNS = 32
# It starts anew for every token: from some ten on the bf16 matmul is faster, its copy of the weight included.
ROWS = 8


def reference(x: Tensor, q: QTensor) -> Tensor:
    """What the kernel computes, in float32 from the dequantized weight."""
    return x.float() @ q.dequantize(torch.float32).T


def supports(q: QTensor, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``Int8Weight`` can run this weight here."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and (q.type, q.bits) == ("int", 8)
        and q.zero is None
        and q.shape[1] % COLUMNS == 0
        and tuple(q.scale.shape) in ((1, 1), (q.shape[0], 1))
        and q.inputs is None
    )


@dataclass(frozen=True)
class Int8Weight:
    """weight: int8 (out, in); scale: bf16 (out,)"""

    weight: Tensor
    scale: Tensor

    @classmethod
    def pack(cls, q: QTensor) -> Int8Weight:
        """Arrange once at load."""
        scale = q.scale.flatten().to(torch.bfloat16).expand(q.shape[0]).contiguous()
        return cls((q.codes ^ 128).view(torch.int8).contiguous(), scale)

    def matmul(self, x: Tensor) -> Tensor:
        """x bf16 (..., in) -> bf16 (..., out)."""
        flat = x.flatten(0, -2).contiguous()
        if len(flat) > ROWS:
            y = (flat @ self.weight.to(x.dtype).T).mul_(self.scale)
        else:
            y = torch.ops.aten._weight_int8pack_mm(flat, self.weight, self.scale)
        return y.unflatten(0, x.shape[:-1])

    def fused(self, x: Tensor, fusion: Fusion, residual: Tensor | None = None) -> Tensor:
        """The product with what surrounds it, step by step."""
        return around(self.matmul, x, fusion, residual)
