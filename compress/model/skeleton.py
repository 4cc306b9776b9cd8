"""A transformers model without weights, and how weights get into it piece by piece."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from compress.errors import UserError
from compress.model.folder import ModelFolder

# The elementwise functions that torch gives to MKL's vector library on x86 (aten/src/ATen/cpu/vml.h).
VECTOR_MATH = "acos asin atan cos erf erfc erfinv exp log log10 log2 sin sqrt tan tanh trunc"


@functools.cache
def settle_vector_math() -> None:
    """Have MKL choose its vector functions before threads call them; once in a process.

    MKL 2024 chooses one at its first call. Where that call comes from several threads at a time, one
    of them may compute its share with half the bits: a process in a hundred on a busy machine, in its first
    rotary embedding (pytorch/pytorch#188792). A single element stays on the calling thread.
    """
    for dtype in (torch.float32, torch.float64):
        for name in VECTOR_MATH.split():
            getattr(torch, name)(torch.full((1,), 0.5, dtype=dtype))


def empty_model(folder: ModelFolder, dtype: torch.dtype) -> Any:
    """The transformers model of a folder, all parameters on the meta device, in eval mode.

    Buffers that no checkpoint stores (rotary frequencies) are real, on the CPU.
    """
    try:
        return model_of(folder.config, dtype)
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder.path}/config.json is not usable: {error}") from error


def model_of(settings: dict[str, Any], dtype: torch.dtype) -> Any:
    """The same of a config.json by itself. Raises ValueError or TypeError for one that does not fit."""
    settle_vector_math()
    config = AutoConfig.for_model(
        **{k: v for k, v in settings.items() if k != "quantization_config"}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for path, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            # In this library such modules (rotary embeddings) are built from the config alone.
            model.set_submodule(path, type(module)(config))
    return model.eval()


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in place of the parameter ``name``.

    Raises UserError if the model has no such parameter or the shapes differ: the file and its
    config.json do not belong together.
    """
    try:
        expected = model.get_parameter(name).shape
    except AttributeError:
        raise UserError(f"the model of this config.json has no tensor {name}") from None
    if tensor.shape != expected:
        raise UserError(
            f"tensor {name} has shape {tuple(tensor.shape)}, config.json asks for {tuple(expected)}"
        )
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
