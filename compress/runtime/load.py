"""An exported folder as a running transformers model, read by our own readers.

``load_dense`` gives the weights the integers stand for, and rounds the inputs of a linear where its
scheme does: the numbers to judge accuracy by.
``load_packed`` keeps them packed and runs them through a kernel where one fits: the speed to
expect.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.export.formats import Weights
from compress.kernels import dense
from compress.kernels.fusion import Fusion
from compress.model.families import family_of
from compress.model.folder import ModelFolder, reading
from compress.model.skeleton import assign, check_tensor, dtype_in, empty_model, finite
from compress.quantize.qtensor import QTensor
from compress.runtime.embedding import packed_embedding
from compress.runtime.weights import PackedWeight, pack

log = logging.getLogger(__name__)


class PackedLinear(nn.Module):
    """A linear whose weight stays in codes. x bf16 (..., in) -> bf16 (..., out)."""

    def __init__(self, weight: PackedWeight, bias: Tensor | None):
        super().__init__()
        self.weight = weight
        self.fusion = Fusion(bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.fused(x, self.fusion)


def load_dense(folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with every weight dequantized.

    Tensors are copied out of the memory map, which would hold the whole file otherwise. A weight for 16-bit
    inputs is first rounded to the dtype of the checkpoint, as engines do, then widened; one for rounded
    inputs is not: there engines multiply the codes, and the scales after them.
    """
    weights, family = Weights(folder), family_of(folder.config)
    model = empty_model(folder, dtype)
    for name in weights.names:
        value = weights.get(name)
        if isinstance(value, QTensor):
            with reading(f"{folder.path}: {name}"):
                _attach_inputs(model, name, value, device)
                value = value.dequantize(folder.dtype if value.inputs is None else dtype)
            # Codes of floats have some that are no number.
            finite(folder, name, value)
        own = dtype_in(name, family, dtype)
        assign(model, name, value.to(device=device, dtype=own, copy=True), folder)
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
            check_tensor(model, name, tuple(value.shape), folder)
            packed = pack(value, device, folder.dtype)
            if packed is not None:
                kernel, weight = packed
                kernels[kernel] += 1
                if base == embedding:
                    _replace_embedding(model, folder, base, value, weight, device)
                else:
                    _replace_linear(model, folder, base, weight)
                continue
            kernels[dense.name_of(value)] += 1
            _attach_inputs(model, name, value, device)
            value = value.dequantize(folder.dtype)
        own = dtype_in(name, family_of(folder.config), folder.dtype)
        assign(model, name, value.to(device=device, dtype=own, copy=True), folder)
    if kernels[dense.UPCAST]:
        log.info(
            "%d linears in 8-bit floats: for want of a kernel the same numbers are computed in %s",
            kernels[dense.UPCAST],
            str(folder.dtype).removeprefix("torch."),
        )
    return _ready(model, folder, device), dict(+kernels)


def _replace_linear(model: Any, folder: ModelFolder, base: str, weight: PackedWeight) -> None:
    linear = model.get_submodule(base)
    # Biases are listed before the quantized weights, so a bias is in its place by now.
    if linear.bias is not None and linear.bias.is_meta:
        raise UserError(
            f"{folder.path} holds no tensor {base}.bias, which its config.json asks for"
        )
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
    if folder.tied_head:
        _replace_linear(model, folder, family_of(folder.config).head, weight)
        # They share a weight that is no parameter: nobody is to tie them anew, as lm-eval would.
        model.config.tie_word_embeddings = False
    tied = weight if folder.tied_head else None
    model.set_submodule(base, packed_embedding(q, tied, device, folder.dtype))


def _ready(model: Any, folder: ModelFolder, device: torch.device) -> Any:
    if folder.tied_head and isinstance(model.get_input_embeddings(), nn.Embedding):
        model.tie_weights()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise UserError(f"{folder.path} lacks {len(missing)} tensors, the first is {missing[0]}")
    return model.to(device)
