"""The compressed-tensors format ``pack-quantized``: integer weights, 16-bit activations.

A quantized linear NAME (out, in) with groups of g columns is stored as
    NAME.weight_packed      int32 (out, ceil(in * bits / 32))    codes, dense bit stream along in
    NAME.weight_scale       model dtype (out, in / g)
    NAME.weight_shape       int64 (2,)                            [out, in]
    NAME.weight_zero_point  int32 (ceil(out * bits / 32), in / g) asymmetric only, packed along out
and ``quantization_config`` in config.json. The format counts codes from -2^(b-1) and stores them
with that offset added, which gives exactly the unsigned codes of a QTensor. vLLM, SGLang and
transformers read it; it is written here without the compressed-tensors package.
"""

from __future__ import annotations

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
from compress.quantize.scheme import Scheme

NAME = "compressed-tensors"
CODES = ".weight_packed"


def write(source: ModelFolder, target: Path) -> None:
    """Write a record as a compressed-tensors folder, tensor by tensor."""
    target.mkdir(parents=True)
    source.copy_companions(target)
    shards = ShardWriter(target)
    quantized = set(record.linears(source))
    for name in source.names:
        base, _, part = name.rpartition(".")
        if base not in quantized or part == "bias":
            shards.add(name, source.tensor(name))
        elif part == "codes":
            for suffix, tensor in compress_linear(record.read_linear(source, base)).items():
                shards.add(f"{base}.{suffix}", tensor)
    shards.close()
    config = {k: v for k, v in source.config.items() if k != record.KEY}
    quantization = quantization_config(
        {name: record.scheme_of(source, name) for name in sorted(quantized)},
        family_of(source.config),
    )
    write_json(target / "config.json", {**config, "quantization_config": quantization})


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
    """``quantization_config`` of a model whose linears have these schemes, by full name.

    One scheme for all linears of the blocks is said once, for the class ``Linear``; mixed ones name
    each linear.
    """
    names: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        names.setdefault(scheme, []).append(name)
    uniform = len(names) == 1
    config: dict[str, Any] = {
        "quant_method": NAME,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": [family.head],
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{i}": _group(scheme, ["Linear"] if uniform else targets)
            for i, (scheme, targets) in enumerate(names.items())
        },
    }
    if not all(scheme.symmetric for scheme in names):
        # transformers keeps weights packed until the first forward, and up to 5.23 that path
        # allocates the zero points of an asymmetric file in their unpacked shape and fails. This
        # key makes the plain from_pretrained call unpack them while loading. vLLM 0.32 ignores it.
        config["dequantize"] = True
    return config


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    channel = scheme.group_size == "channel"
    return {
        "targets": targets,
        "format": "pack-quantized",
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
    """Names of the quantized linears, without suffix, in file order."""
    return [name.removesuffix(CODES) for name in folder.names if name.endswith(CODES)]


def read_linear(folder: ModelFolder, name: str) -> QTensor:
    """The QTensor of one linear. Raises UserError if the file contradicts its config."""
    weights = _weights_of(folder, name)
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


def _weights_of(folder: ModelFolder, name: str) -> dict[str, Any]:
    """The weight settings of the group that a linear belongs to."""
    config = folder.config.get("quantization_config", {})
    groups = list(config.get("config_groups", {}).values())
    if config.get("format") != "pack-quantized":
        raise UserError(
            f"{folder.path}: of compressed-tensors, only pack-quantized is read here, "
            f"this is {config.get('format')!r}"
        )
    # A linear's own name counts before its class, as in the engines.
    own = [group for group in groups if any(_matches(name, t) for t in group["targets"])]
    group = next(iter([*own, *(g for g in groups if "Linear" in g["targets"])]), None)
    if group is None:
        raise UserError(f"{folder.path}: no group of its quantization_config names {name}")
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
