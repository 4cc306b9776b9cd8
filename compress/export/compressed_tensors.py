"""The compressed-tensors format ``pack-quantized``: integer weights, 16-bit activations.

A quantized linear NAME (out, in) with groups of g columns is stored as
    NAME.weight_packed      int32 (out, ceil(in * bits / 32))    codes, dense bit stream along in
    NAME.weight_scale       model dtype (out, in / g)
    NAME.weight_shape       int64 (2,)                            [out, in]
    NAME.weight_zero_point  int32 (ceil(out * bits / 32), in / g) asymmetric only, packed along out
and ``quantization_config`` in config.json. The format counts codes from -2^(b-1) and stores them
with that offset added, which gives exactly the unsigned codes of a QTensor. vLLM, SGLang and
transformers read it; it is written here without the compressed-tensors package.

A quantized embedding and head with the scheme of the linears are stored the same way. With another
scheme, 8 bits and symmetric, they are ``int-quantized``: NAME.weight int8 (vocabulary, hidden) and
NAME.weight_scale. A tied head is the embedding's matrix; its scales are then stored under both names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.export.packing import pack_rows, packed_width, unpack_rows
from compress.export.shards import ShardWriter
from compress.model.families import Family, family_of
from compress.model.folder import ModelFolder, write_json
from compress.quantize import record
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Scheme, Schemes

log = logging.getLogger(__name__)

NAME = "compressed-tensors"
CODES = ".weight_packed"
SCALE = ".weight_scale"
PACKED, INT8, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
# The widths of a quantized embedding that engines agree on: 3-bit rows are packed in two ways.
HEAD_BITS = (4, 8)


def write(source: ModelFolder, target: Path) -> None:
    """Write a record as a compressed-tensors folder, tensor by tensor.

    Raises UserError for a head that ``check`` refuses.
    """
    schemes, family = record.schemes_of(source), family_of(source.config)
    check(schemes)
    target.mkdir(parents=True)
    source.copy_companions(target)
    shards = ShardWriter(target)
    quantized = set(record.linears(source))
    for name in source.names:
        base, _, part = name.rpartition(".")
        if base not in quantized or part == "bias":
            shards.add(name, source.tensor(name))
        elif part == "codes":
            apart = base in (family.embedding, family.head) and schemes.head != schemes.linears
            q = record.read_linear(source, base)
            for suffix, tensor in (compress_int8(q) if apart else compress_linear(q)).items():
                shards.add(f"{base}.{suffix}", tensor)
            if apart and source.tied_head:
                shards.add(f"{family.head}{SCALE}", q.scale.clone())
    shards.close()
    config = {k: v for k, v in source.config.items() if k != record.KEY}
    quantization = quantization_config(
        {name: record.scheme_of(source, name) for name in sorted(quantized)},
        family,
    )
    write_json(target / "config.json", {**config, "quantization_config": quantization})


def check(schemes: Schemes, mixed: bool = False) -> None:
    """Raises UserError for a head that transformers could not load beside these linears.

    transformers (5.23) loads a quantized embedding in two ways: packed, if it unpacks the whole file
    while loading, which it does by the first scheme of the file alone; or as int8 in a file whose
    schemes are all symmetric. mixed: the linears will differ from each other. With zero points such a
    file is written, with a warning: vLLM reads it, transformers refuses it.
    """
    head = schemes.head
    if mixed and not schemes.linears.symmetric:
        log.warning(
            "mixed bits with zero points: transformers cannot load the checkpoint (scheme.symmetric=true "
            "would do), only engines that unpack each linear by its own scheme"
        )
    if head is None:
        return
    if head.bits not in HEAD_BITS:
        raise UserError(f"head.bits={head.bits} is not allowed: choose 4 or 8")
    linears = [schemes.linears, *schemes.exceptions.values()]
    alike = not mixed and all(scheme == head for scheme in linears)
    apart = head.bits == 8 and head.symmetric and all(scheme.symmetric for scheme in linears)
    if not alike and not apart:
        raise UserError(
            f"a head of {head.name} beside linears of {schemes.linears.name} cannot be loaded: choose "
            "head=int8 with scheme.symmetric=true, or a head with the numbers of all linears"
        )


def compress_int8(q: QTensor) -> dict[str, Tensor]:
    """The stored tensors of an embedding or head of 8 bits beside linears of another scheme."""
    assert q.bits == 8, q.bits
    assert q.symmetric
    # Flipping the top bit takes 128 off: an unsigned byte becomes the signed one.
    return {"weight": (q.codes ^ 128).view(torch.int8), "weight_scale": q.scale}


def compress_linear(q: QTensor) -> dict[str, Tensor]:
    """The stored tensors of one linear, by local name."""
    tensors = {
        "weight_packed": pack_rows(q.codes, q.bits),
        "weight_scale": q.scale,
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if q.zero is not None:
        tensors["weight_zero_point"] = pack_rows(q.zero.T.contiguous(), q.bits).T.contiguous()
    return tensors


def quantization_config(schemes: Mapping[str, Scheme], family: Family) -> dict[str, Any]:
    """``quantization_config`` of a model whose linears, embedding and head have these schemes.

    schemes: by full name. One scheme for all linears of the blocks is said once, for the class
    ``Linear``; mixed ones name each linear.
    """
    names: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        if name not in (family.embedding, family.head):
            names.setdefault(scheme, []).append(name)
    uniform = len(names) == 1
    groups = [
        _group(scheme, ["Linear"] if uniform else targets) for scheme, targets in names.items()
    ]
    head = schemes.get(family.embedding)
    packed, apart = head in names, head is not None and head not in names
    if packed:
        groups[0]["targets"].append(family.embedding)
    if head is not None and apart:
        groups.append({**_group(head, [family.embedding, family.head]), "format": INT8})
    config: dict[str, Any] = {
        "quant_method": NAME,
        "format": MIXED if apart else PACKED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": [] if apart or family.head in schemes else [family.head],
        "kv_cache_scheme": None,
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
    }
    if uniform and not apart and (packed or not next(iter(names)).symmetric):
        # transformers keeps weights packed until the first forward, and up to 5.23 that path
        # allocates the zero points of an asymmetric file in their unpacked shape and fails, and
        # fails for a packed embedding. This key makes the plain from_pretrained call unpack them
        # while loading. It takes the first scheme for all, so a mixed file must not carry it.
        # vLLM 0.32 ignores it.
        config["dequantize"] = True
    return config


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    channel = scheme.group_size == "channel"
    return {
        "targets": targets,
        "format": PACKED,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "channel" if channel else "group",
            "group_size": None if channel else scheme.group_size,
            "dynamic": False,
            "observer": "minmax",
            "observer_kwargs": {},
        },
        "input_activations": None,
        "output_activations": None,
    }


def linears(folder: ModelFolder) -> list[str]:
    """Names of the quantized linears, embedding and head included, without suffix, in file order."""
    found = [name.removesuffix(CODES) for name in folder.names if name.endswith(CODES)]
    scaled = [name.removesuffix(SCALE) for name in folder.names if name.endswith(SCALE)]
    return [*found, *(name for name in scaled if f"{name}.weight" in folder)]


def read_linear(folder: ModelFolder, name: str) -> QTensor:
    """The QTensor of one linear. Raises UserError if the file contradicts its config."""
    weights = _weights_of(folder, name)
    if f"{name}{CODES}" not in folder:
        return _read_int8(folder, name, weights)
    bits = int(weights["num_bits"])
    packed = folder.tensor(f"{name}.weight_packed")
    scale = folder.tensor(f"{name}.weight_scale")
    out_features, in_features = (int(n) for n in folder.tensor(f"{name}.weight_shape"))
    groups = 1 if weights["strategy"] == "channel" else in_features // int(weights["group_size"])
    _expect(
        folder, f"{name}.weight_packed", packed, (out_features, packed_width(in_features, bits))
    )
    _expect(folder, f"{name}.weight_scale", scale, (out_features, groups))
    zero = None
    if not weights["symmetric"]:
        stored = folder.tensor(f"{name}.weight_zero_point")
        shape = (packed_width(out_features, bits), groups)
        _expect(folder, f"{name}.weight_zero_point", stored, shape)
        zero = unpack_rows(stored.T.contiguous(), bits, out_features).T.contiguous()
    return QTensor(unpack_rows(packed, bits, in_features), scale, zero, bits)


def _read_int8(folder: ModelFolder, name: str, weights: Mapping[str, Any]) -> QTensor:
    stored, scale = folder.tensor(f"{name}.weight"), folder.tensor(f"{name}{SCALE}")
    if stored.dtype != torch.int8 or not weights["symmetric"] or weights["num_bits"] != 8:
        raise UserError(
            f"{folder.path}: {name} is not stored as symmetric int8, which is read here"
        )
    columns = stored.shape[1]
    groups = 1 if weights["strategy"] == "channel" else columns // int(weights["group_size"])
    _expect(folder, f"{name}{SCALE}", scale, (stored.shape[0], groups))
    tied = f"{family_of(folder.config).head}{SCALE}"
    if folder.tied_head and not torch.equal(folder.tensor(tied), scale):
        raise UserError(f"{folder.path}: {tied} differs from the scales of {name}, which it shares")
    return QTensor(stored.view(torch.uint8) ^ 128, scale, None, 8)


def _weights_of(folder: ModelFolder, name: str) -> dict[str, Any]:
    """The weight settings of the group that a linear belongs to."""
    config = folder.config.get("quantization_config", {})
    groups = list(config.get("config_groups", {}).values())
    if config.get("format") not in (PACKED, MIXED):
        raise UserError(
            f"{folder.path}: of compressed-tensors, only {PACKED} is read here, "
            f"this is {config.get('format')!r}"
        )
    # A linear's own name counts before its class, as in the engines.
    own = [group for group in groups if any(_matches(name, t) for t in group["targets"])]
    group = next(iter([*own, *(g for g in groups if "Linear" in g["targets"])]), None)
    if group is None:
        raise UserError(f"{folder.path}: no group of its quantization_config names {name}")
    if group.get("input_activations") is not None:
        raise UserError(f"{folder.path}: quantized activations are not read here")
    weights = group.get("weights") or {}
    if weights.get("type") != "int" or weights.get("strategy") not in ("group", "channel"):
        raise UserError(
            f"{folder.path}: only integer weights by group or channel are read here, "
            f"this is {weights.get('type')!r} by {weights.get('strategy')!r}"
        )
    if weights.get("actorder") not in (None, "weight", "static"):
        raise UserError(f"{folder.path}: actorder {weights['actorder']!r} is not read here")
    return weights


def _matches(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return name == target


def _expect(folder: ModelFolder, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"{folder.path}: {name} has shape {tuple(tensor.shape)}, its config asks for {shape}"
        )
