"""The quantize stage: a model folder in, a record folder out, one decoder block in memory at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibration.moments import collect
from compress.errors import UserError
from compress.model.families import Family, family_of
from compress.model.folder import ModelFolder
from compress.model.walk import Walk
from compress.progress import track
from compress.quantize.block import Block, Rounding, Transform, output_error
from compress.quantize.qtensor import QTensor
from compress.quantize.record import KEY, RecordWriter
from compress.quantize.scheme import Scheme

log = logging.getLogger(__name__)


def quantize(
    source: ModelFolder,
    target: Path,
    *,
    tokens: Tensor | None,
    scheme: Scheme,
    transforms: Sequence[Transform],
    rounding: Rounding,
    device: torch.device,
) -> dict[str, Any]:
    """Quantize every linear of the decoder blocks; embedding and head stay as they are.

    tokens: calibration tokens (sequences, length), or None if no method needs data. With tokens the
        inputs of a block come from the already quantized blocks before it, and errors are reported.
    Writes the record to ``target`` and returns what metrics.json keeps: the settled scheme, and per
    block its seconds and per linear its relative output error.

    Raises UserError for an unknown family, a source that is quantized already or holds tensors its
    config does not account for, a group size that does not fit, weights that are not finite.
    """
    family = family_of(source.config)
    scheme = settle(source, family, scheme)
    writer = RecordWriter(target, source, asdict(scheme))
    walk = Walk(source, family, device)
    if tokens is not None:
        walk.embed(tokens)
    assert tokens is not None or not (transforms or rounding.needs_moments), "methods need tokens"

    blocks = []
    for index in track(range(len(walk)), "quantize blocks"):
        start = time.perf_counter()
        prefix = walk.prefix(index)
        with walk.open(index) as module, torch.no_grad():
            block = open_block(module, prefix, family, scheme, source.dtype)
            if tokens is not None:
                _calibrate(block, walk, index)
            for transform in transforms:
                transform(block)
            quantized = rounding(block)
            report = _close(block, quantized)
            if tokens is not None:
                walk.run(index, keep=True)
            writer.add(f"block-{index:05d}.safetensors", _tensors(block, prefix, quantized))
        report["seconds"] = time.perf_counter() - start
        log.info("%s: %.1f s%s", prefix, report["seconds"], _error_text(report["linears"]))
        blocks.append(report)
    _copy_rest(source, family, len(walk), writer)
    writer.close()
    return {"scheme": {"name": scheme.name, **asdict(scheme)}, "blocks": blocks}


def settle(source: ModelFolder, family: Family, scheme: Scheme) -> Scheme:
    """The scheme with its group size settled on the shapes of the model, read from file headers.

    Raises UserError if the model is quantized already, or the scheme does not fit it.
    """
    if "quantization_config" in source.config or KEY in source.config:
        raise UserError(f"{source.path} is quantized already: start from its 16-bit original")
    prefix = f"{family.blocks}."
    suffixes = tuple(f".{name}.weight" for name in family.linears)
    shapes = {
        name: source.shape(name)
        for name in source.names
        if name.startswith(prefix) and name.endswith(suffixes)
    }
    if not shapes:
        raise UserError(f"{source.path} holds none of the linears of the {family.name} family")
    settled = scheme.resolve({name: (shape[0], shape[1]) for name, shape in shapes.items()})
    if settled != scheme:
        log.info("scheme.group_size=auto: groups of %s divide every linear", settled.group_size)
    return settled


def open_block(
    module: nn.Module, prefix: str, family: Family, scheme: Scheme, dtype: torch.dtype
) -> Block:
    """A block with float32 working copies of its linears. Raises UserError on NaN or Inf weights."""
    block = Block(module, family, scheme, dtype, weights={})
    for name in family.linears:
        W = block.part(name).weight.detach().to(torch.float32, copy=True)
        if not torch.isfinite(W).all():
            raise UserError(f"tensor {prefix}.{name}.weight holds NaN or Inf")
        block.weights[name] = W
    return block


def _calibrate(block: Block, walk: Walk, index: int) -> None:
    """Fill the moments by running the block, not yet quantized, on its inputs."""
    linears = {name: block.part(name) for name in block.weights}
    with collect(linears, [shared.linears for shared in block.family.inputs]) as sums:
        walk.run(index, keep=False)
    means = {id(m): m.mean() for m in sums.values()}
    block.moments = {name: means[id(m)] for name, m in sums.items()}


def _close(block: Block, quantized: Mapping[str, QTensor]) -> dict[str, Any]:
    """Put the quantized weights into the module and report each linear's relative output error.

    The error is taken in the transformed space, E|Wq x - W x|^2 / E|W x|^2, W after the transforms.
    """
    report: dict[str, Any] = {"linears": {}, "notes": block.notes}
    for name, q in quantized.items():
        Wq = q.dequantize(block.dtype)
        entry = {"bits_per_weight": q.bits_per_weight}
        if name in block.moments:
            H, W = block.moments[name].second, block.weights[name]
            before = output_error(W, H)
            entry["relative_error"] = output_error(Wq.float() - W, H) / before if before else 0.0
        report["linears"][name] = entry
        block.part(name).weight.data = Wq
    return report


def _tensors(block: Block, prefix: str, quantized: Mapping[str, QTensor]) -> dict[str, Any]:
    """Every tensor of the block under its full name, quantized linears as QTensor."""
    plain = {f"{prefix}.{name}": p.data for name, p in block.module.named_parameters()}
    return plain | {f"{prefix}.{name}.weight": q for name, q in quantized.items()}


def _copy_rest(source: ModelFolder, family: Family, blocks: int, writer: RecordWriter) -> None:
    prefixes = tuple(f"{family.blocks}.{index}." for index in range(blocks))
    rest = [name for name in source.names if not name.startswith(prefixes)]
    writer.add("rest.safetensors", {name: source.tensor(name).to(source.dtype) for name in rest})


def _error_text(linears: Mapping[str, Mapping[str, float]]) -> str:
    errors: Iterable[float] = [
        e["relative_error"] for e in linears.values() if "relative_error" in e
    ]
    text = ", ".join(f"{error:.2e}" for error in errors)
    return f", relative output error {text}" if text else ""
