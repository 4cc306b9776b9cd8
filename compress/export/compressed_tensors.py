"""The compressed-tensors formats. vLLM, SGLang and transformers read them; they are written here without
the compressed-tensors package. A quantized linear NAME (out, in) is stored in one of these ways:

``pack-quantized``: integers of any width, in groups of g columns (or one a row), 16-bit activations; and
narrower ones than 8 bits with rounded activations
    NAME.weight_packed      int32 (out, ceil(in * bits / 32))    codes, dense bit stream along in
    NAME.weight_scale       model dtype (out, in / g)
    NAME.weight_shape       int64 (2,)                            [out, in]
    NAME.weight_zero_point  int32 (ceil(out * bits / 32), in / g) asymmetric only, packed along out
    The format counts codes from -2^(b-1) and stores them with that offset added, which gives exactly the
    unsigned codes of a QTensor.
``int-quantized``, ``float-quantized``: 8 bits with rounded activations
    NAME.weight             int8 or e4m3 (out, in)
    NAME.weight_scale       model dtype (out, 1), (1,) or (ceil(out / 128), ceil(in / 128))
    NAME.input_scale        float32 (1,), static activations only
``nvfp4-pack-quantized``, ``mxfp4-pack-quantized``: 4-bit floating point, 16-bit activations
    NAME.weight_packed      uint8 (out, in / 2)                   the even column in the low half
    NAME.weight_scale       e4m3 (out, in / 16), or e8m0 as uint8 (out, in / 32)
    NAME.weight_global_scale float32 (1,)                         NVFP4 only: scales are divided by it

``quantization_config`` in config.json says which. A quantized embedding and head with the scheme of the
linears are stored the same way. With another scheme, 8 bits and symmetric, they are ``int-quantized``.
A tied head is the embedding's matrix; its scales are then stored under both names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.export.packing import pack_rows, packed_width, unpack_rows
from compress.export.shards import ShardWriter
from compress.kv_cache.folder import scheme_of, stated_scheme
from compress.model.families import Family, family_of, turned_over
from compress.model.folder import ModelFolder, write_json
from compress.quantize import record
from compress.quantize.inputs import COLUMNS, InputScheme
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import BLOCK, NVFP4, Scheme, Schemes

log = logging.getLogger(__name__)

NAME = "compressed-tensors"
CODES = ".weight_packed"
SCALE = ".weight_scale"
PACKED, INT8, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
FLOAT8, NVFP4_PACKED, MXFP4_PACKED = (
    "float-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)
LAYOUTS = (PACKED, INT8, FLOAT8, NVFP4_PACKED, MXFP4_PACKED)
# The widths of a quantized embedding that engines agree on: 3-bit rows are packed in two ways.
HEAD_BITS = (4, 8)


def write(source: ModelFolder, target: Path) -> None:
    """Write a record as a compressed-tensors folder, tensor by tensor; a plain folder whose cache has fixed
    scales too. A plain one without is copied: there is nothing that the format could say.

    Raises UserError for a head that ``check`` refuses.
    """
    family = family_of(source.config)
    quantized = record.KEY in source.config
    if quantized:
        check(record.schemes_of(source))
    target.mkdir(parents=True)
    source.copy_companions(target)
    shards = ShardWriter(target, turned=turned_over(source.config))
    schemes: dict[str, Scheme] = {}
    for name, value in record.contents(source):
        if isinstance(value, Tensor):
            shards.add(name, value)
            continue
        base = name.removesuffix(".weight")
        schemes[base] = record.scheme_of(source, base)
        of_linears = record.schemes_of(source).linears
        apart = base in (family.embedding, family.head) and schemes[base] != of_linears
        for suffix, tensor in compress_linear(value, schemes[base], apart):
            shards.add(f"{base}.{suffix}", tensor)
        if apart and source.tied_head:
            shards.add(f"{family.head}{SCALE}", value.scale.clone())
    shards.close()
    config = {k: v for k, v in source.config.items() if k != record.KEY}
    cache = stated_scheme(scheme_of(source))
    if schemes or cache:
        found = {name: schemes[name] for name in sorted(schemes)}
        kept = record.kept(source) if quantized else []
        config["quantization_config"] = quantization_config(found, family, cache, kept)
    write_json(target / "config.json", config)


def check(schemes: Schemes) -> None:
    """Raises UserError for a head that transformers could not load beside these linears.

    transformers (5.23) loads a quantized embedding in two ways: packed, if it unpacks the whole file
    while loading, which it does by the first scheme of the file alone; or as int8 in a file whose
    schemes are all symmetric. Mixed bits with zero points are written, with a warning: vLLM reads them,
    transformers does not.
    """
    head, inputs = schemes.head, schemes.linears.inputs
    if inputs is not None and inputs.outliers != "none":
        raise UserError(
            f"export={NAME} has no place for outlier columns: choose export=bitsandbytes"
        )
    for scheme in (schemes.linears, *schemes.exceptions.values()):
        if not _served(scheme):
            raise UserError(
                f"no engine runs {scheme.name} from export={NAME}: choose weights and inputs as in "
                "scheme=int8, int8-channel, w8a8-int8, fp8, fp8-static, fp8-block, nvfp4, or mxfp4"
            )
    if schemes.exceptions and not schemes.linears.symmetric:
        log.warning(
            "mixed bits with zero points: transformers cannot load the checkpoint (scheme.symmetric=true "
            "would do), only engines that unpack each linear by its own scheme"
        )
    if head is None:
        return
    if head.bits not in HEAD_BITS:
        raise UserError(f"head.bits={head.bits} is not allowed: choose 4 or 8")
    linears = [schemes.linears, *schemes.exceptions.values()]
    alike = all(scheme == head for scheme in linears)
    apart = head.bits == 8 and head.symmetric and all(scheme.symmetric for scheme in linears)
    if not alike and not apart:
        raise UserError(
            f"a head of {head.name} beside linears of {schemes.linears.name} cannot be loaded: choose "
            "head=int8 with scheme.symmetric=true, or a head with the numbers of all linears"
        )


def _served(scheme: Scheme) -> bool:
    """Whether vLLM or SGLang have kernels for these numbers, by their source."""
    inputs, wide = scheme.inputs, scheme.bits == 8
    whole = scheme.group_size in ("channel", "tensor")
    if inputs is None:
        return scheme.grouped_integers or (scheme.type == "float" and (whole or not wide))
    if not wide:
        return scheme.grouped_integers and inputs.per == "token"
    if scheme.group_size == "block":
        return scheme.type == inputs.type == "float" and inputs.per == "group"
    return whole and scheme.type == inputs.type and inputs.per in ("token", "tensor")


def layout_of(scheme: Scheme, apart: bool = False) -> str:
    """The format that a linear of this scheme is stored in. apart: an 8-bit head beside other linears."""
    if scheme.type == "float":
        if scheme.bits == 8:
            return FLOAT8
        return NVFP4_PACKED if scheme.group_size == NVFP4 else MXFP4_PACKED
    return INT8 if apart or (scheme.inputs is not None and scheme.bits == 8) else PACKED


def compress_linear(
    q: QTensor, scheme: Scheme, apart: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of one linear, by local name. apart: as in ``layout_of``"""
    layout = layout_of(scheme, apart)
    if layout == PACKED:
        yield "weight_packed", pack_rows(q.codes, q.bits)
        yield "weight_shape", torch.tensor(q.shape, dtype=torch.int64)
    elif layout == INT8:
        # Flipping the top bit takes 128 off: an unsigned byte becomes the signed one.
        yield "weight", (q.codes ^ 128).view(torch.int8)
    elif layout == FLOAT8:
        yield "weight", q.codes.view(torch.float8_e4m3fn)
    else:
        yield "weight_packed", q.codes[:, 0::2] | q.codes[:, 1::2] << 4
    yield "weight_scale", q.scale.flatten() if scheme.group_size == "tensor" else q.scale
    if q.zero is not None:
        yield "weight_zero_point", pack_rows(q.zero.T.contiguous(), q.bits).T.contiguous()
    if q.divisor is not None:
        yield "weight_global_scale", q.divisor.reshape(1)
    if q.input_scale is not None:
        yield "input_scale", q.input_scale.reshape(1)


def quantization_config(
    schemes: Mapping[str, Scheme],
    family: Family,
    cache: dict[str, Any] | None = None,
    kept: Sequence[str] = (),
) -> dict[str, Any]:
    """``quantization_config`` of a model whose linears, embedding and head have these schemes.

    schemes: by full name. One scheme for all linears of the blocks is said once, for the class
    ``Linear``; mixed ones name each linear. cache: its ``kv_cache_scheme``; kept: the matrices of blocks
    that keep 16 bits
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
        groups.append(_group(head, [family.embedding, family.head], apart=True))
    config: dict[str, Any] = {
        "quant_method": NAME,
        "format": MIXED if apart else groups[0]["format"] if groups else "dense",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": [*kept, *([] if apart or family.head in schemes else family.head_names)],
        "kv_cache_scheme": cache,
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
    }
    zeros = uniform and not next(iter(names)).symmetric
    if uniform and not apart and (packed or zeros or family.open_weights):
        # transformers keeps weights packed until the first forward, and up to 5.23 that path
        # allocates the zero points of an asymmetric file in their unpacked shape and fails, and
        # fails for a packed embedding, and where a model asks a linear for its weight. This key
        # makes the plain from_pretrained call unpack them while loading. It takes the first scheme
        # for all, so a mixed file must not carry it. vLLM 0.32 ignores it.
        config["dequantize"] = True
        if cache is not None:
            log.warning(
                "transformers unpacks these weights while loading and then keeps the cache in 16 bits, "
                "whatever the checkpoint says; vLLM reads its scales"
            )
    return config


def _group(scheme: Scheme, targets: list[str], apart: bool = False) -> dict[str, Any]:
    layout = layout_of(scheme, apart)
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": scheme.type,
        "symmetric": scheme.symmetric,
        "strategy": scheme.group_size if isinstance(scheme.group_size, str) else "group",
        "group_size": scheme.group_size if isinstance(scheme.group_size, int) else None,
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    if scheme.group_size == "block":
        weights["block_structure"] = list(BLOCK)
    if layout == NVFP4_PACKED:
        weights |= {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    if layout == MXFP4_PACKED:
        weights["scale_dtype"] = "torch.uint8"
    return {
        "targets": targets,
        "format": layout,
        "weights": weights,
        "input_activations": None if scheme.inputs is None else _inputs(scheme.inputs),
        "output_activations": None,
    }


def _inputs(inputs: InputScheme) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": inputs.type,
        "symmetric": True,
        "strategy": inputs.per,
        "group_size": COLUMNS if inputs.per == "group" else None,
        "dynamic": not inputs.static,
        "observer": "minmax" if inputs.static else None,
        "observer_kwargs": {},
    }


def linears(folder: ModelFolder) -> list[str]:
    """Names of the quantized linears, embedding and head included, without suffix, in file order."""
    found = [name.removesuffix(CODES) for name in folder.names if name.endswith(CODES)]
    scaled = [name.removesuffix(SCALE) for name in folder.names if name.endswith(SCALE)]
    return [*found, *(name for name in scaled if f"{name}.weight" in folder)]


def read_linear(folder: ModelFolder, name: str) -> QTensor:
    """The QTensor of one linear. Raises UserError if the file contradicts its config."""
    scheme, layout = described(folder, name)
    if layout == PACKED:
        out_features, in_features = (int(n) for n in folder.tensor(f"{name}.weight_shape"))
    else:
        stored = folder.tensor(f"{name}{CODES}" if f"{name}{CODES}" in folder else f"{name}.weight")
        halves = 2 if layout in (NVFP4_PACKED, MXFP4_PACKED) else 1
        out_features, in_features = stored.shape[0], stored.shape[1] * halves
    shape = torch.Size((out_features, in_features))
    block = scheme.block(shape)
    return QTensor(
        _codes(folder, name, layout, scheme, shape),
        _scale(folder, name, layout, scheme, shape),
        _zero(folder, name, scheme, shape),
        scheme.bits,
        scheme.type,
        block,
        _one(folder, f"{name}.weight_global_scale") if layout == NVFP4_PACKED else None,
        scheme.inputs,
        _one(folder, f"{name}.input_scale") if scheme.inputs and scheme.inputs.static else None,
    )


def _codes(
    folder: ModelFolder, name: str, layout: str, scheme: Scheme, shape: torch.Size
) -> Tensor:
    key = f"{name}.weight" if layout in (INT8, FLOAT8) else f"{name}{CODES}"
    stored = folder.tensor(key)
    if layout == PACKED:
        _expect(folder, key, stored, torch.int32, (shape[0], packed_width(shape[1], scheme.bits)))
        return unpack_rows(stored, scheme.bits, shape[1])
    if layout == INT8:
        _expect(folder, key, stored, torch.int8, shape)
        return stored.view(torch.uint8) ^ 128
    if layout == FLOAT8:
        _expect(folder, key, stored, torch.float8_e4m3fn, shape)
        return stored.view(torch.uint8)
    _expect(folder, key, stored, torch.uint8, (shape[0], shape[1] // 2))
    return torch.stack([stored & 15, stored >> 4], dim=-1).flatten(1)


def _scale(
    folder: ModelFolder, name: str, layout: str, scheme: Scheme, shape: torch.Size
) -> Tensor:
    key = f"{name}{SCALE}"
    stored, block = folder.tensor(key), scheme.block(shape)
    dtypes = {NVFP4_PACKED: torch.float8_e4m3fn, MXFP4_PACKED: torch.uint8}
    if block is not None:
        rows, columns = block
        expected = (-(-shape[0] // rows), -(-shape[1] // columns))
        stored = stored.reshape(1, 1) if stored.numel() == 1 else stored
    else:
        expected = (shape[0], shape[1] // scheme.columns_per_group(shape[1]))
    _expect(folder, key, stored, dtypes.get(layout, stored.dtype), expected)
    family = family_of(folder.config)
    tied = f"{family.head}{SCALE}"
    shared = folder.tied_head and name == family.embedding and tied in folder
    if shared and not torch.equal(folder.tensor(tied), stored):
        raise UserError(
            f"{folder.place_of(tied)}: {tied} differs from the scales of {name}, which it shares"
        )
    return stored


def _zero(folder: ModelFolder, name: str, scheme: Scheme, shape: torch.Size) -> Tensor | None:
    if scheme.symmetric:
        return None
    key = f"{name}.weight_zero_point"
    stored, groups = folder.tensor(key), shape[1] // scheme.columns_per_group(shape[1])
    _expect(folder, key, stored, torch.int32, (packed_width(shape[0], scheme.bits), groups))
    return unpack_rows(stored.T.contiguous(), scheme.bits, shape[0]).T.contiguous()


def _one(folder: ModelFolder, key: str) -> Tensor:
    stored = folder.tensor(key)
    if stored.numel() != 1:
        raise UserError(
            f"{folder.place_of(key)}: {key} has {stored.numel()} elements, one is asked for"
        )
    return stored.reshape(()).float()


def described(folder: ModelFolder, name: str) -> tuple[Scheme, str]:
    """Scheme and layout of a linear, from the group of the config that it belongs to."""
    config = folder.config.get("quantization_config", {})
    groups = list(config.get("config_groups", {}).values())
    # A linear's own name counts before its class, as in the engines.
    own = [group for group in groups if any(_matches(name, t) for t in group["targets"])]
    group = next(iter([*own, *(g for g in groups if "Linear" in g["targets"])]), None)
    if group is None:
        raise UserError(f"{folder.path}: no group of its quantization_config names {name}")
    layout = group.get("format") or config.get("format")
    if layout not in LAYOUTS:
        raise UserError(
            f"{folder.path}: of compressed-tensors, {', '.join(LAYOUTS)} are read here, this is "
            f"{layout!r}"
        )
    weights = group.get("weights") or {}
    if weights.get("actorder") not in (None, "weight", "static"):
        raise UserError(f"{folder.path}: actorder {weights['actorder']!r} is not read here")
    strategy = weights.get("strategy")
    if strategy not in ("channel", "tensor", "block", "group", "tensor_group") or (
        strategy == "block" and tuple(weights.get("block_structure") or ()) != BLOCK
    ):
        raise UserError(f"{folder.path}: weights by {strategy!r} are not read here")
    try:
        scheme = Scheme(
            bits=int(weights["num_bits"]),
            group_size=int(weights["group_size"]) if "group" in strategy else strategy,
            symmetric=bool(weights["symmetric"]),
            type=str(weights["type"]),
            inputs=_read_inputs(folder, group.get("input_activations")),
        )
    except UserError as error:
        raise UserError(f"{folder.place_of(name)}: {name} is not read here: {error}") from error
    if layout not in (layout_of(scheme), layout_of(scheme, apart=scheme.bits == 8)):
        raise UserError(f"{folder.path}: {scheme.name} as {layout} is not read here")
    return scheme, layout


def _read_inputs(folder: ModelFolder, inputs: Mapping[str, Any] | None) -> InputScheme | None:
    if inputs is None:
        return None
    found = InputScheme(type=inputs.get("type", ""), per=inputs.get("strategy", ""))
    expected = _inputs(found)
    for key in ("num_bits", "symmetric", "group_size", "dynamic"):
        if inputs.get(key) != expected[key]:
            raise UserError(
                f"{folder.path}: activations with {key} {inputs.get(key)!r} are not read here"
            )
    return found


def _matches(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return name == target


def _expect(
    folder: ModelFolder, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if tensor.dtype != dtype:
        raise UserError(
            f"{folder.place_of(name)}: {name} is {tensor.dtype}, its config asks for {dtype}"
        )
    if tuple(tensor.shape) != tuple(shape):
        raise UserError(
            f"{folder.place_of(name)}: {name} has shape {tuple(tensor.shape)}, its config asks for "
            f"{tuple(shape)}"
        )
