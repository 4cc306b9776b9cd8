"""What surrounds the product of a linear in a decoder block, so that a kernel may do it on the way: the norm
before it; bias, gate and residual after it.

x (..., in); y (..., out), half of out where it is gated
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import silu


@dataclass(frozen=True)
class Fusion:
    """norm: weight (in,) of an RMSNorm (arXiv 1910.07467) that x goes through first, with eps under its root
    bias: (out,)
    gated: the first half of the rows are gates of the second (SwiGLU, arXiv 2002.05202): silu(gate) * up
    """

    norm: Tensor | None = None
    eps: float = 0.0
    bias: Tensor | None = None
    gated: bool = False

    def widened(self) -> Fusion:
        """The same in float32."""
        norm, bias = (None if part is None else part.float() for part in (self.norm, self.bias))
        return replace(self, norm=norm, bias=bias)


PLAIN = Fusion()


def around(
    matmul: Callable[[Tensor], Tensor], x: Tensor, fusion: Fusion, residual: Tensor | None = None
) -> Tensor:
    """The product with what surrounds it, step by step in the dtype of x: what a kernel that fuses must
    compute, and what runs where none does. residual: added last, shape of y"""
    if fusion.norm is not None:
        x = rms_norm(x, fusion.norm, fusion.eps)
    y = matmul(x)
    if fusion.bias is not None:
        y = y + fusion.bias
    if fusion.gated:
        gate, up = y.chunk(2, dim=-1)
        y = silu(gate) * up
    return y if residual is None else y + residual


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As transformers computes it: the root in float32, the weight in the dtype of x."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
