"""A transformers model without weights, and how weights get into it piece by piece."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from compress.errors import UserError
from compress.model.added import check_blocks, check_modules
from compress.model.experts import unpack
from compress.model.families import FAMILIES, Family, family_of
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
    """The same of a config.json by itself. Raises ValueError for one that does not fit, or that the family
    which a person added for it does not fit."""
    family = family_of(settings)
    check_settings(settings, family)
    model = bare_model(settings, dtype)
    if family in FAMILIES:
        as_stored(model, family)
    else:
        check_modules(model, family)
        as_stored(model, family)
        check_blocks(model, family)
    return model


def bare_model(settings: dict[str, Any], dtype: torch.dtype) -> Any:
    """The same of any type, as transformers builds it. Raises ValueError as ``model_of`` does."""
    settle_vector_math()
    try:
        plain = {k: _plain(v) for k, v in settings.items() if k not in IGNORED}
        config = AutoConfig.for_model(**plain)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        # Whatever the library raises while it takes in a config is for want of a check there.
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{type(error).__name__}: {reason}") from error
    return model.eval()


def _plain(value: Any) -> Any:
    """A value of a config.json, numbers that JSON does not have in place of what stands for them."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


# What is not taken from a config.json: how weights are stored, which our own readers know, and which code
# computes attention, which is chosen here.
IGNORED = ("quantization_config", *CODE)
# The sizes that a config.json must state and those it may, by Llama's names, with the most that is believed.
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


def as_stored(model: nn.Module, family: Family) -> None:
    """Give the modules of a model the names and the kinds that its checkpoints have."""
    for layer in model.get_submodule(family.blocks).children():
        for name in family.transposed:
            layer.set_submodule(name, as_linear(layer.get_submodule(name)))
        if family.experts is not None:
            unpack(layer, family.experts)
    if family.head != family.head_module:
        head = model.get_submodule(family.head_module)
        delattr(model, family.head_module)
        model.add_module(family.head, head)
        object.__setattr__(model, family.head_module, head)


def as_linear(conv: Any) -> nn.Linear:
    """A linear without weights in place of transformers' Conv1D, whose weight lies the other way."""
    return nn.Linear(conv.nx, conv.nf, device="meta", dtype=conv.weight.dtype)


def check_settings(settings: Mapping[str, Any], family: Family) -> None:
    """Raises ValueError, with the key and what it may be, for sizes in a config.json that no model has."""
    for name, most in (REQUIRED | OPTIONAL).items():
        key = family.settings.get(name, name)
        value = settings.get(key)
        if not key or (value is None and name in OPTIONAL):
            continue
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{key}={_short(value)} is not a number from 1 to {most}")
    _check_heads(settings, family)
    _check_others(settings)


def _check_heads(settings: Mapping[str, Any], family: Family) -> None:
    names = {n: family.settings.get(n, n) for n in (REQUIRED | OPTIONAL)}
    hidden, heads = names["hidden_size"], names["num_attention_heads"]
    if not heads:
        return
    width, count = settings[hidden], settings[heads]
    shared = settings.get(names["num_key_value_heads"]) or count
    if settings.get("head_dim") is None and width % count:
        raise ValueError(f"{hidden}={width} is not a multiple of {heads}={count}")
    if count % shared:
        raise ValueError(
            f"{heads}={count} is not a multiple of {names['num_key_value_heads']}={shared}"
        )
    if family.rotary and (size := settings.get("head_dim") or width // count) % 2:
        raise ValueError(
            f"heads of {size} channels cannot be turned by position: an even number can"
        )


def _check_others(settings: Mapping[str, Any]) -> None:
    for key in POSITIVE:
        value = settings.get(key)
        if value is not None and not (_is_number(value) and 0 < value < math.inf):
            raise ValueError(f"{key}={_short(value)} is not a number above 0")
    width, hidden = settings.get("word_embed_proj_dim"), settings.get("hidden_size")
    if width is not None and width != hidden:
        raise ValueError(
            f"word_embed_proj_dim={_short(width)} is not hidden_size={hidden}: not read here"
        )
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
    """Put a tensor of a folder in place of the parameter or buffer ``name``. prefix: the module's own name,
    with a dot

    Raises UserError if there is no such one or the shapes differ: the folder and its config.json do not
    belong together.
    """
    check_tensor(module, name, tuple(tensor.shape), folder, prefix)
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    held = attribute in owner._buffers
    setattr(owner, attribute, tensor if held else nn.Parameter(tensor, requires_grad=False))


def check_tensor(
    module: nn.Module, name: str, shape: tuple[int, ...], folder: Shapes, prefix: str = ""
) -> None:
    """Raises UserError, as ``assign`` does, for a tensor of this shape."""
    full = prefix + name
    place = folder.place_of(full) if isinstance(folder, ModelFolder) else folder.path
    path, _, attribute = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
        expected = (owner._parameters | owner._buffers)[attribute]
    except (AttributeError, KeyError):
        expected = None
    if expected is None:
        raise UserError(f"{place} holds a tensor {full}, which its config.json has no place for")
    if shape != (asked := tuple(expected.shape)):
        raise UserError(f"{place}: {full} has shape {shape}, config.json asks for {asked}")


def dtype_in(name: str, family: Family, dtype: torch.dtype) -> torch.dtype:
    """The type of a tensor in a model of this type."""
    return torch.float32 if family.wide and name.endswith(family.wide) else dtype


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
