"""What a checkpoint holds: counted from the headers of one on disk, or of one that a recipe would write, by
letting the exporter itself run on tensors without data.

A linear is NAME (out, in); bytes are those of all tensors stored under NAME but its bias.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from compress.export import compressed_tensors, gguf
from compress.export.formats import FORMATS, Weights
from compress.kv_cache.cache import sliding_windows
from compress.kv_cache.folder import scheme_of
from compress.kv_cache.scheme import CacheScheme, cache_bytes
from compress.model.families import Family, family_of, heads_of, size_of
from compress.model.folder import ModelFolder, Shapes
from compress.model.gguf_file import gguf_name, is_wide
from compress.model.shapes import ShapeFolder
from compress.model.skeleton import model_of
from compress.quantize import record
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Scheme, Schemes, make_grid, to_codes
from compress.quantize.stage import linear_names
from compress.runtime.weights import runs

# What safetensors calls a type, for the length of the header.
NAMES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int8: "I8",
    torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Weights that are read together. parameters; stored: their bytes; rate: what their products run in"""

    parameters: int
    stored: float
    rate: str = "bf16"


@dataclass(frozen=True)
class Checkpoint:
    """A model as a step of decoding reads it.

    attention, mlp: the linears of all blocks but experts; head; embedding: an untied table, of which a step
        reads a row a token, None if it is the head's; rest: norms, biases, routers
    experts: the linears of all experts, of which a step reads those that its tokens are sent to; routed: the
        share of them that one token is sent to
    files: bytes of the weight files
    heads, kv_heads, head_dim: 0 without attention; hidden; intermediate: the neurons that one token passes
    windows: tokens that each layer sees, None: all
    """

    attention: Part
    mlp: Part
    head: Part
    embedding: Part | None
    rest: Part
    files: float
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    windows: tuple[int | None, ...]
    itemsize: int
    cache: CacheScheme | None
    experts: Part | None = None
    routed: float = 1.0

    @property
    def linears(self) -> list[Part]:
        """Those of the blocks."""
        every = (self.attention, self.mlp, self.experts)
        return [part for part in every if part is not None]

    @property
    def parts(self) -> list[Part]:
        others = (self.head, self.embedding, self.rest)
        return [*self.linears, *(part for part in others if part is not None)]

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def weights(self) -> float:
        """Bytes of all weights in memory."""
        return sum(part.stored for part in self.parts)

    @property
    def looked_up(self) -> float:
        """Bytes of a table that a step looks rows up in."""
        return 0 if self.embedding is None else self.embedding.stored

    def unread(self, tokens: int) -> float:
        """Bytes of the experts that a step of so many tokens does not read, if all are sent to as often."""
        stored = 0 if self.experts is None else self.experts.stored
        return stored * (1 - self.routed) ** tokens

    def read(self, tokens: int) -> float:
        """Bytes of the weights that a step of so many tokens reads."""
        return self.weights - self.looked_up - self.unread(tokens)

    def on_each(self, tp: int) -> float:
        """Bytes of all weights on each of ``tp`` devices: its share of every linear and of the tables, norms
        and biases whole, and of the linears of keys and values its heads."""
        of_heads = len(self.windows) * 2 * self.hidden * self.kv_heads * self.head_dim
        copied = self.attention.stored * of_heads / self.attention.parameters
        more = copied * (self.cache_share(tp) - 1 / tp)
        return self.weights / tp + self.rest.stored * (1 - 1 / tp) + more

    def cache_share(self, tp: int) -> float:
        """The share of the cache that one of ``tp`` devices holds: its heads, at least one."""
        return -(-self.kv_heads // tp) / self.kv_heads

    @property
    def bits_linears(self) -> float:
        stored = sum(part.stored for part in self.linears)
        return 8 * stored / sum(part.parameters for part in self.linears)

    @property
    def bits_file(self) -> float:
        return 8 * self.files / self.parameters

    def cache_of(self, context: int) -> float:
        """Bytes of keys and values of one sequence of so many tokens."""
        return cache_bytes(
            self.cache, self.windows, self.kv_heads, self.head_dim, self.itemsize, context
        )


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def on_disk(folder: ModelFolder, device: torch.device | None = None) -> Checkpoint:
    """The checkpoint that a folder is, plain, record or exported, from its headers, and the zero points of
    AWQ.

    device: where this project's runtime would hold it: linears without a kernel there count in 16 bits
    """
    weights = Weights(folder)
    stored = {name: _Tensor("", folder.shape(name), folder.nbytes(name)) for name in folder.names}
    files = [*folder.weight_files]
    files += [folder.path / f.sidecar for f in FORMATS.values() if f.sidecar]
    size = sum(file.stat().st_size for file in files if file.exists())
    shapes = ShapeFolder(str(folder.path), folder.config)
    schemes = {
        f"{name}.weight": linear_scheme(folder, weights.format, name) for name in weights.linears
    }
    return _checkpoint(shapes, stored, schemes, size, scheme_of(folder), device)


def linear_scheme(folder: ModelFolder, kind: str, name: str) -> Scheme:
    """The scheme of one linear of a quantized folder. kind: its ``Weights.format``"""
    found = FORMATS[kind].scheme_of if kind in FORMATS else record.scheme_of
    assert found is not None, kind
    return found(folder, name)


def as_planned(
    shapes: Shapes,
    schemes: Schemes | None,
    cache: CacheScheme | None = None,
    export: str = compressed_tensors.NAME,
    linears: float | None = None,
    device: torch.device | None = None,
) -> Checkpoint:
    """The checkpoint that quantizing a model of these shapes would leave.

    schemes: settled on these shapes; None leaves 16 bits. linears: bytes of the linears where a search
    chooses their bits, None: what the schemes say. device: as for ``on_disk``. A GGUF file has its tokenizer
    too, which is not counted.
    """
    if not FORMATS[export].quantized:
        schemes = linears = None
    family = family_of(shapes.config)
    quantized = {} if schemes is None else _schemes(shapes, family, schemes)
    stored: dict[str, _Tensor] = {}
    own: dict[str, Scheme] = {}
    for name in shapes.names:
        base = name.removesuffix(".weight")
        scheme = quantized.get(base)
        if scheme is None:
            if not (shapes.tied_head and base == family.head):
                shape = shapes.shape(name)
                wide = export == gguf.NAME and is_wide(gguf_name(name, family), shape)
                stored[name] = _plain(shape, torch.float32 if wide else shapes.dtype)
            continue
        apart = schemes is not None and _apart(base, scheme, schemes, family)
        for local, tensor in _linear(shapes.shape(name), shapes.dtype, scheme, export, apart):
            stored[f"{base}.{local}"] = tensor
            if apart and shapes.tied_head and local == "weight_scale":
                stored[f"{family.head}.{local}"] = tensor
        own[name] = scheme
    if cache is not None and cache.static:
        shape = (heads_of(shapes.config)[1], 1, 1) if cache.keys.per == "head" else (1,)
        for index in range(size_of("num_hidden_layers", shapes.config)):
            for part in ("k_scale", "v_scale"):
                name = f"{family.blocks}.{index}.{family.attention}.{part}"
                stored[name] = _plain(shape, torch.float32)
    size = sum(t.nbytes for t in stored.values()) + _header(stored)
    found = _checkpoint(shapes, stored, own, size, cache, device)
    return found if linears is None else _with_linears(found, linears)


def _schemes(shapes: Shapes, family: Family, schemes: Schemes) -> dict[str, Scheme]:
    found = {name: schemes.of(name) for name in linear_names(shapes, family)}
    if schemes.head is not None:
        found[family.embedding] = schemes.head
        if not shapes.tied_head:
            found[family.head] = schemes.head
    return found


def _apart(base: str, scheme: Scheme, schemes: Schemes, family: Family) -> bool:
    return base in (family.embedding, family.head) and scheme != schemes.linears


def _rate(scheme: Scheme | None) -> str:
    """What a product of these numbers runs in: weights alone are widened to 16 bits on the way."""
    if scheme is None or scheme.inputs is None:
        return "bf16"
    return "fp8" if scheme.inputs.type == "float" else "int8"


def _plain(shape: tuple[int, ...], dtype: torch.dtype) -> _Tensor:
    return _Tensor(NAMES[dtype], shape, math.prod(shape) * dtype.itemsize)


@functools.lru_cache(maxsize=256)
def _linear(
    shape: tuple[int, ...], dtype: torch.dtype, scheme: Scheme, export: str, apart: bool
) -> tuple[tuple[str, _Tensor], ...]:
    """The tensors that the exporter writes for a linear, by local name."""
    q = without_data(shape, dtype, scheme)
    stored = FORMATS[export].stored
    assert stored is not None, export
    tensors = stored(q, scheme, apart)
    return tuple((name, _plain(tuple(t.shape), t.dtype)) for name, t in tensors)


def without_data(shape: tuple[int, ...], dtype: torch.dtype, scheme: Scheme) -> QTensor:
    """A quantized weight of these sizes on the meta device; with an input scale where that is fixed."""
    W = torch.empty(shape, device="meta")
    q = to_codes(W, make_grid(W, scheme, dtype), scheme)
    if scheme.inputs is None:
        return q
    fixed = torch.empty((), device="meta") if scheme.inputs.static else None
    return replace(q, inputs=scheme.inputs.running, input_scale=fixed)


@functools.lru_cache(maxsize=256)
def _runs(shape: tuple[int, ...], dtype: torch.dtype, scheme: Scheme, device: torch.device) -> bool:
    return runs(without_data(shape, dtype, scheme), device, dtype)


def _header(stored: Mapping[str, _Tensor]) -> int:
    """Bytes of the header of one safetensors file: a length, and JSON filled up to eight bytes."""
    start, entries = 0, dict[str, Any]({"__metadata__": {"format": "pt"}})
    for name, tensor in stored.items():
        place = [start, start + tensor.nbytes]
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": place}
        start += tensor.nbytes
    text = len(json.dumps(entries, separators=(",", ":")))
    return 8 + text + -text % 8


def _checkpoint(
    shapes: Shapes,
    stored: Mapping[str, _Tensor],
    schemes: Mapping[str, Scheme],
    files: float,
    cache: CacheScheme | None,
    device: torch.device | None,
) -> Checkpoint:
    """shapes: of the 16-bit model; stored: what the files hold; schemes: of quantized weights, by name"""
    family, config = family_of(shapes.config), model_of(shapes.config, shapes.dtype).config
    modules: dict[str, int] = {}
    for name, tensor in stored.items():
        base, _, local = name.rpartition(".")
        key = name if local == "bias" else base
        modules[key] = modules.get(key, 0) + tensor.nbytes
    for name, scheme in schemes.items():
        shape = shapes.shape(name)
        if device is not None and not _runs(shape, shapes.dtype, scheme, device):
            modules[name.removesuffix(".weight")] = math.prod(shape) * shapes.dtype.itemsize
    linears = linear_names(shapes, family)
    attention = [name for name in linears if f".{family.attention}." in name]
    experts = [name for name in linears if ".experts." in name]
    apart = {*attention, *experts}
    mlp = [name for name in linears if name not in apart]
    count = len({name.rpartition(".experts.")[2].partition(".")[0] for name in experts})
    chosen = getattr(config, "num_experts_per_tok", None) or count
    ends = [name for name in (family.embedding, family.head) if f"{name}.weight" in shapes]
    if shapes.tied_head:
        ends = [family.embedding]

    def part(names: list[str]) -> Part:
        if not names:
            return Part(0, 0)
        count = sum(math.prod(shapes.shape(f"{name}.weight")) for name in names)
        rate = _rate(schemes.get(f"{names[0]}.weight"))
        return Part(count, sum(modules.get(name, 0) for name in names), rate)

    named = {f"{name}.weight" for name in (*linears, *ends)}
    others = [name for name in shapes.names if name not in named]
    if shapes.tied_head:
        others = [name for name in others if name != f"{family.head}.weight"]
    known = (*linears, *ends)
    rest = sum(modules.values()) - sum(modules.get(name, 0) for name in known)
    heads, kv_heads, size = heads_of(shapes.config) if family.attention_output else (0, 0, 0)
    # Of an MLP or an expert: what its output reads.
    outputs = (mlp[-1:], experts[-1:])
    neurons = [shapes.shape(f"{name}.weight")[1] for names in outputs for name in names]
    return Checkpoint(
        attention=part(attention),
        mlp=part(mlp),
        head=part(ends[-1:]),
        embedding=None if shapes.tied_head else part(ends[:1]),
        rest=Part(sum(math.prod(shapes.shape(name)) for name in others), rest),
        files=files,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        hidden=config.hidden_size,
        intermediate=neurons[0] if not experts else chosen * neurons[-1],
        windows=tuple(sliding_windows(config)),
        itemsize=shapes.dtype.itemsize,
        cache=cache,
        experts=part(experts) if experts else None,
        routed=min(1.0, chosen / count) if experts else 1.0,
    )


def _with_linears(found: Checkpoint, nbytes: float) -> Checkpoint:
    """The same with so many bytes of linears in all."""
    before = sum(part.stored for part in found.linears)
    attention, mlp, *experts = (
        replace(part, stored=part.stored * nbytes / before) for part in found.linears
    )
    files = found.files - before + nbytes
    return replace(
        found, attention=attention, mlp=mlp, experts=experts[0] if experts else None, files=files
    )
