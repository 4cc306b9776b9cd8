"""An exported folder as a running transformers model, read by our own readers.

``load_dense`` gives the weights the integers stand for: the numbers to judge accuracy by.
``load_packed`` keeps them packed and runs them through a kernel where one fits: the speed to
expect.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.export.formats import Weights
from compress.export.packing import pack_rows, unpack_rows
from compress.kernels import int4_cpu
from compress.model.families import family_of
from compress.model.folder import ModelFolder
from compress.model.skeleton import assign, empty_model
from compress.quantize.qtensor import QTensor


class PackedLinear(nn.Module):
    """A linear whose weight stays in 4-bit codes. x bf16 (..., in) -> bf16 (..., out)."""

    def __init__(self, weight: int4_cpu.Int4Weight, bias: Tensor | None):
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight.matmul(x)
        return y if self.bias is None else y + self.bias


class PackedEmbedding(nn.Module):
    """An embedding whose rows stay in codes and are dequantized as they are looked up.

    tokens int64 (...) -> (..., hidden) in the dtype of the scales, bit for bit what the dense
    embedding would give.
    """

    def __init__(self, q: QTensor):
        super().__init__()
        self.hidden, self.bits = q.shape[1], q.bits
        self.packed, self.scale, self.zero = pack_rows(q.codes, q.bits), q.scale, q.zero

    def forward(self, tokens: Tensor) -> Tensor:
        rows = tokens.flatten()
        codes = unpack_rows(self.packed[rows], self.bits, self.hidden)
        zero = None if self.zero is None else self.zero[rows]
        q = QTensor(codes, self.scale[rows], zero, self.bits)
        return q.dequantize(self.scale.dtype).unflatten(0, tokens.shape)


def load_dense(folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with every weight dequantized.

    Tensors are copied out of the memory map, which would hold the whole file otherwise. A quantized
    weight is first rounded to the dtype of the checkpoint, as engines do, then widened.
    """
    weights = Weights(folder)
    model = empty_model(folder, dtype)
    for name in weights.names:
        value = weights.get(name)
        tensor = value.dequantize(folder.dtype) if isinstance(value, QTensor) else value
        assign(model, name, tensor.to(device=device, dtype=dtype, copy=True))
    return _ready(model, folder, device)


def load_packed(folder: ModelFolder, device: torch.device) -> tuple[Any, dict[str, int]]:
    """The model in the dtype of the checkpoint with quantized linears packed where a kernel fits.

    Returns the model and how many linears of the checkpoint run through which kernel; "dense"
    counts quantized ones that had to be dequantized because none fits. Embedding and head count as
    linears, a tied one once.
    """
    weights = Weights(folder)
    embedding = family_of(folder.config).embedding if weights.linears else ""
    model = empty_model(folder, folder.dtype)
    kernels: Counter[str] = Counter()
    for name in weights.names:
        value = weights.get(name)
        if isinstance(value, QTensor):
            base = name.removesuffix(".weight")
            if int4_cpu.supports(value, device, folder.dtype):
                kernels[int4_cpu.NAME] += 1
                if base == embedding:
                    _replace_embedding(model, folder, base, value)
                else:
                    _replace_linear(model, base, value)
                continue
            kernels["dense"] += 1
            value = value.dequantize(folder.dtype)
        assign(model, name, value.to(device=device, dtype=folder.dtype, copy=True))
    return _ready(model, folder, device), dict(kernels)


def _replace_linear(model: Any, base: str, q: QTensor) -> None:
    linear = model.get_submodule(base)
    if linear.weight.shape != q.shape:
        raise UserError(f"{base}.weight has shape {tuple(q.shape)}, which config.json contradicts")
    # Biases are listed before the quantized weights, so a bias is in its place by now.
    model.set_submodule(base, PackedLinear(int4_cpu.Int4Weight.pack(q), linear.bias))


def _replace_embedding(model: Any, folder: ModelFolder, base: str, q: QTensor) -> None:
    """Rows are looked up in codes; a tied head runs the same integers through the kernel."""
    if model.get_submodule(base).weight.shape != q.shape:
        raise UserError(f"{base}.weight has shape {tuple(q.shape)}, which config.json contradicts")
    if folder.tied_head:
        _replace_linear(model, family_of(folder.config).head, q)
    model.set_submodule(base, PackedEmbedding(q))


def _ready(model: Any, folder: ModelFolder, device: torch.device) -> Any:
    packed = any(isinstance(module, PackedEmbedding) for module in model.modules())
    if folder.tied_head and not packed:
        model.tie_weights()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise UserError(f"{folder.path} lacks {len(missing)} tensors, the first is {missing[0]}")
    return model.to(device)
