"""The embedding of a checkpoint whose embedding is quantized: rows of a tied head's weight, where its
kernel's layout can give them, or codes of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.kernels.cpu_linear import CpuWeight
from compress.kernels.packed_linear import TritonWeight
from compress.quantize.qtensor import QTensor
from compress.runtime.weights import PackedWeight

# Rows looked up at once: with each come those that share its block.
AT_ONCE = 1024


def packed_embedding(
    q: QTensor, head: PackedWeight | None, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """tokens int64 (...) -> (..., hidden). head: the weight that a tied head made of the same QTensor"""
    if isinstance(head, CpuWeight) or (isinstance(head, TritonWeight) and q.block is None):
        return HeadRows(head, dtype)
    return PackedEmbedding(q).to(device)


class HeadRows(nn.Module):
    """Rows of the head's weight as they are looked up: there is no other copy."""

    def __init__(self, head: CpuWeight | TritonWeight, dtype: torch.dtype):
        super().__init__()
        self.head, self.dtype = head, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        parts = [self._rows(part) for part in tokens.flatten().split(AT_ONCE)]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        return rows.unflatten(0, tokens.shape)

    def _rows(self, index: Tensor) -> Tensor:
        if isinstance(self.head, CpuWeight):
            return self.head.rows(index)
        return self.head.rows(index, self.dtype)


class PackedEmbedding(nn.Module):
    """An embedding whose rows stay in codes and are dequantized as they are looked up.

    tokens int64 (...) -> (..., hidden) in the dtype of the scales, bit for bit what the dense
    embedding would give. Byte j of a row holds the codes of columns j, j + w, ... with w the bytes of a
    row: as few operations as possible for the single row of a decoded token.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    shifts: Tensor

    def __init__(self, q: QTensor):
        super().__init__()
        assert (q.type, q.block) == ("int", None), (
            "only integers in groups or rows have an embedding's format"
        )
        self.bits = q.bits
        planes = 8 // q.bits
        parts = q.codes.chunk(planes, dim=1)
        packed = parts[0].clone()
        for plane, part in enumerate(parts[1:], start=1):
            packed |= part << (plane * q.bits)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scale", q.scale, persistent=False)
        self.register_buffer("zero", q.zero, persistent=False)
        shifts = torch.arange(planes, dtype=torch.uint8) * q.bits
        self.register_buffer("shifts", shifts[:, None], persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = tokens.flatten()
        codes = self.packed[rows]
        if self.bits < 8:
            codes = ((codes.unsqueeze(-2) >> self.shifts) & (2**self.bits - 1)).flatten(-2)
        zero = None if self.zero is None else self.zero[rows]
        q = QTensor(codes, self.scale[rows], zero, self.bits)
        return q.dequantize(self.scale.dtype).unflatten(0, tokens.shape)
