"""The quantize stage: a model folder in, a record folder out, one decoder block in memory at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.model.families import Family, check_applies, family_of, linears_among
from compress.model.folder import ModelFolder, Shapes
from compress.model.skeleton import finite, finite_rows
from compress.model.walk import Activations, Walk
from compress.processes import ALONE, Team
from compress.progress import track
from compress.quantize.block import (
    Block,
    Rounding,
    Transform,
    output_error,
    row_parts,
    summed_error,
)
from compress.quantize.head import quantize_rows
from compress.quantize.outliers import Outliers
from compress.quantize.qtensor import QTensor
from compress.quantize.record import KEY, RecordWriter
from compress.quantize.rounding.gptq import Gptaq
from compress.quantize.scheme import Scheme, Schemes
from compress.saved import NOWHERE, Position, Saved, named
from eval.memory import trim

log = logging.getLogger(__name__)


def quantize(  # noqa: PLR0913
    source: ModelFolder,
    target: Path,
    *,
    tokens: Tensor | None,
    schemes: Schemes,
    transforms: Sequence[Transform],
    roundings: Sequence[Rounding],
    device: torch.device,
    saved: Saved = NOWHERE,
    spill: Path | None = None,
    team: Team = ALONE,
    all_experts: bool = False,
) -> dict[str, Any]:
    """Quantize the linears of the decoder blocks.

    tokens: calibration tokens (sequences, length), or None if no method needs data. With tokens the
        inputs of a block come from the already quantized blocks before it, and errors are reported.
    roundings: the first picks the integers, each further one refines them
    saved: where a killed one left the blocks that it had done
    spill: a folder that hidden states are kept in, if not in memory
    team: the processes that share the sequences; all return the same but for ``head``
    all_experts: all tokens are observed in all experts
    Writes the record to ``target``, the main process alone, and returns what metrics.json keeps: per block
    its seconds and, if a method looks at the original, the drift from it; per linear its relative output
    error, and how many tokens each expert saw; how often damping was raised; which linears saw fewer tokens
    than they have inputs; outliers among
    the inputs, if these are rounded; for embedding and head, if they are quantized, the relative error of
    their weights.

    Raises UserError for an unknown family, a source that is quantized already or holds tensors its
    config does not account for, a group size that does not fit, weights that are not finite.
    """
    family = family_of(source.config)
    check_roundings(roundings, source.config)
    schemes = settle(source, family, schemes)
    inputs, outliers = schemes.linears.inputs, None
    if tokens is not None and inputs is not None:
        outliers = Outliers(inputs.threshold)
    walk = Walk(source, family, device, spill=spill, team=team)
    original = any(method.needs_original for method in roundings)
    assert tokens is not None or not needs_data(schemes, transforms, roundings), (
        "methods need tokens"
    )
    if tokens is not None:
        walk.embed(tokens, original=original)

    position = saved.load()
    with saved.files(target) as folder:
        writer = RecordWriter(folder, source, schemes) if team.is_main else None
        work = _Work(walk, writer, outliers, all_experts)
        if position is not None:
            work.go_on(position)
        # It holds what entered the block that comes next.
        del position
        for index in track(range(len(work.blocks), len(walk)), "quantize blocks"):
            work.blocks.append(_block(index, work, schemes, transforms, roundings, tokens))
            # What is kept of each block is little, but scattered: the freed memory between would add up.
            trim()
            saved.offer(*work.position())
        head = {}
        if writer is not None:
            head = _copy_rest(source, family, schemes, len(walk), writer, device)
            writer.close()
    return ({} if outliers is None else {"outliers": outliers.report()}) | {
        "scheme": {"name": schemes.name, **schemes.as_config()},
        "damping_raised": sum(
            key.startswith("damping_raised") for report in work.blocks for key in report["notes"]
        ),
        "few_tokens": [
            f"{walk.prefix(index)}.{name}"
            for index, report in enumerate(work.blocks)
            for name, entry in report["linears"].items()
            if "few_tokens" in entry
        ],
        "blocks": work.blocks,
        "head": head,
    }


@dataclass
class _Work:
    """How far quantizing is. writer: None beside the main process; blocks: the report of each that is done"""

    walk: Walk
    writer: RecordWriter | None
    outliers: Outliers | None
    all_experts: bool = False
    blocks: list[dict[str, Any]] = field(default_factory=list)

    def position(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        weight_map = {} if self.writer is None else self.writer.weight_map
        facts: dict[str, Any] = {"blocks": self.blocks, "weight_map": weight_map}
        states = {"hidden": self.walk.hidden, "original": self.walk.original}
        tensors = {name: X for name, X in states.items() if X is not None}
        if self.outliers is not None:
            facts["outliers"], shares = self.outliers.position()
            tensors |= named("outliers", shares)
        return facts, tensors

    def go_on(self, position: Position) -> None:
        self.blocks = position.facts["blocks"]
        if self.writer is not None:
            self.writer.weight_map |= position.facts["weight_map"]
        for name in ("hidden", "original"):
            if name in position.tensors:
                setattr(self.walk, name, self.walk.states.keep(position.tensors.mapped(name)))
        if self.outliers is not None:
            self.outliers.go_on(position.facts["outliers"], position.under("outliers"))
        log.info("quantize goes on after block %d of %d", len(self.blocks), len(self.walk))


def _block(
    index: int,
    work: _Work,
    schemes: Schemes,
    transforms: Sequence[Transform],
    roundings: Sequence[Rounding],
    tokens: Tensor | None,
) -> dict[str, Any]:
    """Quantize a block and write it. Returns its report."""
    start, walk = time.perf_counter(), work.walk
    prefix = walk.prefix(index)
    with walk.open(index) as module, torch.no_grad():
        block = open_block(module, prefix, walk.family, schemes, walk.folder.dtype)
        if tokens is not None:
            block.activations = walk.enter(index)
            block.all_experts = work.all_experts
        for transform in transforms:
            transform(block)
        quantized = round_block(block, roundings)
        if work.outliers is not None:
            work.outliers.add(block, quantized)
        experts = _experts(block)
        report = _close(block, quantized) | experts
        if block.activations is not None:
            with block.attention_once():
                walk.leave(index, block.activations)
            report |= _drift(walk, block.activations)
        if work.writer is not None:
            work.writer.add(f"block-{index:05d}.safetensors", _tensors(block, prefix, quantized))
        walk.check_same(index, module)
    report["seconds"] = time.perf_counter() - start
    log.info("%s: %.1f s%s", prefix, report["seconds"], _error_text(report))
    _warn_of_unseen(prefix, report)
    return report


def check_roundings(roundings: Sequence[Rounding], config: dict[str, Any]) -> None:
    """Raises UserError for a rounding that does not apply to a model."""
    if any(isinstance(method, Gptaq) for method in roundings):
        check_applies("gptaq", config)


def needs_data(
    schemes: Schemes, transforms: Sequence[Transform], roundings: Sequence[Rounding]
) -> bool:
    """Whether anything that quantizes looks at calibration tokens."""
    inputs = schemes.linears.inputs
    fixed = inputs is not None and inputs.needs_data
    return fixed or bool(transforms) or any(method.needs_data for method in roundings)


def round_block(block: Block, roundings: Sequence[Rounding]) -> dict[str, QTensor]:
    """Pick the integers of a transformed block."""
    for name, W in block.weights.items():
        block.place(name, W)
    if block.activations is not None and not (block.moments or roundings[0].observes):
        block.observe(*block.inputs)
    quantized: dict[str, QTensor] = {}
    for method in roundings:
        quantized = method(block, quantized)
    return {name: _with_inputs(block, name, q) for name, q in quantized.items()}


def _with_inputs(block: Block, name: str, q: QTensor) -> QTensor:
    """The quantized weight with what its scheme says of the inputs, fixed on the moments where it must be."""
    inputs = block.schemes[name].inputs
    if inputs is None:
        return q
    moments = block.moments_of(name) if inputs.needs_data else None
    scale = columns = kept = None
    if inputs.static:
        assert moments is not None
        scale = inputs.scale_of(moments.largest.max())
    if inputs.outliers == "static":
        assert moments is not None
        columns = inputs.outlier_columns(moments.largest)
        kept = block.weights[name][:, columns].to(block.dtype)
    return replace(q, inputs=inputs, input_scale=scale, columns=columns, kept=kept)


def settle(source: Shapes, family: Family, schemes: Schemes) -> Schemes:
    """The schemes with group sizes settled on the shapes of the model, read from file headers.

    Raises UserError if the model is quantized already, or a scheme does not fit it.
    """
    if "quantization_config" in source.config or KEY in source.config:
        raise UserError(f"{source.path} is quantized already: start from its 16-bit original")
    shapes = {name: source.shape(f"{name}.weight") for name in linear_names(source, family)}
    if not shapes:
        raise UserError(f"{source.path} holds none of the linears of the {family.name} family")
    linears = {name: (shape[0], shape[1]) for name, shape in shapes.items()}
    if unknown := [name for name in schemes.exceptions if name not in linears]:
        raise UserError(f"{source.path} holds no linear {unknown[0]}")
    settled = Schemes(
        schemes.linears.resolve(linears),
        {name: own.resolve(linears) for name, own in schemes.exceptions.items()},
        schemes.head and _resolve_head(schemes.head, linears, _head_shapes(source, family)),
    )
    if settled != schemes:
        log.info("scheme.group_size=auto: %s", settled.name)
    return settled


def _resolve_head(
    head: Scheme, linears: dict[str, tuple[int, int]], heads: dict[str, tuple[int, int]]
) -> Scheme:
    """``auto`` means for the head what it means for the linears, so that one scheme can hold both."""
    return head.resolve(linears | heads if head.group_size == "auto" else heads)


def linear_names(source: Shapes, family: Family) -> list[str]:
    """Full names of the linears of the decoder blocks, without suffix, in file order."""
    return linears_among(source.names, family)


def _head_shapes(source: Shapes, family: Family) -> dict[str, tuple[int, int]]:
    """Shapes of the embedding and, unless it is the same matrix, of the head."""
    names = (family.embedding,) if source.tied_head else (family.embedding, family.head)
    shapes = {name: source.shape(f"{name}.weight") for name in names}
    return {name: (shape[0], shape[1]) for name, shape in shapes.items()}


def open_block(
    module: nn.Module, prefix: str, family: Family, schemes: Schemes, dtype: torch.dtype
) -> Block:
    """A block with float32 working copies of its linears."""
    held = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    weights = {
        name: module.get_parameter(f"{name}.weight").detach().to(torch.float32, copy=True)
        for name in family.linears_in(held)
    }
    own = {name: schemes.of(f"{prefix}.{name}") for name in weights}
    return Block(module, family, own, dtype, weights)


def _close(block: Block, quantized: Mapping[str, QTensor]) -> dict[str, Any]:
    """Put the quantized weights into the module and report each linear's relative output error. Its working
    copy and its moments are let go.

    The error is taken in the transformed space, E|Wq x - W x|^2 / E|W x|^2, W after the transforms; it is
    of the weights alone, where a scheme rounds inputs too.
    """
    report: dict[str, Any] = {"linears": {}, "notes": block.notes}
    for name, q in quantized.items():
        Wq = q.dequantize(block.dtype)
        entry = {"bits_per_weight": q.bits_per_weight}
        W, moments = block.weights.pop(name), block.moments.pop(name, None)
        if moments is not None:
            before = output_error(W, moments.H)
            parts = zip(row_parts(Wq), row_parts(W), strict=True)
            lost = summed_error(
                (q_rows.float() - rows for q_rows, rows in parts), moments.H, len(W)
            )
            if moments.tokens:
                entry["relative_error"] = lost / before if before else 0.0
            if moments.tokens < W.shape[1]:
                entry["few_tokens"] = moments.tokens
        report["linears"][name] = entry
        block.place(name, Wq)
        block.place_inputs(name, q)
    return report


def _experts(block: Block) -> dict[str, Any]:
    """How many tokens each expert of a block saw, by its name there."""
    firsts = [shared.linears[0] for shared in block.inputs if shared.routed]
    seen = {
        name.rpartition(".")[0]: block.moments[name].tokens
        for name in firsts
        if name in block.moments
    }
    return {"expert_tokens": seen} if seen else {}


def _warn_of_unseen(prefix: str, report: Mapping[str, Any]) -> None:
    unseen = [name for name, tokens in report.get("expert_tokens", {}).items() if not tokens]
    if unseen:
        log.warning(
            "%s: no token of the calibration text was sent to %s: they are rounded without data; "
            "data.all_experts=true shows every token to every expert, a longer text more of them",
            prefix,
            ", ".join(unseen),
        )


def _drift(walk: Walk, activations: Activations) -> dict[str, float]:
    """How far the compressed stream is from the original's, relative to each token's size, if both run.

    This is what gptaq and learned aim at; the errors of single linears count on compressed inputs.
    """
    if walk.hidden is None or walk.original is None:
        return {}
    parts = zip(*map(activations.batches, (walk.hidden, walk.original)), strict=True)
    shares = [
        (hidden.float() - original.float()).pow(2).mean(-1)
        / original.float().pow(2).mean(-1).clamp(min=1e-6)
        for hidden, original in parts
    ]
    return {"drift": activations.states.team.mean(torch.cat(shares))}


def _tensors(block: Block, prefix: str, quantized: Mapping[str, QTensor]) -> dict[str, Any]:
    """Every tensor of the block under its full name, quantized linears as QTensor."""
    # With buffers that checkpoints hold.
    plain = {f"{prefix}.{name}": t for name, t in block.module.state_dict().items()}
    return plain | {f"{prefix}.{name}.weight": q for name, q in quantized.items()}


def _copy_rest(
    source: ModelFolder,
    family: Family,
    schemes: Schemes,
    blocks: int,
    writer: RecordWriter,
    device: torch.device,
) -> dict[str, Any]:
    """Everything outside the blocks, embedding and head quantized if they have a scheme.

    Returns for each quantized matrix its bits per weight and relative error.
    """
    prefixes = tuple(f"{family.blocks}.{index}." for index in range(blocks))
    rest = [name for name in source.names if not name.startswith(prefixes)]
    report = {}
    if schemes.head is not None:
        for name in _head_shapes(source, family):
            W = finite(source, f"{name}.weight", source.tensor(f"{name}.weight").to(source.dtype))
            q, report[name] = quantize_rows(W, schemes.head, device)
            log.info("%s: relative error %.2e", name, report[name]["relative_error"])
            writer.add(f"{name}.safetensors", {f"{name}.weight": q})
        # Some files of tied models hold the shared matrix twice: here it is one.
        done = (f"{family.embedding}.weight", f"{family.head}.weight")
        rest = [name for name in rest if name not in done]
    shapes = {name: source.shape(name) for name in rest}
    writer.add_rows(
        "rest.safetensors",
        {name: (shapes[name], source.dtype, finite_rows(source, name)) for name in rest},
    )
    return report


def _error_text(report: Mapping[str, Any]) -> str:
    errors = [
        f"{entry['relative_error']:.2e}"
        for entry in report["linears"].values()
        if "relative_error" in entry
    ]
    text = f", relative output error {', '.join(errors)}" if errors else ""
    return text + (f", drift {report['drift']:.2e}" if "drift" in report else "")
