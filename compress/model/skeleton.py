"""A transformers model without weights, and how weights get into it piece by piece."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from compress.errors import UserError
from compress.model.folder import CODE, ModelFolder, Shapes
from compress.model.tensor_file import chunks, rows_of

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


def assign(
    module: nn.Module, name: str, tensor: Tensor, folder: ModelFolder, prefix: str = ""
) -> None:
    """Put a tensor of a folder in place of the parameter ``name``. prefix: the module's own name, with a dot

    Raises UserError if there is no such parameter or the shapes differ: the folder and its config.json do not
    belong together.
    """
    check_tensor(module, name, tuple(tensor.shape), folder, prefix)
    owner, _, attribute = name.rpartition(".")
    parameter = nn.Parameter(tensor, requires_grad=False)
    setattr(module.get_submodule(owner), attribute, parameter)


def check_tensor(
    module: nn.Module, name: str, shape: tuple[int, ...], folder: Shapes, prefix: str = ""
) -> None:
    """Raises UserError, as ``assign`` does, for a tensor of this shape."""
    full = prefix + name
    place = folder.place_of(full) if isinstance(folder, ModelFolder) else folder.path
    try:
        asked = tuple(module.get_parameter(name).shape)
    except AttributeError:
        raise UserError(
            f"{place} holds a tensor {full}, which its config.json has no place for"
        ) from None
    if shape != asked:
        raise UserError(f"{place}: {full} has shape {shape}, config.json asks for {asked}")


def finite(folder: ModelFolder, name: str, tensor: Tensor) -> Tensor:
    """Raises UserError for a weight of a folder with NaN or Inf."""
    # In parts: the answers to a large embedding would take half its memory.
    if not all(torch.isfinite(rows).all() for rows in chunks(tensor)):
        raise UserError(f"{folder.place_of(name)}: tensor {name} holds NaN or Inf")
    return tensor


def finite_rows(folder: ModelFolder, name: str) -> Iterator[Tensor]:
    """A tensor in the model's dtype, some rows at a time. Raises UserError if it holds NaN or Inf."""
    for rows in folder.rows(name, rows_of(folder.shape(name), folder.dtype.itemsize)):
        yield finite(folder, name, rows.to(folder.dtype))
