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
from compress.model.families import FAMILIES, MOST_EXPERTS, Family, family_of, heads_of

SUFFIX = ".gguf"
BLOCKS = "blk"
_ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
}
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_LLAMA = _ATTENTION | _MLP
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_FALCON = {
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
# What llama.cpp calls the modules of a family's blocks, beside our names, by the name of the family; of all
# experts of a block, ``{}`` in ours, it has one tensor.
OF_BLOCK: dict[str, dict[str, str]] = {
    "llama": _LLAMA,
    "qwen3": _LLAMA | _HEAD_NORMS,
    "smollm3": _LLAMA,
    "gemma2": _LLAMA | _POST_NORMS,
    "gemma3": _LLAMA | _POST_NORMS | _HEAD_NORMS,
    "olmo2": _LLAMA | _POST_NORMS | _HEAD_NORMS,
    "phi3": _ATTENTION
    | {
        "self_attn.qkv_proj": "attn_qkv",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    "mixtral": _ATTENTION
    | {
        "block_sparse_moe.gate": "ffn_gate_inp",
        "block_sparse_moe.experts.{}.w1": "ffn_gate_exps",
        "block_sparse_moe.experts.{}.w2": "ffn_down_exps",
        "block_sparse_moe.experts.{}.w3": "ffn_up_exps",
    },
    "qwen_moe": _ATTENTION
    | _HEAD_NORMS
    | {
        "mlp.gate": "ffn_gate_inp",
        "mlp.experts.{}.gate_proj": "ffn_gate_exps",
        "mlp.experts.{}.up_proj": "ffn_up_exps",
        "mlp.experts.{}.down_proj": "ffn_down_exps",
        "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
        "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
        "mlp.shared_expert.up_proj": "ffn_up_shexp",
        "mlp.shared_expert.down_proj": "ffn_down_shexp",
    },
    "gpt_neox": {
        "input_layernorm": "attn_norm",
        "attention.query_key_value": "attn_qkv",
        "attention.dense": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
    "gpt2": {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
    "falcon": {"input_layernorm": "attn_norm", **_FALCON},
    "falcon with two norms": {"ln_mlp": "attn_norm", "ln_attn": "attn_norm_2", **_FALCON},
}
# The same outside of blocks, beside embedding, final norm and head.
OF_MODEL = {"gpt2": {"transformer.wpe": "position_embd"}}
# Model types and the architecture that llama.cpp runs them as.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gpt_neox": "gptneox",
    "gpt2": "gpt2",
    "falcon": "falcon",
}
# Those that turn neighbouring channels by position, where ours turn (i, i + head size / 2).
INTERLEAVED = ("llama", "smollm3")
# Those whose queries, keys and values are one linear, here head by head, there all of each together.
GATHERED = ("gptneox", "falcon")
# What is no norm or bias and in 32 bits all the same; and what has one row here, and there no rows.
PRECISE, FLAT = ("ffn_gate_inp", "ffn_gate_inp_shexp"), "ffn_gate_inp_shexp"
# Tables that follow from config.json.
DERIVED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Shape, number of the type, and offset of each tensor.
_Tensors = dict[str, tuple[tuple[int, ...], int, int]]
_HEADS, _KEY_HEADS = "attention.head_count", "attention.head_count_kv"


def _modules(family: Family) -> dict[str, str]:
    """What llama.cpp calls the modules outside of blocks, beside our names."""
    modules = {family.embedding: "token_embd", family.final_norm: "output_norm"}
    return modules | {family.head: "output"} | OF_MODEL.get(family.name, {})


def place_of(name: str, family: Family) -> tuple[str, int | None]:
    """What llama.cpp calls the tensor that holds one of ours, as in ``model.layers.0.mlp.up_proj.weight``,
    and of an expert's its number."""
    module, _, part = name.rpartition(".")
    modules = _modules(family)
    if module in modules:
        return f"{modules[module]}.{part}", None
    found = re.fullmatch(rf"{re.escape(family.blocks)}\.(\d+)\.(.+)", module)
    expert = re.search(r"(?<=\.experts\.)\d+", module)
    local = "" if found is None else re.sub(r"(?<=\.experts\.)\d+", "{}", found[2])
    if found is None or local not in OF_BLOCK[family.name]:
        raise UserError(f"llama.cpp has no place for {name} in this architecture")
    theirs = f"{BLOCKS}.{found[1]}.{OF_BLOCK[family.name][local]}.{part}"
    return theirs, None if expert is None else int(expert[0])


def gguf_name(name: str, family: Family) -> str:
    """The first of ``place_of``."""
    return place_of(name, family)[0]


def our_name(name: str, family: Family) -> str | None:
    """The reverse of ``gguf_name``, with ``{}`` for the number of an expert; None for a name that it never
    gives."""
    module, _, part = name.rpartition(".")
    ours = {theirs: ours for ours, theirs in _modules(family).items()}
    if module in ours:
        return f"{ours[module]}.{part}"
    of_block = {theirs: ours for ours, theirs in OF_BLOCK[family.name].items()}
    found = re.fullmatch(rf"{BLOCKS}\.(\d+)\.(\w+)", module)
    if found is None or found[2] not in of_block:
        return None
    return f"{family.blocks}.{found[1]}.{of_block[found[2]]}.{part}"


@dataclass(frozen=True)
class Heads:
    """In which order the rows of an architecture are stored follows from its heads: their number, and that of
    keys and values."""

    architecture: str
    queries: int
    keys: int

    def order(self, name: str, rows: int) -> Tensor | None:
        """Where each stored row of a tensor of llama.cpp's name comes from, int64 (rows,), if that is from
        another place."""
        part = _part(name)
        if self.architecture in INTERLEAVED and part in ("attn_q", "attn_k"):
            return rotary_order(rows, self.queries if part == "attn_q" else self.keys)
        if self.architecture in GATHERED and part == "attn_qkv":
            return gathered_order(rows, self.queries, self.keys)
        return None


def rotary_order(rows: int, heads: int) -> Tensor:
    """Where each stored row of queries or keys comes from, int64 (rows,): channel i of a head is followed by
    the one that is turned with it, i + head size / 2."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def gathered_order(rows: int, queries: int, keys: int) -> Tensor:
    """The same of queries, keys and values in one, of which the queries of a group are followed here by its
    key and its value."""
    groups = torch.arange(rows).view(keys, queries // keys + 2, -1)
    parts = groups[:, :-2], groups[:, -2], groups[:, -1]
    return torch.cat([part.reshape(-1) for part in parts])


def _part(name: str) -> str:
    """What a tensor of llama.cpp's name is in its block."""
    return name.split(".")[2] if name.startswith(f"{BLOCKS}.") else ""


def is_wide(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of llama.cpp's name that is not quantized is stored in 32 bits: norms, biases, and
    what chooses experts."""
    return len(shape) == 1 or _part(name) in PRECISE


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor of llama.cpp's name has there."""
    return shape[1:] if _part(name) == FLAT else shape


def shift_of(name: str, family: Family) -> float:
    """What a stored tensor of llama.cpp's name has more than ours: norms that add to their weights are stored
    with the sum."""
    return family.norm_shift if name.endswith("norm.weight") else 0.0


def unshifted(stored: Tensor, shift: float, dtype: torch.dtype | None) -> Tensor:
    """Our numbers of those that are stored in 32 bits, or less; in ``dtype`` if it gives these exactly.

    Of 1 + w the last bits of w below 2^-16 are lost, which no engine looks at: all multiply by the sum.
    """
    rows = stored - shift if shift else stored
    if dtype is None:
        return rows
    rounded = rows.to(dtype)
    return rounded if torch.equal(rounded.to(rows.dtype) + shift, stored) else rows


@dataclass(frozen=True)
class Entry:
    """A tensor of the file, by its name there. shape: of its values, the last dimension in a row; shift: as
    in ``shift_of``"""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    shift: float


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
        changed = path.stat().st_mtime_ns
        self._heads, _, _ = _header(path, changed)
        stated = str(config.get("model_type"))
        known = stated in ARCHITECTURES and family_of(dict(config)).name in OF_BLOCK
        family = family_of(dict(config) if known else {"model_type": _model_type(self._heads)})
        heads, keys = _stated_heads(config)
        asked: dict[str, tuple[Any, Any]] = {
            "general.architecture": (ARCHITECTURES.get(stated), self._heads.architecture),
            _HEADS: (heads, self._heads.queries),
            _KEY_HEADS: (keys, self._heads.keys),
        }
        for what, (wanted, found) in asked.items():
            if wanted is not None and wanted != found:
                raise UserError(
                    f"{path} has {what} {found}, its config.json asks for {wanted}: they belong to "
                    "different models"
                )
        self._entries = _entries(path, changed, family.name)

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
            rows = unshifted(
                rows.view(PLAIN[entry.type]).view(entry.shape), entry.shift, self._dtype
            )
        else:
            rows = rows.view(entry.shape[0], -1)
        order = self._heads.order(entry.name, len(rows))
        return rows if order is None else rows[order.argsort()]

    def get_slice(self, name: str) -> _Slice:
        """Shape and type as they are stored."""
        entry = self._entries[name]
        if entry.type in PLAIN:
            return _Slice(entry.shape, entry.type)
        return _Slice((entry.shape[0], entry.nbytes // entry.shape[0]), "U8")


def _stated_heads(config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """As config.json has them. What it lacks, or has and should not, is told where that is looked at."""
    try:
        heads, keys, _ = heads_of(config)
    except (LookupError, TypeError, ValueError, ArithmeticError):
        return None, None
    return heads, keys


def _model_type(heads: Heads) -> str:
    """The first one that is run as an architecture."""
    return next(ours for ours, theirs in ARCHITECTURES.items() if theirs == heads.architecture)


@functools.lru_cache(maxsize=8)
def _header(path: Path, changed: int) -> tuple[Heads, _Tensors, int]:
    """The heads of a file, its tensors by their names there, and where the first one begins.

    changed: when the file was, so that another one of the same name is read anew
    """
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stored,
        ):
            config, tensors, start = _parsed(stored)
        architecture = str(config["general.architecture"])
        count = config[f"{architecture}.{_HEADS}"]
    except (ValueError, LookupError, TypeError, ArithmeticError, struct.error) as error:
        raise UserError(f"{path} is not a readable GGUF file: {error}") from error
    if architecture not in ARCHITECTURES.values():
        known = ", ".join(sorted(set(ARCHITECTURES.values())))
        raise UserError(f"{path} is of architecture {architecture!r}, read here are {known}")
    shared = config.get(f"{architecture}.{_KEY_HEADS}", count)
    if not all(type(heads) is int for heads in (count, shared)):
        raise UserError(f"{path} has a number of heads for each layer, read here is one for all")
    return Heads(architecture, count, shared), tensors, start


@functools.lru_cache(maxsize=8)
def _entries(path: Path, changed: int, family_name: str) -> dict[str, Entry]:
    """The tensors of a file by the names that a family has for them."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    (family,) = (family for family in FAMILIES if family.name == family_name)
    _, tensors, start = _header(path, changed)
    entries: dict[str, Entry] = {}
    kinds = {kind.value: kind for kind in GGMLQuantizationType}
    size = path.stat().st_size
    for theirs, (shape, number, offset) in tensors.items():
        if theirs in DERIVED:
            continue
        name = our_name(theirs, family)
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
        shift = shift_of(theirs, family)
        if "{}" in name:
            if len(shape) != 3 or shape[0] > MOST_EXPERTS:
                raise UserError(
                    f"{path} has a tensor {theirs} of shape {shape}, not that of experts"
                )
            each = length // shape[0]
            for number in range(shape[0]):
                place = start + offset + number * each
                one = Entry(theirs, kind.name, shape[1:], place, each, shift)
                entries[name.format(number)] = one
            continue
        if _part(theirs) == FLAT:
            shape = (1, *shape)
        entries[name] = Entry(theirs, kind.name, shape, start + offset, length, shift)
    return entries


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
