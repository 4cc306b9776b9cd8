"""16-bit weights through the library's product: what was never quantized, and what no kernel runs here.

x (..., in); weight (out, in)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear

from compress.kernels.fusion import Fusion, around
from compress.quantize.inputs import InputScheme
from compress.quantize.qtensor import QTensor

# A weight that was dequantized; one that never was quantized.
NAME, UNQUANTIZED = "dense", "16-bit"
# 8-bit floats whose numbers are computed in wider ones.
UPCAST = "fp8-upcast"


def name_of(q: QTensor) -> str:
    """What counts as the kernel of a weight that is dequantized."""
    return UPCAST if (q.type, q.bits) == ("float", 8) else NAME


@dataclass(frozen=True)
class DenseWeight:
    """weight: 16 bits; inputs: how x is rounded first, with input_scale and columns as in QTensor"""

    weight: Tensor
    inputs: InputScheme | None = None
    input_scale: Tensor | None = None
    columns: Tensor | None = None

    def matmul(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if self.inputs is not None:
            x = self.inputs.round(x, self.input_scale, self.columns)
        return linear(x, self.weight)

    def fused(self, x: Tensor, fusion: Fusion, residual: Tensor | None = None) -> Tensor:
        """With what surrounds the product."""
        return around(self.matmul, x, fusion, residual)
