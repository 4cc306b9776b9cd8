"""The AWQ format in its GEMM version, as AutoAWQ wrote it and vLLM, SGLang and transformers read it. A
quantized linear NAME (out, in) of 4 bits in groups of g columns (or one a row, g = in) is stored as
    NAME.qweight  int32 (in, out / 8)      codes: word c of a row holds outputs 8c .. 8c + 7 of one column,
                                           from its lowest four bits on in the order 0 2 4 6 1 3 5 7
    NAME.qzeros   int32 (in / g, out / 8)  zero points, as they are, in the same order
    NAME.scales   float16 (in / g, out)    or the model's type; see ``by_columns``
and w = (code - zero) * scale. A symmetric scheme has zero points of 8, which are stored all the same:
``zero_point`` is always true, for readers have no kernel for files without.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from compress.export.packing import pack_rows, unpack_rows
from compress.export.shards import write_tensors
from compress.model.families import family_of
from compress.model.folder import ModelFolder, write_json
from compress.quantize import record
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Scheme, Schemes

NAME = "awq"
BITS, MIDDLE = 4, 8
# What GPTQModel (7.7) takes.
GROUPS = (16, 32, 64, 128)
# Outputs in a word, and where each of its four bits comes from.
IN_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BACK = (0, 4, 1, 5, 2, 6, 3, 7)
# A word of zero points in the middle.
MIDDLES = 0x88888888 - 2**32


def write(source: ModelFolder, target: Path) -> None:
    """Write a record as an AWQ folder. Raises UserError for schemes that ``check`` refuses."""
    schemes, family = record.schemes_of(source), family_of(source.config)
    check(schemes)
    dtype = scale_dtype(source, NAME)
    config = write_tensors(source, target, lambda _, q: compress_linear(q, dtype))
    quantization = {
        "quant_method": NAME,
        "version": "gemm",
        "bits": BITS,
        "group_size": stated_size(schemes.linears),
        "zero_point": True,
        # Names that hold one of these are left out.
        "modules_to_not_convert": [*record.kept(source), *family.head_names],
    }
    write_json(target / "config.json", {**config, "quantization_config": quantization})


def check(schemes: Schemes) -> None:
    """Raises UserError for anything but one scheme of 4-bit integers in groups or rows with 16-bit inputs."""
    scheme = schemes.linears
    fits = scheme.grouped_integers and scheme.inputs is None and scheme.bits == BITS
    if not fits or schemes.exceptions:
        raise UserError(
            f"export={NAME} holds integers of 4 bits in groups or rows with 16-bit inputs, the same in all "
            f"linears, not {schemes.name}: choose another scheme, or "
            "export=compressed-tensors"
        )
    check_groups(NAME, scheme, GROUPS)
    if schemes.head is not None:
        raise UserError(f"export={NAME} keeps the head in 16 bits: leave head out")


def compress_linear(q: QTensor, dtype: torch.dtype = torch.float16) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of one linear, by local name. dtype: of the scales"""
    zero = torch.full_like(q.scale, MIDDLE, dtype=torch.uint8) if q.zero is None else q.zero
    yield "qweight", _pack(q.codes)
    yield "qzeros", _pack(zero)
    yield "scales", q.scale.T.to(dtype)


def _pack(values: Tensor) -> Tensor:
    """uint8 (out, n), each below 16 -> int32 (n, out / 8)."""
    return pack_rows(_ordered(values.T.contiguous(), ORDER), BITS)


def _unpack(packed: Tensor) -> Tensor:
    """int32 (n, out / 8) -> uint8 (out, n)."""
    values = unpack_rows(packed.contiguous(), BITS, packed.shape[1] * IN_WORD)
    return _ordered(values, BACK).T.contiguous()


def _ordered(values: Tensor, order: tuple[int, ...]) -> Tensor:
    return values.unflatten(1, (-1, IN_WORD))[:, :, list(order)].flatten(1)


def scheme_of(folder: ModelFolder, name: str) -> Scheme:
    """The scheme of a linear, by the config and whether its zero points are all in the middle.

    Raises UserError for a version, bits or groups that are not read here.
    """
    config: dict[str, Any] = folder.config["quantization_config"]
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    bits = config.get("bits", config.get("w_bit"))
    size = config.get("group_size", config.get("q_group_size"))
    if version != "gemm" or bits != BITS or not isinstance(size, int):
        raise UserError(
            f"{folder.path}: of AWQ, version gemm with 4 bits is read here, this is {version!r} with {bits} "
            f"bits, group_size {size}"
        )
    symmetric = bool((folder.tensor(f"{name}.qzeros") == MIDDLES).all())
    return Scheme(BITS, "channel" if size == WHOLE_ROW else size, symmetric)


def read_linear(folder: ModelFolder, name: str) -> QTensor:
    """The QTensor of one linear. Raises UserError if the file contradicts its config."""
    scheme = scheme_of(folder, name)
    codes, zeros, stored = (folder.tensor(f"{name}.{p}") for p in ("qweight", "qzeros", "scales"))
    columns, words = codes.shape
    groups = columns // scheme.columns_per_group(columns)
    expect(folder, f"{name}.qzeros", zeros, (groups, words))
    expect(folder, f"{name}.scales", stored, (groups, words * IN_WORD))
    return QTensor(
        _unpack(codes),
        read_scale(stored.T.contiguous(), folder.dtype),
        None if scheme.symmetric else _unpack(zeros),
        BITS,
    )
