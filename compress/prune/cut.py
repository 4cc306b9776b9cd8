"""Cutting a model to a shape: both models walk over the blocks together, and the smaller one is written.

X (sequences, length, hidden)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.export.shards import ShardWriter
from compress.model.folder import PRUNED, ModelFolder, write_json
from compress.model.skeleton import assign, finite, model_of
from compress.model.walk import Activations, Walk
from compress.processes import ALONE, Team
from compress.progress import track
from compress.prune.block import BlockCut, Goal
from compress.prune.knobs import Prune
from compress.prune.shape import KEYS, Anatomy, Shape, config_of
from compress.prune.streams import Passage
from compress.saved import NOWHERE, Position, Saved
from eval.memory import trim

log = logging.getLogger(__name__)

SHARD_BYTES = 2**30


@dataclass(frozen=True)
class Plan:
    """What becomes of a model: its new shape, the blocks and the channels that stay, and how the rest is
    chosen."""

    found: Anatomy
    shape: Shape
    layers: list[int]
    channels: Tensor
    knobs: Prune

    @property
    def narrower(self) -> bool:
        return self.shape.hidden < self.found.shape.hidden


@torch.no_grad()
def cut(
    source: ModelFolder,
    target: Path,
    plan: Plan,
    tokens: Tensor,
    device: torch.device,
    saved: Saved = NOWHERE,
    spill: Path | None = None,
    team: Team = ALONE,
) -> list[dict[str, Any]]:
    """Write the model cut to its plan; returns for every block that is left its number in the original, the
    heads that stayed, the relative errors of attention and MLP, the drift of its stream from the
    original's, and seconds.

    saved: where a killed one left the blocks that it had cut; spill: a folder that hidden states are kept in,
    if not in memory; team: the processes that share the sequences, of which the main one writes
    """
    walk = _BothWalks(source, plan, tokens, device, spill, team)
    reports: list[dict[str, Any]] = []
    position = saved.load()
    with saved.files(target) as folder:
        shards = None
        if team.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            shards = ShardWriter(folder, SHARD_BYTES)
        if position is not None:
            reports = position.facts["blocks"]
            if shards is not None:
                shards.go_on(position.facts["shards"])
            walk.go_on(position)
            log.info("prune goes on after block %d of %d", len(reports), len(plan.layers))
        del position
        for place in track(range(len(reports), len(plan.layers)), "prune blocks"):
            reports.append(_cut_at(place, walk, plan, shards))
            trim()
            written = None
            if shards is not None:
                # A file a block, as a position has them.
                shards.flush()
                written = shards.position()
            saved.offer({"blocks": reports, "shards": written}, walk.position())
        norm_ratio = walk.norm_ratio()
        if shards is None:
            return reports
        _write_rest(source, plan, shards, norm_ratio)
        shards.flush()
    source.copy_companions(target)
    shards.close(target)
    _note(target, plan, reports)
    # The config comes last: before that the folder does not open.
    write_json(
        target / "config.json", config_of(source.config, plan.found, plan.shape, plan.layers)
    )
    return reports


def _cut_at(place: int, walk: _BothWalks, plan: Plan, shards: ShardWriter | None) -> dict[str, Any]:
    """Cut the block at this place and write it. Returns its report."""
    start = time.perf_counter()
    with walk.block(place) as block:
        _cut_block(block, walk.module, plan)
        walk.leave(block)
        walk.walk.check_same(plan.layers[place], block.passage.module)
        if shards is not None:
            for name, tensor in _tensors(plan, block).items():
                shards.add(f"{walk.walk.prefix(place)}.{name}", tensor.cpu())
    report = {
        "block": plan.layers[place],
        "heads": block.heads,
        "kv_heads": block.kv_heads,
        "errors": block.errors,
        "drift": walk.drift(),
        "seconds": time.perf_counter() - start,
    }
    log.info(
        "block %d: %.1f s, relative errors %s, drift %.2e",
        report["block"],
        report["seconds"],
        ", ".join(f"{name} {error:.2e}" for name, error in block.errors.items()),
        report["drift"],
    )
    return report


def _cut_block(block: BlockCut, original: nn.Module, plan: Plan) -> None:
    """Cut one half after the other: the MLP reads what attention then leaves."""
    old, new = plan.found.shape, plan.shape
    attention, mlp = (
        shared
        for shared in plan.found.family.inputs
        if shared.source is not None and shared.source not in plan.found.family.linears
    )
    readers = plan.narrower or plan.knobs.refit == "all"
    if readers:
        block.adapt_readers(original, attention)
    if new.kv_heads < old.kv_heads and plan.knobs.merges:
        block.merge(plan.knobs.kv)
    block.cut_attention()
    if readers:
        block.adapt_readers(original, mlp)
    block.cut_mlp()


class _BothWalks:
    """The blocks that stay, in order, each with the original's stream and the pruned one's."""

    def __init__(
        self,
        source: ModelFolder,
        plan: Plan,
        tokens: Tensor,
        device: torch.device,
        spill: Path | None,
        team: Team,
    ):
        self.plan, self.family = plan, plan.found.family
        self.walk = Walk(source, self.family, device, spill=spill, team=team)
        self.walk.embed(tokens)
        assert self.walk.hidden is not None
        self.channels = plan.channels.to(device)
        self.original = self.walk.hidden
        self.pruned = self.original
        self.module: nn.Module = nn.Identity()
        self._generator = torch.Generator().manual_seed(plan.knobs.seed)
        self._narrow: nn.ModuleList | None = None
        if plan.narrower:
            self.pruned = self._joined(
                x.index_select(-1, self.channels) for (x,) in self._batches(self.original)
            )
            config = {
                **source.config,
                KEYS["hidden"]: plan.shape.hidden,
                "head_dim": plan.found.head_dim,
            }
            self._narrow = model_of(config, source.dtype).get_submodule(self.family.blocks)
        self._advance(0, plan.layers[0])

    @contextmanager
    def block(self, place: int) -> Iterator[BlockCut]:
        """The block at this place of the pruned model, as it was but for its channels."""
        layers = [*self.plan.layers, self.plan.found.shape.layers]
        index, end = layers[place : place + 2]
        with self.walk.open(index) as self.module:
            entering = self.original
            middle, self.original = self._passage(self.module, index, entering).run()
            # What blocks that go after this one added, it makes up for.
            self._advance(index + 1, end)
            with self._own(self.module, index) as own:
                yield BlockCut(
                    self._passage(own, index, self.pruned),
                    Goal(entering, middle, self.original),
                    self.plan.found,
                    self.plan.shape,
                    self.channels,
                    self.plan.knobs,
                    self._generator,
                )

    def leave(self, block: BlockCut) -> None:
        self.pruned = block.passage.leave()

    def position(self) -> dict[str, Tensor]:
        """What is between two blocks."""
        random = self._generator.get_state()
        return {"original": self.original, "pruned": self.pruned, "generator": random}

    def go_on(self, position: Position) -> None:
        self.original, self.pruned = (
            self.walk.states.keep(position.tensors.mapped(name)) for name in ("original", "pruned")
        )
        self.walk.hidden = None
        self._generator.set_state(position.tensors["generator"])

    def drift(self) -> float:
        """How far the pruned stream is from the original's on its channels, relative to each token's size."""
        shares = []
        for ours, original in self._batches(self.pruned, self.original):
            theirs = original.index_select(-1, self.channels).float()
            lost = (ours.float() - theirs).square().mean(-1)
            shares.append(lost / theirs.square().mean(-1).clamp(min=1e-6))
        return self.walk.states.team.mean(torch.cat(shares))

    def norm_ratio(self) -> float:
        """By how much the final norm divides less, on average, because its channels are fewer."""
        if not self.plan.narrower:
            return 1.0
        ratios = []
        for batch in self._batches(self.pruned, self.original):
            ours, theirs = (x.float().square().mean(-1).sqrt() for x in batch)
            ratios.append(ours / theirs.clamp(min=1e-6))
        return self.walk.states.team.mean(torch.cat(ratios))

    def _advance(self, start: int, end: int) -> None:
        """Take the original's stream through blocks that go."""
        for index in range(start, end):
            with self.walk.open(index) as module:
                self.original = self._passage(module, index, self.original).run()[1]

    def _passage(self, module: nn.Module, index: int, X: Tensor) -> Passage:
        arguments, rows = self.walk.call_of(index)
        entering = Activations(X, None, None, arguments, rows, self.walk.states)
        return Passage(module, self.family, entering)

    def _batches(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        _, rows = self.walk.call_of(0)
        states = self.walk.states
        return zip(*(states.read(t.split(rows)) for t in tensors), strict=True)

    def _joined(self, parts: Iterable[Tensor]) -> Tensor:
        return self.walk.states.joined(parts, len(self.original))

    @contextmanager
    def _own(self, module: nn.Module, index: int) -> Iterator[nn.Module]:
        """The block to cut: the original one, whose stream has passed, or one with fewer channels."""
        if self._narrow is None:
            yield module
            return
        own = self._narrow[index]
        kept = {"hidden": self.channels}
        source, prefix = self.walk.folder, f"{self.walk.prefix(index)}."
        for name, parameter in module.named_parameters():
            assign(own, name, self.plan.found.cut(name, parameter.data, kept), source, prefix)
        try:
            yield own
        finally:
            own.to("meta")


def _tensors(plan: Plan, block: BlockCut) -> dict[str, Tensor]:
    """The block's tensors as they are written, by local name."""
    kept = block.kept()
    tensors = {
        name: plan.found.cut(name, parameter.data, kept)
        for name, parameter in block.passage.module.named_parameters()
    }
    twin = plan.found.twin_for(plan.shape)
    for name in () if twin is None else twin.zeros:
        W = tensors[f"{name}.weight"]
        tensors[f"{name}.bias"] = torch.zeros(len(W), dtype=W.dtype)
    return tensors


def _write_rest(source: ModelFolder, plan: Plan, shards: ShardWriter, norm_ratio: float) -> None:
    """Embedding, final norm and head, with the channels that stay."""
    kept = {"hidden": plan.channels.cpu()}
    for name in plan.found.rest:
        whole = finite(source, name, source.tensor(name).to(source.dtype))
        tensor = plan.found.cut(name, whole, kept)
        if name == f"{plan.found.family.final_norm}.weight":
            tensor = (tensor.float() * norm_ratio).to(source.dtype)
        shards.add(name, tensor)


def _note(target: Path, plan: Plan, blocks: list[dict[str, Any]]) -> None:
    """What stayed, in numbers of the original: layers, heads of each, channels (null: all)."""
    write_json(
        target / PRUNED,
        {
            "layers": plan.layers,
            "heads": [block["heads"] for block in blocks],
            "kv_heads": [block["kv_heads"] for block in blocks],
            "hidden": plan.channels.tolist() if plan.narrower else None,
        },
    )
