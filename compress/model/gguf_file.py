"""A GGUF file, as llama.cpp reads it, opened as if it were safetensors: names, one tensor at a time.

Tensors have the names and the order of rows of a Hugging Face folder. Those in 16 or 32 bits are
``NAME.weight`` and ``NAME.bias``; a quantized weight (out, in) is ``NAME.TYPE``, as in
``model.layers.0.mlp.up_proj.Q4_0``: the bytes of its rows, uint8 (out, bytes). What they mean is not known
here; see compress.export.gguf_blocks.
"""

from __future__ import annotations

import functools
import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import UserError

SUFFIX = ".gguf"
# What llama.cpp calls the modules of a model, and those of its blocks, beside our names.
MODULES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYERS, BLOCKS = "model.layers", "blk"
OF_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Model types and the architecture that llama.cpp runs them as.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
# The one that turns neighbouring channels by position, where ours turn (i, i + head size / 2); and the
# modules whose rows are therefore stored in another order, with the key of the number of their heads.
INTERLEAVED = "llama"
TURNED = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
# A table that follows from config.json.
DERIVED = "rope_freqs.weight"
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def gguf_name(name: str) -> str:
    """What llama.cpp calls a tensor of ours, as in ``model.layers.0.mlp.up_proj.weight``."""
    module, _, part = name.rpartition(".")
    if module in MODULES:
        return f"{MODULES[module]}.{part}"
    found = re.fullmatch(rf"{LAYERS}\.(\d+)\.(.+)", module)
    if found is None or found[2] not in OF_BLOCK:
        raise UserError(f"llama.cpp has no place for {name} in this architecture")
    return f"{BLOCKS}.{found[1]}.{OF_BLOCK[found[2]]}.{part}"


def our_name(name: str) -> str | None:
    """The reverse of ``gguf_name``; None for a name that it never gives."""
    module, _, part = name.rpartition(".")
    ours = {theirs: ours for ours, theirs in MODULES.items()}
    if module in ours:
        return f"{ours[module]}.{part}"
    of_block = {theirs: ours for ours, theirs in OF_BLOCK.items()}
    found = re.fullmatch(rf"{BLOCKS}\.(\d+)\.(\w+)", module)
    if found is None or found[2] not in of_block:
        return None
    return f"{LAYERS}.{found[1]}.{of_block[found[2]]}.{part}"


def rotary_order(rows: int, heads: int) -> Tensor:
    """Where each stored row of queries or keys comes from, int64 (rows,): channel i of a head is followed by
    the one that is turned with it, i + head size / 2."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def heads_of(name: str, config: Mapping[str, Any]) -> int | None:
    """How many heads the rows of a tensor of llama.cpp's name belong to, if they are stored in another order.

    config: numbers of heads by the names that GGUF has for them, and ``general.architecture``
    """
    key = TURNED.get(name.split(".")[2]) if name.startswith(f"{BLOCKS}.") else None
    if key is None or config["general.architecture"] != INTERLEAVED:
        return None
    return int(config[key])


@dataclass(frozen=True)
class Entry:
    """A tensor of the file. shape: of its values, the last dimension in a row; heads: as in ``heads_of``"""

    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    heads: int | None


@dataclass(frozen=True)
class _Slice:
    shape: tuple[int, ...]
    dtype: str

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype


class GGUFFile:
    """Read access to a file, with the methods of safetensors that ``ModelFolder`` calls.

    dtype: of the model. Norms and biases, which the file holds in 32 bits, are given in it if it holds them
    exactly. config: the config.json beside it. Raises UserError for a file that is no GGUF of an architecture
    known here, or of another model than the config: its heads say in which order rows are stored.
    """

    def __init__(self, path: Path, dtype: torch.dtype | None, config: Mapping[str, Any]):
        self.path, self._dtype = path, dtype
        if not path.is_file():
            raise UserError(f"{path} is missing, or no file")
        self._entries, stated = _header(path, path.stat().st_mtime_ns)
        heads = config.get("num_attention_heads")
        asked = {
            "general.architecture": ARCHITECTURES.get(str(config.get("model_type"))),
            TURNED["attn_q"]: heads,
            TURNED["attn_k"]: config.get("num_key_value_heads") or heads,
        }
        for key, value in asked.items():
            # What a config.json lacks, or has and should not, is told where that is looked at.
            if value is not None and stated[key] != value:
                raise UserError(
                    f"{path} has {key} {stated[key]}, its config.json asks for {value}: they belong to "
                    "different models"
                )

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def keys(self) -> list[str]:
        return list(self._entries)

    def get_tensor(self, name: str) -> Tensor:
        entry = self._entries[name]
        stored = np.fromfile(self.path, np.uint8, count=entry.nbytes, offset=entry.offset)
        rows = torch.from_numpy(stored)
        if entry.type in PLAIN:
            rows = rows.view(PLAIN[entry.type]).view(entry.shape)
            if self._dtype is not None:
                rounded = rows.to(self._dtype)
                rows = rounded if torch.equal(rounded.to(rows.dtype), rows) else rows
        else:
            rows = rows.view(entry.shape[0], -1)
        if entry.heads is not None:
            rows = rows[rotary_order(len(rows), entry.heads).argsort()]
        return rows

    def get_slice(self, name: str) -> _Slice:
        """Shape and type as they are stored."""
        entry = self._entries[name]
        if entry.type in PLAIN:
            return _Slice(entry.shape, entry.type)
        return _Slice((entry.shape[0], entry.nbytes // entry.shape[0]), "U8")


@functools.lru_cache(maxsize=8)
def _header(path: Path, changed: int) -> tuple[dict[str, Entry], dict[str, Any]]:
    """The tensors of a file by our names, and what ``heads_of`` asks for.

    changed: when the file was, so that another one of the same name is read anew
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stored,
        ):
            config, tensors, start = _parsed(stored)
        architecture = str(config["general.architecture"])
        count = config[f"{architecture}.{TURNED['attn_q']}"]
    except (ValueError, LookupError, TypeError, ArithmeticError, struct.error) as error:
        raise UserError(f"{path} is not a readable GGUF file: {error}") from error
    if architecture not in ARCHITECTURES.values():
        known = ", ".join(sorted(set(ARCHITECTURES.values())))
        raise UserError(f"{path} is of architecture {architecture!r}, read here are {known}")
    shared = config.get(f"{architecture}.{TURNED['attn_k']}", count)
    if not all(type(heads) is int for heads in (count, shared)):
        raise UserError(f"{path} has a number of heads for each layer, read here is one for all")
    numbers = {
        "general.architecture": architecture,
        TURNED["attn_q"]: count,
        TURNED["attn_k"]: shared,
    }
    entries: dict[str, Entry] = {}
    kinds = {kind.value: kind for kind in GGMLQuantizationType}
    size = path.stat().st_size
    for theirs, (shape, number, offset) in tensors.items():
        if theirs == DERIVED:
            continue
        name = our_name(theirs)
        if name is None or number not in kinds:
            raise UserError(
                f"{path} has a tensor {theirs} of type {number}, which is not known here"
            )
        kind = kinds[number]
        if kind.name not in PLAIN:
            name = f"{name.removesuffix('.weight')}.{kind.name}"
        per, bytes_of = GGML_QUANT_SIZES[kind]
        length = math.prod(shape) // per * bytes_of
        if start + offset + length > size or length == 0:
            raise UserError(f"{path} ends before its tensor {theirs} does")
        entries[name] = Entry(kind.name, shape, start + offset, length, heads_of(theirs, numbers))
    return entries, numbers


# struct's letters for the types of values, by their numbers in the file; strings and lists are apart.
_VALUES = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _LIST = 8, 9
_Tensors = dict[str, tuple[tuple[int, ...], int, int]]


class _Cursor:
    """Reads one value after the other from a file in memory."""

    def __init__(self, stored: mmap.mmap):
        self.stored, self.place = stored, 0

    def take(self, letters: str) -> tuple[Any, ...]:
        """Numbers, by struct's letters."""
        found = struct.unpack_from(f"<{letters}", self.stored, self.place)
        self.place += struct.calcsize(f"<{letters}")
        return found

    def text(self) -> str:
        (length,) = self.take("Q")
        self.place += length
        return self.stored[self.place - length : self.place].decode("utf-8")

    def value(self) -> Any:
        """A value of any kind; None for a list, which is passed over."""
        (kind,) = self.take("I")
        if kind == _STRING:
            return self.text()
        if kind != _LIST:
            return self.take(_VALUES[kind])[0]
        of, count = self.take("IQ")
        if of != _STRING:
            self.place += count * struct.calcsize(f"<{_VALUES[of]}")
            return None
        for _ in range(count):
            self.place += 8 + struct.unpack_from("<Q", self.stored, self.place)[0]
        return None


def _parsed(stored: mmap.mmap) -> tuple[dict[str, Any], _Tensors, int]:
    """Values by key; shape, type and offset of each tensor; where the first one begins.

    Like the gguf package's reader, which takes seconds for a vocabulary that nobody looks at here.
    """
    file = _Cursor(stored)
    magic, version, tensor_count, key_count = file.take("4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r} and version {version}")
    config: dict[str, Any] = {}
    for _ in range(key_count):
        key = file.text()
        config[key] = file.value()
    tensors: _Tensors = {}
    for _ in range(tensor_count):
        name = file.text()
        shape = file.take(f"{file.take('I')[0]}Q")
        tensors[name] = (tuple(reversed(shape)), *file.take("IQ"))
    alignment = int(config.get("general.alignment", 32))
    return config, tensors, file.place + -file.place % alignment
