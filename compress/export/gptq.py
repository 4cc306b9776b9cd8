"""The GPTQ format, as GPTQModel, transformers through it, and vLLM read it. A quantized linear NAME (out, in)
of b bits in groups of g columns (or one a row, g = in) is stored as
    NAME.qweight  int32 (in * b / 32, out)       codes, a dense bit stream down each column: of 2, 4 and 8
                                                 bits whole codes a word, of 3 bits 32 codes in 3 words
    NAME.qzeros   int32 (in / g, out * b / 32)   zero points, the same stream along each row
    NAME.scales   float16 (in / g, out)
    NAME.g_idx    int32 (in,)                    the group of each column: column / g
and w = (code - zero) * scale.

``quantization_config`` in config.json, and again in quantize_config.json for older readers, has the numbers.
Its ``checkpoint_format`` says how zero points are stored. ``gptq``: one less than they are, which cannot hold
a zero point of 0; it is written for symmetric weights, whose zero points are all 2^(b-1). ``gptq_v2``: as
they are; it is written for asymmetric ones, which GPTQModel (7.7) takes in ``gptq`` from itself alone.
Linears with bits of their own and those that keep 16 bits are in ``dynamic``, by name: GPTQModel reads it,
transformers (5.23) does not.

Scales are float16, what readers hold them in, if every one of the model is a number of float16; else the
model's type.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.export.by_columns import (
    WHOLE_ROW,
    check_groups,
    expect,
    read_scale,
    scale_dtype,
    stated_size,
)
from compress.export.packing import pack_rows, packed_width, unpack_rows
from compress.export.shards import write_tensors
from compress.model.folder import ModelFolder, write_json
from compress.quantize import record
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Scheme, Schemes

NAME = "gptq"
CONFIG = "quantize_config.json"
BITS = (2, 3, 4, 8)
# What GPTQModel (7.7) takes.
GROUPS = (16, 32, 64, 128, 256, 512, 1024)
# Rows and columns of a weight come in steps of so many: whole words of any of these bits.
STEP = 32
V1, V2 = "gptq", "gptq_v2"
OVERRIDES = ("bits", "group_size", "sym")


def write(source: ModelFolder, target: Path) -> None:
    """Write a record as a GPTQ folder. Raises UserError for schemes that ``check`` refuses."""
    schemes = record.schemes_of(source)
    check(schemes)
    dtype, stored = scale_dtype(source, NAME), stored_as(schemes)
    config = write_tensors(source, target, lambda _, q: compress_linear(q, dtype, stored))
    quantization = quantization_config(schemes, record.kept(source))
    write_json(target / CONFIG, quantization)
    write_json(target / "config.json", {**config, "quantization_config": quantization})


def check(schemes: Schemes) -> None:
    """Raises UserError for anything but integers of 2, 3, 4 or 8 bits in groups or rows with 16-bit
    inputs."""
    for scheme in (schemes.linears, *schemes.exceptions.values()):
        if not scheme.grouped_integers or scheme.inputs is not None or scheme.bits not in BITS:
            raise UserError(
                f"export={NAME} holds integers of {', '.join(map(str, BITS))} bits in groups or rows with "
                f"16-bit inputs, not {scheme.name}: choose another scheme or search.choices, or "
                "export=compressed-tensors"
            )
        check_groups(NAME, scheme, GROUPS)
    if schemes.head is not None:
        raise UserError(f"export={NAME} keeps the head in 16 bits: leave head out")


def stored_as(schemes: Schemes) -> str:
    """The ``checkpoint_format``: how zero points are stored."""
    return V1 if schemes.linears.symmetric else V2


def compress_linear(
    q: QTensor, dtype: torch.dtype = torch.float16, stored: str = V2
) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of one linear, by local name. dtype: of the scales; stored: V1 or V2"""
    middle = 2 ** (q.bits - 1)
    zero = torch.full_like(q.scale, middle, dtype=torch.uint8) if q.zero is None else q.zero
    yield "qweight", pack_rows(q.codes, q.bits).T
    yield "qzeros", pack_rows(zero.T.contiguous() - int(stored == V1), q.bits)
    yield "scales", q.scale.T.to(dtype)
    columns = torch.arange(q.shape[1], dtype=torch.int32, device=q.codes.device)
    yield "g_idx", columns // q.group_size


def quantization_config(schemes: Schemes, kept: Sequence[str] = ()) -> dict[str, Any]:
    """kept: the matrices of blocks that keep 16 bits"""
    config = {
        "quant_method": NAME,
        "checkpoint_format": stored_as(schemes),
        **_numbers(schemes.linears),
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
    }
    dynamic: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in kept}
    dynamic |= {f"+:^{re.escape(name)}$": _numbers(own) for name, own in schemes.exceptions.items()}
    if dynamic:
        config["dynamic"] = dynamic
    return config


def _numbers(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": stated_size(scheme), "sym": scheme.symmetric}


def scheme_of(folder: ModelFolder, name: str) -> Scheme:
    """The scheme of a linear, by the config. Raises UserError for one that is not read here."""
    config: Mapping[str, Any] = folder.config["quantization_config"]
    stored = config.get("checkpoint_format") or config.get("format") or V1
    if stored not in (V1, V2):
        raise UserError(f"{folder.path}: of GPTQ, {V1} and {V2} are read here, this is {stored!r}")
    numbers = {key: config.get(key) for key in OVERRIDES}
    for pattern, own in (config.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
            numbers |= {key: own[key] for key in OVERRIDES if key in own}
            break
    bits, size = numbers["bits"], numbers["group_size"]
    if bits not in BITS or not isinstance(size, int):
        raise UserError(
            f"{folder.place_of(name)}: {name} of {bits} bits, group_size {size}, is not read here, only "
            f"{', '.join(map(str, BITS))} bits with a number of columns"
        )
    return Scheme(bits, "channel" if size == WHOLE_ROW else size, bool(numbers["sym"]))


def read_linear(folder: ModelFolder, name: str) -> QTensor:
    """The QTensor of one linear. Raises UserError if the file contradicts its config, or its columns are in
    an order of their own."""
    scheme = scheme_of(folder, name)
    codes, zeros, stored = (folder.tensor(f"{name}.{p}") for p in ("qweight", "qzeros", "scales"))
    rows, columns = stored.shape[1], codes.shape[0] * 32 // scheme.bits
    groups = columns // scheme.columns_per_group(columns)
    expect(folder, f"{name}.qweight", codes, (packed_width(columns, scheme.bits), rows))
    expect(folder, f"{name}.qzeros", zeros, (groups, packed_width(rows, scheme.bits)))
    expect(folder, f"{name}.scales", stored, (groups, rows))
    _check_order(folder, name, scheme.columns_per_group(columns))
    zero: Tensor | None = _zeros(folder, name, unpack_rows(zeros, scheme.bits, rows), scheme.bits)
    if scheme.symmetric and bool((zero == 2 ** (scheme.bits - 1)).all()):
        zero = None
    return QTensor(
        unpack_rows(codes.T.contiguous(), scheme.bits, columns),
        read_scale(stored.T.contiguous(), folder.dtype),
        None if zero is None else zero.T.contiguous(),
        scheme.bits,
    )


def _zeros(folder: ModelFolder, name: str, stored: Tensor, bits: int) -> Tensor:
    config = folder.config["quantization_config"]
    if (config.get("checkpoint_format") or config.get("format") or V1) == V2:
        return stored
    if bool((stored == 2**bits - 1).any()):
        raise UserError(
            f"{folder.place_of(name)}: zero points of {name} are stored as {2**bits - 1}, which some readers "
            f"of {V1} take for 0 and some for {2**bits}"
        )
    return stored + 1


def _check_order(folder: ModelFolder, name: str, size: int) -> None:
    key = f"{name}.g_idx"
    if key not in folder:
        return
    found = folder.tensor(key)
    if not torch.equal(found, torch.arange(len(found), dtype=found.dtype) // size):
        raise UserError(
            f"{folder.place_of(name)}: columns of {name} are in an order of their own (desc_act), which is "
            "not read here"
        )
