"""An exported folder as a running transformers model, read by our own readers.

``load_dense`` gives the weights the integers stand for, and rounds the inputs of a linear where its
scheme does: the numbers to judge accuracy by.
``load_packed`` keeps them packed and runs them through a kernel where one fits: the speed to
expect.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.export.formats import Weights
from compress.export.packing import pack_rows, unpack_rows
from compress.kernels import int4_cpu, int8_cpu, packed_linear, w8a8
from compress.kernels.fusion import Fusion
from compress.model.families import family_of
from compress.model.folder import ModelFolder
from compress.model.skeleton import assign, empty_model
from compress.quantize.qtensor import QTensor

log = logging.getLogger(__name__)

# What counts as a kernel where none fits: weights dequantized, and 8-bit floats computed in wider ones.
DENSE, UPCAST = "dense", "fp8-upcast"


class PackedWeight(Protocol):
    """A weight in the layout of a kernel."""

    def matmul(self, x: Tensor) -> Tensor: ...

    def fused(self, x: Tensor, fusion: Fusion, residual: Tensor | None = None) -> Tensor: ...


def pack(q: QTensor, device: torch.device, dtype: torch.dtype) -> tuple[str, PackedWeight] | None:
    """The weight in the layout of the kernel that runs it here, and that kernel's name; None if none does."""
    if int4_cpu.supports(q, device, dtype):
        return int4_cpu.NAME, int4_cpu.Int4Weight.pack(q)
    if int8_cpu.supports(q, device, dtype):
        return int8_cpu.NAME, int8_cpu.Int8Weight.pack(q)
    if packed_linear.supports(q, device, dtype):
        return packed_linear.name(q), packed_linear.TritonWeight.pack(q, device)
    if w8a8.supports(q, device, dtype):
        return w8a8.NAME, w8a8.W8A8Weight.pack(q, device)
    return None


class PackedLinear(nn.Module):
    """A linear whose weight stays in codes. x bf16 (..., in) -> bf16 (..., out)."""

    def __init__(self, weight: PackedWeight, bias: Tensor | None):
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.fused(x, Fusion(bias=self.bias))


class PackedEmbedding(nn.Module):
    """An embedding whose rows stay in codes and are dequantized as they are looked up.

    tokens int64 (...) -> (..., hidden) in the dtype of the scales, bit for bit what the dense
    embedding would give.
    """

    def __init__(self, q: QTensor, device: torch.device | None = None):
        super().__init__()
        self.hidden, self.bits = q.shape[1], q.bits
        self.packed, self.scale = pack_rows(q.codes, q.bits).to(device), q.scale.to(device)
        self.zero = None if q.zero is None else q.zero.to(device)

    @staticmethod
    def takes(q: QTensor) -> bool:
        """Whether rows of such a weight can be looked up."""
        return q.type == "int" and q.block is None

    def forward(self, tokens: Tensor) -> Tensor:
        rows = tokens.flatten()
        codes = unpack_rows(self.packed[rows], self.bits, self.hidden)
        zero = None if self.zero is None else self.zero[rows]
        q = QTensor(codes, self.scale[rows], zero, self.bits)
        return q.dequantize(self.scale.dtype).unflatten(0, tokens.shape)


def load_dense(folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with every weight dequantized.

    Tensors are copied out of the memory map, which would hold the whole file otherwise. A weight for 16-bit
    inputs is first rounded to the dtype of the checkpoint, as engines do, then widened; one for rounded
    inputs is not: there engines multiply the codes, and the scales after them.
    """
    weights = Weights(folder)
    model = empty_model(folder, dtype)
    for name in weights.names:
        value = weights.get(name)
        if isinstance(value, QTensor):
            _attach_inputs(model, name, value, device)
            value = value.dequantize(folder.dtype if value.inputs is None else dtype)
        assign(model, name, value.to(device=device, dtype=dtype, copy=True))
    return _ready(model, folder, device)


def _attach_inputs(model: Any, name: str, q: QTensor, device: torch.device) -> None:
    """Let a linear round its inputs as it will where it is served."""
    if q.inputs is None:
        return
    fixed = [None if t is None else t.to(device) for t in (q.input_scale, q.columns)]
    q.inputs.attach(model.get_submodule(name.removesuffix(".weight")), *fixed)


def load_packed(folder: ModelFolder, device: torch.device) -> tuple[Any, dict[str, int]]:
    """The model in the dtype of the checkpoint with quantized linears packed where a kernel fits.

    Returns the model and how many linears of the checkpoint run through which kernel; "dense"
    counts quantized ones that had to be dequantized because none fits, "fp8-upcast" those among them that
    are 8-bit floats. Embedding and head count as linears, a tied one once.
    """
    weights = Weights(folder)
    embedding = family_of(folder.config).embedding if weights.linears else ""
    model = empty_model(folder, folder.dtype)
    kernels: Counter[str] = Counter()
    for name in weights.names:
        value = weights.get(name)
        if isinstance(value, QTensor):
            base = name.removesuffix(".weight")
            takes = base != embedding or PackedEmbedding.takes(value)
            packed = pack(value, device, folder.dtype) if takes else None
            if packed is not None:
                kernel, weight = packed
                kernels[kernel] += 1
                if base == embedding:
                    _replace_embedding(model, folder, base, value, weight, device)
                else:
                    _replace_linear(model, base, value, weight)
                continue
            kernels[UPCAST if (value.type, value.bits) == ("float", 8) else DENSE] += 1
            _attach_inputs(model, name, value, device)
            value = value.dequantize(folder.dtype)
        assign(model, name, value.to(device=device, dtype=folder.dtype, copy=True))
    if kernels[UPCAST]:
        log.info(
            "%d linears in 8-bit floats: for want of a kernel the same numbers are computed in %s",
            kernels[UPCAST],
            str(folder.dtype).removeprefix("torch."),
        )
    return _ready(model, folder, device), dict(+kernels)


def _replace_linear(model: Any, base: str, q: QTensor, weight: PackedWeight) -> None:
    linear = model.get_submodule(base)
    if linear.weight.shape != q.shape:
        raise UserError(f"{base}.weight has shape {tuple(q.shape)}, which config.json contradicts")
    # Biases are listed before the quantized weights, so a bias is in its place by now.
    model.set_submodule(base, PackedLinear(weight, linear.bias))


def _replace_embedding(
    model: Any,
    folder: ModelFolder,
    base: str,
    q: QTensor,
    weight: PackedWeight,
    device: torch.device,
) -> None:
    """Rows are looked up in codes; a tied head runs the same integers through the kernel."""
    if model.get_submodule(base).weight.shape != q.shape:
        raise UserError(f"{base}.weight has shape {tuple(q.shape)}, which config.json contradicts")
    if folder.tied_head:
        _replace_linear(model, family_of(folder.config).head, q, weight)
    model.set_submodule(base, PackedEmbedding(q, device))


def _ready(model: Any, folder: ModelFolder, device: torch.device) -> Any:
    packed = any(isinstance(module, PackedEmbedding) for module in model.modules())
    if folder.tied_head and not packed:
        model.tie_weights()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise UserError(f"{folder.path} lacks {len(missing)} tensors, the first is {missing[0]}")
    return model.to(device)
