"""GGUF, the format of llama.cpp: weights, tokenizer and all that runs them in one file, beside the
config.json and tokenizer that others read.

Every linear keeps its numbers: its codes are packed into the type of block that holds them (``type_of``),
never rounded again. Norms and biases are in 32 bits, as llama.cpp wants them, other weights as they were.
config.json says under ``quantization_config`` which schemes the linears had: a file alone does not tell
groups of 64 from twice 32.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import UserError
from compress.export.gguf_blocks import BLOCKS, LONG, MINIMUM, SHORT
from compress.export.gguf_metadata import add_metadata, check_model, extra_tensors, stored_heads
from compress.export.gguf_tokenizer import add_tokenizer, check_tokenizer
from compress.kv_cache.folder import is_scale
from compress.model.families import family_of, linears_among
from compress.model.folder import ModelFolder, Shapes, write_json
from compress.model.gguf_file import (
    PLAIN,
    SUFFIX,
    Heads,
    gguf_name,
    is_wide,
    place_of,
    shift_of,
    stored_shape,
    unshifted,
)
from compress.model.sources import open_tokenizer
from compress.quantize import record
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import MXFP4, Scheme, Schemes

NAME = "gguf"
# Rows that are packed at a time, so that a large table needs little memory beside itself.
ROWS = 8192
# What PLAIN names, by the type of the tensor.
_TYPES = {dtype: name for name, dtype in PLAIN.items()}


def type_of(scheme: Scheme, columns: int) -> str:
    """The type of block that holds the numbers of a scheme in rows of so many columns, the smallest one.

    Types of 256 columns have one scale for all of them, as they are used here. Raises UserError for numbers
    that none holds.
    """
    group = scheme.columns_per_group(columns)
    if group % SHORT:
        raise UserError(
            f"export={NAME} has scales for every {SHORT} columns, which do not divide groups of {group}: "
            "choose scheme.group_size=32, 64 or 128"
        )
    if scheme.type == "float":
        return "MXFP4"
    long = group % LONG == 0
    if scheme.symmetric:
        wide = {2: "Q2_K", 3: "Q3_K", 6: "Q6_K"} if long else {}
        return wide.get(scheme.bits) or (
            "Q4_0" if scheme.bits <= 4 else "Q5_0" if scheme.bits == 5 else "Q8_0"
        )
    narrow = (
        {2: "Q2_K", 3: "Q4_K", 4: "Q4_K", 5: "Q5_K"}
        if long
        else {2: "Q4_1", 3: "Q4_1", 4: "Q4_1", 5: "Q5_1"}
    )
    return narrow[scheme.bits]


def check(schemes: Schemes) -> None:
    """Raises UserError for numbers that no type of block holds."""
    found = [schemes.linears, *schemes.exceptions.values()]
    found += [] if schemes.head is None else [schemes.head]
    for scheme in found:
        if scheme.inputs is not None:
            raise UserError(
                f"export={NAME} has no place for rounded inputs, {scheme.name}: choose scheme=int8-channel, "
                "int8 or int4, or export=compressed-tensors"
            )
        if scheme.type == "float" and (scheme.bits, scheme.group_size) != (4, MXFP4):
            raise UserError(
                f"export={NAME} holds no {scheme.name}: choose scheme=mxfp4 or integers, or "
                "export=compressed-tensors"
            )
        if not scheme.symmetric and scheme.bits > 5:
            raise UserError(
                f"export={NAME} holds zero points up to 5 bits, not {scheme.name}: set scheme.symmetric=true"
            )
        if scheme.type == "int" and not scheme.grouped_integers:
            raise UserError(
                f"export={NAME} has scales by group or row, not {scheme.name}: choose "
                "scheme.group_size=auto or channel"
            )
        if isinstance(scheme.group_size, int):
            type_of(scheme, scheme.group_size)


def fits(model: Shapes, schemes: Schemes | None) -> None:
    """Raises UserError for a model that llama.cpp does not run, or whose tokenizer or widths it does not
    have; of a folder on disk, whose weights have different types, or scales that float16 does not hold.

    schemes: settled on the model; None: nothing is quantized. Of a record, scales are read; of other folders
    no weight is.
    """
    check_model(model.config, model.path)
    if (model.path / "config.json").exists():
        folder = ModelFolder(model.path)
        check_tokenizer(folder, open_tokenizer(folder))
        # What stages leave of a plain folder is not known before.
        if record.KEY in folder.config or (isinstance(model, ModelFolder) and schemes is None):
            _check_stored(folder)
    family = family_of(model.config)
    for name in model.names:
        if not is_scale(name):
            gguf_name(name, family)
    if schemes is None:
        return
    linears = set(linears_among(model.names, family))
    types: dict[str, dict[str, str]] = {}
    for name in model.names:
        base = name.removesuffix(".weight")
        scheme = schemes.head if base in (family.embedding, family.head) else None
        if base in linears:
            scheme = schemes.of(base)
        if scheme is not None:
            kind = _type_of(base, scheme, model.shape(name)[1])
            types.setdefault(gguf_name(name, family), {})[name] = kind
    for alike in types.values():
        _check_alike(alike)


def check_search(model: Shapes, schemes: Schemes, choices: list[int]) -> None:
    """Raises UserError if a search that chooses the bits of every linear may part the experts of a block.

    schemes: settled on the model; choices: of bits
    """
    family = family_of(model.config)
    for name in linears_among(model.names, family):
        weight = f"{name}.weight"
        if place_of(weight, family)[1] is not None:
            columns, scheme = model.shape(weight)[1], schemes.of(name)
            types = {type_of(replace(scheme, bits=bits), columns) for bits in choices}
            if len(types) > 1:
                raise UserError(
                    f"export={NAME} has one tensor for all experts of a block, and a search among "
                    f"search.choices={choices} may put them into {', '.join(sorted(types))}: leave out "
                    "search, or choose export=compressed-tensors"
                )


def _type_of(base: str, scheme: Scheme, columns: int) -> str:
    """The same of a linear, which the error names."""
    try:
        return type_of(scheme, columns)
    except UserError as error:
        raise UserError(f"{base}: {error}") from error


@dataclass(frozen=True)
class _Planned:
    """A tensor as it will be written: our name, or those of all experts; llama.cpp's, its type, the shape of
    its numbers."""

    names: tuple[str, ...]
    theirs: str
    type: str
    shape: tuple[int, ...]

    @property
    def rows(self) -> tuple[tuple[int, ...], np.dtype[Any], int]:
        """Shape, type and bytes as the gguf package asks for them."""
        if self.type == "F32":
            return self.shape, np.dtype(np.float32), 4 * int(np.prod(self.shape))
        per, nbytes = (
            (1, 2) if self.type in PLAIN else (BLOCKS[self.type].columns, BLOCKS[self.type].nbytes)
        )
        stored = (*self.shape[:-1], self.shape[-1] // per * nbytes)
        return stored, np.dtype(np.uint8), int(np.prod(stored))


def write(source: ModelFolder, target: Path) -> None:
    """Write a record, or a plain folder, as a folder with one GGUF file.

    The file is named after the type of most of its weights, as in ``model-Q4_0.gguf``. One tensor is in
    memory at a time. Raises UserError, before it writes, for what ``check`` and ``fits`` refuse.
    """
    from gguf import GGUFWriter
    from gguf.constants import GGMLQuantizationType

    # It tells what it does at every step.
    logging.getLogger("gguf").setLevel(logging.WARNING)
    schemes = record.schemes_of(source) if record.KEY in source.config else None
    if schemes is not None:
        check(schemes)
    settings = check_model(source.config, source.path)
    _check_stored(source)
    planned, heads = list(_planned(source)), stored_heads(settings)
    most = _most(planned)
    writer = GGUFWriter(None, heads.architecture)
    extra = extra_tensors(settings)
    for tensor in planned:
        shape, dtype, nbytes = tensor.rows
        writer.add_tensor_info(
            tensor.theirs, shape, dtype, nbytes, raw_dtype=GGMLQuantizationType[tensor.type]
        )
    for name, values in extra.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    tokenizer = open_tokenizer(source)
    tokens = tokenizer.get_vocab().keys()
    add_metadata(writer, source.config, settings, most, tokens, quantized=schemes is not None)
    add_tokenizer(writer, source, tokenizer)
    target.mkdir(parents=True)
    source.copy_companions(target)
    config = {k: v for k, v in source.config.items() if k != record.KEY}
    if schemes is not None:
        config["quantization_config"] = {"quant_method": NAME, "schemes": schemes.as_config()}
    writer.write_header_to_file(target / f"model-{most}{SUFFIX}")
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    contents = record.contents(source, (name for tensor in planned for name in tensor.names))
    for tensor in planned:
        parts = [_stored(source, tensor, next(contents), heads) for _ in tensor.names]
        writer.write_tensor_data(np.stack(parts) if len(tensor.shape) > 2 else parts[0])
    for values in extra.values():
        writer.write_tensor_data(values)
    writer.close()
    write_json(target / "config.json", config)


def _planned(source: ModelFolder) -> Iterator[_Planned]:
    """In file order; all experts of a block together."""
    family = family_of(source.config)
    quantized = set(record.linears(source)) if record.KEY in source.config else set()
    found: dict[str, list[tuple[int | None, str, str, tuple[int, ...]]]] = {}
    for name in source.names:
        base, _, part = name.rpartition(".")
        shape = source.shape(name)
        if base not in quantized or part == "bias":
            theirs, expert = place_of(name, family)
            kind = "F32" if is_wide(theirs, shape) else _TYPES[source.dtype]
            found.setdefault(theirs, []).append((expert, name, kind, stored_shape(theirs, shape)))
        elif part == "codes":
            kind = _type_of(base, record.scheme_of(source, base), shape[1])
            theirs, expert = place_of(f"{base}.weight", family)
            found.setdefault(theirs, []).append((expert, f"{base}.weight", kind, shape))
    for theirs, parts in found.items():
        parts.sort(key=lambda part: part[0] or 0)
        (first, name, kind, shape), names = parts[0], tuple(part[1] for part in parts)
        _check_alike({part[1]: part[2] for part in parts})
        yield _Planned(names, theirs, kind, shape if first is None else (len(parts), *shape))


def _check_alike(types: dict[str, str]) -> None:
    """Raises UserError for tensors of one in the file that have different types."""
    first = next(iter(types))
    for name, kind in types.items():
        if kind != types[first]:
            raise UserError(
                f"export={NAME} has one tensor for all experts of a block, and {first} would be in "
                f"{types[first]}, {name} in {kind}: give them one scheme"
            )


def _check_stored(folder: ModelFolder) -> None:
    """Raises UserError for scales of a record that float16 does not hold, or a minimum beyond its range; of a
    plain folder for a weight in another type than the model's; of both for scales of the cache."""
    for name in filter(is_scale, folder.names):
        raise UserError(f"export={NAME} has no place for the scales of the cache, {name}")
    if record.KEY not in folder.config:
        family = family_of(folder.config)
        for name in folder.names:
            # In a GGUF file norms and biases are in 32 bits, and come out in the type of the model.
            theirs = gguf_name(name, family)
            widened = folder.file_of(name).suffix == SUFFIX and is_wide(theirs, folder.shape(name))
            if not widened and folder.stored_type(name) != _TYPES[folder.dtype]:
                raise UserError(
                    f"export={NAME} holds models of one type, and {name} is in {folder.stored_type(name)}, "
                    f"the model in {_TYPES[folder.dtype]}: choose export=compressed-tensors"
                )
        return
    for base in record.linears(folder):
        scale, scheme = folder.tensor(f"{base}.scale"), record.scheme_of(folder, base)
        if scheme.type == "float":
            continue
        kind = _type_of(base, scheme, folder.shape(f"{base}.codes")[1])
        largest = float(scale.max()) * (scheme.max_code if kind in MINIMUM else 1)
        exact = torch.equal(scale.half().to(scale.dtype), scale)
        if not exact or largest > torch.finfo(torch.float16).max:
            raise UserError(
                f"export={NAME} keeps scales in float16, which holds those of {base} not exactly (from "
                f"{float(scale.min()):.1e} to {float(scale.max()):.1e}): choose export=compressed-tensors, "
                "which in the same folder needs no second compression"
            )


def _most(planned: list[_Planned]) -> str:
    """The type of most weights of the blocks."""
    weights: Counter[str] = Counter()
    for tensor in planned:
        if len(tensor.shape) >= 2 and tensor.theirs.startswith("blk."):
            weights[tensor.type] += int(np.prod(tensor.shape))
    return max(sorted(weights), key=lambda kind: weights[kind])


def _stored(
    source: ModelFolder, tensor: _Planned, named: tuple[str, Tensor | QTensor], heads: Heads
) -> np.ndarray[Any, Any]:
    """The bytes of one of ours, by its name, its rows in the order of llama.cpp."""
    name, value = named
    if isinstance(value, QTensor):
        scheme = record.scheme_of(source, name.removesuffix(".weight"))
        ((_, rows),) = compress_linear(value, scheme)
    elif tensor.type == "F32":
        rows = value.float() + shift_of(tensor.theirs, family_of(source.config))
        rows = rows.view(stored_shape(tensor.theirs, tuple(rows.shape)))
    else:
        rows = value.contiguous().view(torch.uint8)
    order = heads.order(tensor.theirs, len(rows))
    if order is not None:
        rows = rows[order]
    stored: np.ndarray[Any, Any] = rows.contiguous().numpy()
    return stored


def held(folder: ModelFolder, name: str, value: Tensor | QTensor) -> Tensor | QTensor:
    """What of a tensor a folder in GGUF gives back: all of it but the last bits of norms that add to their
    weights (see ``unshifted``). Of other folders the value itself."""
    if isinstance(value, QTensor) or not holds(folder):
        return value
    family = family_of(folder.config)
    shift = shift_of(gguf_name(name, family), family)
    return unshifted(value.float() + shift, shift, value.dtype) if shift else value


def compress_linear(q: QTensor, scheme: Scheme) -> Iterator[tuple[str, Tensor]]:
    """The one stored tensor of a linear: its type, and the bytes of its rows, uint8 (out, bytes)."""
    kind = type_of(scheme, q.shape[1])
    codes, scales = q.codes.split(ROWS), q.scale.split(ROWS)
    zeros = [None] * len(codes) if q.zero is None else q.zero.split(ROWS)
    parts = zip(codes, scales, zeros, strict=True)
    yield kind, torch.cat([_packed(kind, scheme.bits, *part) for part in parts])


def _packed(kind: str, bits: int, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    block = BLOCKS[kind]
    repeats = codes.shape[1] // scale.shape[1] // block.columns
    d = scale if scale.dtype == torch.uint8 else scale.half()
    low = None
    if block.zero:
        # A type with zero points holds a symmetric scheme by the one that this has.
        low = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8) if zero is None else zero
        if kind in MINIMUM:
            low = (-low.float() * scale.float()).half()
        low = low.repeat_interleave(repeats, 1)
    elif scale.dtype != torch.uint8:
        codes = codes + (2 ** (block.bits - 1) - 2 ** (bits - 1))
    packed = block.pack(
        codes.unflatten(1, (-1, block.columns)), d.repeat_interleave(repeats, 1), low
    )
    return packed.flatten(1)


def nbytes(q: QTensor, scheme: Scheme) -> int:
    """Bytes of a linear in the file."""
    block = BLOCKS[type_of(scheme, q.shape[1])]
    return q.codes.numel() // block.columns * block.nbytes


def holds(folder: ModelFolder) -> bool:
    """Whether the weights of a folder, quantized or not, are in GGUF."""
    return all(file.suffix == SUFFIX for file in folder.weight_files)


def linears(folder: ModelFolder) -> list[str]:
    """Names of the quantized linears, embedding and head included, without suffix, in file order; none where
    the weights are in other files."""
    if not holds(folder):
        return []
    return [
        name.rpartition(".")[0] for name in folder.names if not name.endswith((".weight", ".bias"))
    ]


def scheme_of(folder: ModelFolder, name: str) -> Scheme:
    """The scheme of a quantized linear: what config.json says, else what its type of block alone tells."""
    stated = (folder.config.get("quantization_config") or {}).get("schemes")
    if stated is not None:
        schemes, family = Schemes.from_config(stated), family_of(folder.config)
        if name in (family.embedding, family.head):
            assert schemes.head is not None, name
            return schemes.head
        return schemes.of(name)
    kind = _kind(folder, name)
    block = BLOCKS[kind]
    if kind == "MXFP4":
        return Scheme(4, MXFP4, True, "float")
    return Scheme(block.bits, block.columns, not block.zero)


def _kind(folder: ModelFolder, name: str) -> str:
    found = [n.rpartition(".")[2] for n in folder.names if n.rpartition(".")[0] == name]
    (kind,) = [part for part in found if part not in ("weight", "bias")]
    if kind not in BLOCKS:
        raise UserError(
            f"{folder.place_of(name)}: {name} is in {kind}, read here are {', '.join(BLOCKS)}"
        )
    return kind


def read_linear(folder: ModelFolder, name: str) -> QTensor:
    """The QTensor of one linear. Raises UserError for numbers that are not one scale and one integer zero
    point for each group, or contradict config.json."""
    kind, scheme = _kind(folder, name), scheme_of(folder, name)
    block, rows = BLOCKS[kind], folder.tensor(f"{name}.{kind}")
    codes, d, low = block.unpack(rows.unflatten(1, (-1, block.nbytes)))
    codes = codes.flatten(1)
    if type_of(scheme, codes.shape[1]) != kind:
        raise UserError(
            f"{folder.place_of(name)}: {name} is in {kind}, which contradicts its {scheme.name}"
        )
    if kind == "MXFP4":
        return QTensor(codes, d, None, scheme.bits, "float")
    if block.columns == LONG and low is None:
        raise UserError(
            f"{folder.place_of(name)}: {name} is in {kind} with a scale for every part of a block, read here "
            "are those with one for the block, as export=gguf writes them"
        )
    if kind in MINIMUM:
        assert low is not None
        low = _zero(folder, name, d, low, scheme.max_code)
    if not block.zero:
        codes = codes.int() - (2 ** (block.bits - 1) - 2 ** (scheme.bits - 1))
    groups = codes.shape[1] // scheme.columns_per_group(codes.shape[1])
    scale, zero = _by_group(d, groups), None if low is None else _by_group(low, groups)
    beyond = int(codes.min()) < 0 or int(codes.max()) > scheme.max_code
    if scheme.symmetric and zero is not None:
        beyond |= bool((zero != 2 ** (scheme.bits - 1 if block.zero else block.bits - 1)).any())
    if scale is None or beyond or (low is not None and zero is None):
        raise UserError(
            f"{folder.place_of(name)}: the numbers of {name} are not those of its {scheme.name}"
        )
    rounded = scale.to(folder.dtype)
    exact = torch.equal(rounded.half(), scale)
    zero = None if scheme.symmetric else zero
    return QTensor(codes.to(torch.uint8), rounded if exact else scale, zero, scheme.bits)


def _zero(folder: ModelFolder, name: str, d: Tensor, minimum: Tensor, largest: int) -> Tensor:
    """The zero points that minima stand for, uint8, where they stand for such."""
    zero = (-minimum.float() / d.float()).round().nan_to_num(-1)
    same = (-zero * d.float()).half() == minimum
    if not same.all() or zero.min() < 0 or zero.max() > largest:
        raise UserError(
            f"{folder.place_of(name)}: the minima of {name} are not whole numbers of its scales, and only "
            "those are read here, as export=gguf writes them"
        )
    return zero.to(torch.uint8)


def _by_group(blocks: Tensor, groups: int) -> Tensor | None:
    """One number a group of blocks, (out, blocks) -> (out, groups); None where they differ within one."""
    parts = blocks.unflatten(1, (groups, -1))
    alike = bool((parts == parts[..., :1]).all())
    return parts[..., 0].contiguous() if alike else None
