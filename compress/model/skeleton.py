"""A transformers model without weights, and how weights get into it piece by piece."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from compress.errors import UserError
from compress.model.folder import CODE, ModelFolder

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
    except ValueError as error:
        raise UserError(f"{folder.path}/config.json is not usable: {error}") from error


def model_of(settings: dict[str, Any], dtype: torch.dtype) -> Any:
    """The same of a config.json by itself. Raises ValueError for one that does not fit."""
    settle_vector_math()
    check_settings(settings)
    try:
        config = AutoConfig.for_model(**{k: v for k, v in settings.items() if k not in IGNORED})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for path, module in list(model.named_modules()):
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                # In this library such modules (rotary embeddings) are built from the config alone.
                model.set_submodule(path, type(module)(config))
    except Exception as error:
        # Whatever the library raises while it takes in a config is for want of a check there.
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{type(error).__name__}: {reason}") from error
    return model.eval()


# What is not taken from a config.json: how weights are stored, which our own readers know, and which code
# computes attention, which is chosen here.
IGNORED = ("quantization_config", *CODE)
# The sizes that a config.json must state and those it may, with the most that is believed.
REQUIRED = {
    "vocab_size": 2**26,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**16,
}
OPTIONAL = {"num_key_value_heads": 2**16, "head_dim": 2**16, "max_position_embeddings": 2**40}
# Numbers above 0.
POSITIVE = ("rms_norm_eps", "rope_theta")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises ValueError, with the key and what it may be, for sizes in a config.json that no model has."""
    for key, most in (REQUIRED | OPTIONAL).items():
        value = settings.get(key)
        if value is None and key in OPTIONAL:
            continue
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{key}={_short(value)} is not a number from 1 to {most}")
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    shared = settings.get("num_key_value_heads") or heads
    if settings.get("head_dim") is None and hidden % heads:
        raise ValueError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
    if heads % shared:
        raise ValueError(
            f"num_attention_heads={heads} is not a multiple of num_key_value_heads={shared}"
        )
    if (size := settings.get("head_dim") or hidden // heads) % 2:
        raise ValueError(
            f"heads of {size} channels cannot be turned by position: an even number can"
        )
    for key in POSITIVE:
        value = settings.get(key)
        if value is not None and not (_is_number(value) and 0 < value < math.inf):
            raise ValueError(f"{key}={_short(value)} is not a number above 0")
    if not isinstance(settings.get("tie_word_embeddings", False), bool):
        raise ValueError("tie_word_embeddings is neither true nor false")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    """A value from a file, at a length that fits a sentence."""
    return text if len(text := repr(value)) <= 40 else f"{text[:40]}..."


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


def finite(folder: ModelFolder, name: str, tensor: Tensor) -> Tensor:
    """Raises UserError for a weight of a folder with NaN or Inf."""
    if not torch.isfinite(tensor).all():
        raise UserError(f"{folder.path}: tensor {name} holds NaN or Inf")
    return tensor
