"""What matters in a model, before anything is cut: one forward pass over the calibration tokens, block by
block.

X (sequences, length, hidden)
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.model.families import Family
from compress.model.folder import ModelFolder
from compress.model.walk import Walk
from compress.processes import ALONE, Team
from compress.progress import track
from compress.prune.importance import Sizes
from compress.prune.shape import Anatomy
from compress.prune.streams import Passage
from compress.runtime.load import load_dense
from compress.saved import NOWHERE, Position, Saved
from eval.blocks import block_calls
from eval.memory import trim
from eval.text import ROWS, token_nll

log = logging.getLogger(__name__)

DEPTHS = ("influence", "contiguous", "perplexity")
# Tokens whose states behind every block are kept, to compare blocks that are not neighbours.
SAMPLE = 2048
# Sequences that the drop-one perplexity is taken on.
DROP_ONE = 8
# What a position of the survey holds a row a block of.
ROWS_OF = ("states", "heads", "neurons")


@dataclass
class Survey:
    """influence: 1 - cos of what enters and leaves a block (ShortGPT, arXiv 2403.03853, section 3.1), by
    block. heads (layers, heads), neurons (layers, mlp), channels (hidden,): sizes of activations as
    Minitron aggregates them; of channels, behind all norms of the blocks, summed. states (layers + 1,
    tokens, hidden)"""

    influence: list[float]
    heads: Tensor
    neurons: Tensor
    channels: Tensor
    states: Tensor
    drop_one: list[float] | None = None

    def report(self) -> dict[str, Any]:
        """What is drawn and kept in metrics.json: neurons as 64 quantiles a block."""
        quantiles = torch.linspace(0, 1, 64, dtype=torch.float64)
        found = {
            "influence": self.influence,
            "heads": self.heads.tolist(),
            "neurons": self.neurons.cpu().quantile(quantiles, dim=1).T.tolist(),
            "channels": self.channels.tolist(),
        }
        return found if self.drop_one is None else found | {"drop_one": self.drop_one}

    def layers(self, count: int, depth: str) -> list[int]:
        """The ``count`` blocks that stay."""
        total = len(self.influence)
        if count == total:
            return list(range(total))
        if depth == "contiguous":
            start = self._least_window(total - count)
            return [i for i in range(total) if not start <= i < start + total - count]
        scores = self.influence if depth == "influence" else self.drop_one
        assert scores is not None
        return sorted(sorted(range(total), key=lambda i: -scores[i])[:count])

    def _least_window(self, count: int) -> int:
        """Where the ``count`` neighbouring blocks begin that change the stream least: by the angle between
        what enters and leaves them (Gromov et al., arXiv 2403.17887, section 3.2)."""
        changes = [
            float(distance(first, last).mean())
            for first, last in zip(self.states[:-count], self.states[count:], strict=True)
        ]
        return changes.index(min(changes))

    def kept_channels(self, count: int) -> Tensor:
        """The ``count`` channels of the residual stream that stay, sorted."""
        return self.channels.topk(count).indices.sort().values


def distance(X: Tensor, Y: Tensor) -> Tensor:
    """1 - cos of two states of every token."""
    return 1 - torch.nn.functional.cosine_similarity(X.float(), Y.float(), dim=-1)


@torch.no_grad()
def survey(
    source: ModelFolder,
    anatomy: Anatomy,
    tokens: Tensor,
    device: torch.device,
    *,
    drop_one: bool,
    saved: Saved = NOWHERE,
    spill: Path | None = None,
    team: Team = ALONE,
) -> Survey:
    """Look at every block with calibration tokens (sequences, length).

    drop_one: also take the perplexity without each block, on DROP_ONE sequences
    saved: where a killed one left what it had seen; spill: a folder that hidden states are kept in, if not in
    memory; team: the processes that share the sequences, all of which see the same. Raises UserError for
    activations that are not finite.
    """
    family = anatomy.family
    walk = Walk(source, family, device, spill=spill, team=team)
    walk.embed(tokens)
    seen = _Seen(
        [_sample(walk.hidden, team)], torch.zeros(anatomy.shape.hidden, dtype=torch.float64)
    )
    own = saved.part("survey")
    seen.go_on(own.load(), walk)
    for index in track(range(len(seen.influence), len(walk)), "survey blocks"):
        _look(walk, index, anatomy, seen)
        trim()
        own.offer(*seen.position(walk))
    found = Survey(
        seen.influence,
        torch.stack(seen.heads),
        torch.stack(seen.neurons),
        seen.channels,
        torch.stack(seen.states),
    )
    if drop_one:
        # On few sequences, with the whole model in memory: that is not shared.
        own = saved.alone().part("drop_one")
        found.drop_one = team.from_main(
            lambda: perplexity_without(source, family, tokens[:DROP_ONE], device, own)
        )
    return found


@dataclass
class _Seen:
    """What was seen of the blocks so far, as in ``Survey``."""

    states: list[Tensor]
    channels: Tensor
    influence: list[float] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    neurons: list[Tensor] = field(default_factory=list)

    def position(self, walk: Walk) -> tuple[dict[str, Any], dict[str, Tensor]]:
        assert walk.hidden is not None
        rows = {name: torch.stack(getattr(self, name)) for name in ROWS_OF}
        return {"influence": self.influence}, {
            "hidden": walk.hidden,
            "channels": self.channels,
            **rows,
        }

    def go_on(self, position: Position | None, walk: Walk) -> None:
        self.channels = self.channels.to(walk.device)
        if position is None:
            return
        self.influence, found = position.facts["influence"], position.tensors
        walk.hidden = walk.states.keep(found.mapped("hidden"))
        self.channels = found["channels"].to(walk.device)
        self.heads, self.neurons = (list(found[n].to(walk.device)) for n in ("heads", "neurons"))
        self.states = list(found["states"])
        log.info("the survey goes on after block %d of %d", len(self.influence), len(walk))


def _look(walk: Walk, index: int, anatomy: Anatomy, seen: _Seen) -> None:
    """Add a block to what was seen, and leave what goes out of it in the walk."""
    family, shape, device = anatomy.family, anatomy.shape, walk.device
    with walk.open(index) as module:
        activations = walk.enter(index)
        heads, neurons = Sizes(shape.heads, device), Sizes(shape.mlp, device)
        norms = [Sizes(shape.hidden, device) for _ in range(2)]
        lost, count, finite = 0.0, 0, True
        passage = Passage(module, family, activations)
        observers = {
            family.attention_output: heads, family.mlp_output: neurons,
            family.queries: norms[0], family.neurons[0]: norms[1],
        }  # fmt: skip
        out = walk.states.like(activations.inputs)
        places = out.split(activations.rows)
        with passage.watched({name: s.add for name, s in observers.items() if name}):
            for (x,), place in zip(passage.batches(passage.X), places, strict=True):
                y = module(x, **activations.arguments)
                walk.states.done(place.copy_(y))
                lost += float(distance(x, y).double().sum())
                count += x.shape[0] * x.shape[1]
                finite &= bool(torch.isfinite(y).all())
        walk.hidden = out
    if not finite:
        raise UserError(
            f"{walk.prefix(index)} of {walk.folder.path} gives NaN or Inf on the calibration text"
        )
    team = walk.states.team
    counted = team.exchange((lost, count))
    seen.influence.append(sum(own for own, _ in counted) / sum(number for _, number in counted))
    seen.heads.append(heads.mean(team))
    seen.neurons.append(neurons.mean(team))
    seen.channels += sum(norm.mean(team) for norm in norms)
    seen.states.append(_sample(out, team))


def _sample(X: Tensor | None, team: Team) -> Tensor:
    """Some of the tokens of all processes, evenly spread."""
    assert X is not None
    flat = X.flatten(0, 1)
    counts = team.exchange(len(flat))
    every = max(1, sum(counts) // SAMPLE)
    start = -sum(counts[: team.rank]) % every
    # A copy: a part of the states would keep all of them.
    own = flat[start::every].to("cpu", copy=True)
    return torch.cat(team.gather(own))[:SAMPLE]


@torch.no_grad()
def perplexity_without(
    source: ModelFolder,
    family: Family,
    tokens: Tensor,
    device: torch.device,
    saved: Saved = NOWHERE,
) -> list[float]:
    """The perplexity of the model without each block alone, all others as they are.

    saved: where a killed one left the sums over the sequences that it had done
    """
    model = load_dense(source, device, source.dtype)
    blocks = list(model.get_submodule(family.blocks))
    norm, head = model.get_submodule(family.final_norm), model.get_output_embeddings()
    totals, done, position = torch.zeros(len(blocks), dtype=torch.float64), 0, saved.load()
    if position is not None:
        totals, done = position.tensors["totals"], position.facts["done"]
    for row in track(tokens[done:].to(device), "perplexity without each block"):
        calls = block_calls(model, blocks, row.unsqueeze(0))
        for gone in range(len(blocks)):
            X = calls[gone][0]
            for i in range(gone + 1, len(blocks)):
                X = blocks[i](X, **calls[i][1])
            for H, targets in zip(norm(X)[0, :-1].split(ROWS), row[1:].split(ROWS), strict=True):
                totals[gone] += float(token_nll(head(H).float().log_softmax(-1), targets).sum())
        done += 1
        saved.offer({"done": done}, {"totals": totals})
    return (totals / tokens[:, 1:].numel()).exp().tolist()
