"""How much each fused group of linears matters: the divergence with this group alone at few bits.

W, D (out, in); H (in, in); X (sequences, length, hidden); F (tokens, hidden); E (vocabulary, hidden)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from calibration.moments import exact_products
from compress.model.families import Input, family_of
from compress.model.folder import ModelFolder
from compress.model.skeleton import assign, finite
from compress.model.walk import Walk
from compress.progress import track
from compress.quantize.block import Block, output_error
from compress.quantize.scheme import Schemes, to_codes
from compress.quantize.stage import open_block
from compress.quantize.transforms.opt import Opt
from compress.saved import NOWHERE, Saved

log = logging.getLogger(__name__)

# The divergence of more bits follows from the one measured at so many: see ``sensitivities``.
ANCHOR = 3
# Bits at which a group's own divergence is far below the noise of 16-bit arithmetic.
QUIET = 8
# A coarser search of grids than a recipe's: here they only have to rank the groups.
GRIDS = Opt(steps=4, rounds=1)
# Positions whose logits exist at the same time.
ROWS = 256


def sensitivities(
    source: ModelFolder,
    schemes: Schemes,
    choices: Sequence[int],
    tokens: Tensor,
    device: torch.device,
    saved: Saved = NOWHERE,
    spill: Path | None = None,
) -> tuple[list[list[float]], list[float]]:
    """KL(original || one group at so many bits) in nats per token, (groups, choices).

    The group's weights are rounded to the nearest value of searched grids, all others are the
    original's. Up to 3 bits it is measured. With more bits the divergence drowns in the noise of
    16-bit arithmetic, but there the change is small enough for it to be quadratic in the change: it
    is the one at 3 bits times the ratio of the group's output errors tr(D H D^T) at the two widths.

    Any change early in the model makes what follows round differently, which adds about 3e-4 to a
    measured divergence. The second result is this floor for each block, and it is subtracted: the
    first group at 8 bits has next to no divergence of its own.
    """
    family = family_of(source.config)
    walk = Walk(source, family, device, spill=spill)
    position = saved.load()
    found: list[list[float]] = [] if position is None else position.facts["found"]
    floors: list[float] = [] if position is None else position.facts["floors"]
    if len(floors) == len(walk):
        return found, floors
    walk.embed(tokens)
    with torch.no_grad(), _whole(walk) as original:
        goal = original.finish(0)
        if position is not None:
            log.info("the search of bits goes on after block %d of %d", len(floors), len(walk))
            walk.hidden = walk.states.keep(position.tensors.mapped("hidden"))
            del position
        for index in track(range(len(floors), len(walk)), "search bits"):
            start = time.perf_counter()
            layer = walk.layers[index]
            block = open_block(layer, walk.prefix(index), family, schemes, source.dtype)
            block.activations = walk.enter(index)
            rows, floor = _block(original, index, block, choices, goal)
            found += rows
            floors.append(floor)
            walk.leave(index, block.activations)
            log.info(
                "%s: %.1f s, KL at %s bits %s, noise %.1e",
                walk.prefix(index),
                time.perf_counter() - start,
                choices[0],
                ", ".join(f"{row[0]:.1e}" for row in rows),
                floor,
            )
            assert walk.hidden is not None
            saved.offer({"found": found, "floors": floors}, {"hidden": walk.hidden})
    return found, floors


def _block(
    original: _Original, index: int, block: Block, choices: Sequence[int], goal: Tensor
) -> tuple[list[list[float]], float]:
    """The divergences of a block's groups, (groups, choices), and the floor under the measured ones."""
    inputs, widths = block.family.inputs, sorted({*choices, ANCHOR})
    tried = [{bits: _rounded(block, shared, bits) for bits in widths} for shared in inputs]
    quiet = _rounded(block, inputs[0], QUIET)
    keys = [(group, bits) for group in range(len(tried)) for bits in widths if bits <= ANCHOR]
    finals = [
        _final(original, index, block, candidate)
        for candidate in (quiet, *(tried[group][bits] for group, bits in keys))
    ]
    noise, *values = divergences(finals, goal, original.head)
    kl = dict(zip(keys, values, strict=True))
    # Two equations for the first group: kl = floor + signal, and at 8 bits floor + share * signal.
    share = _ratio(quiet, tried[0][ANCHOR])
    floor = max(0.0, (noise - share * kl[0, ANCHOR]) / (1 - share))
    above = {key: max(0.0, value - floor) for key, value in kl.items()}
    rows = [
        [
            above[group, bits]
            if bits <= ANCHOR
            else above[group, ANCHOR] * _ratio(own[bits], own[ANCHOR])
            for bits in choices
        ]
        for group, own in enumerate(tried)
    ]
    return rows, floor


@dataclass(frozen=True)
class _Candidate:
    """A group at some bits: its output error, and by local name its weights in the model's dtype."""

    error: float
    weights: dict[str, Tensor]


def _rounded(block: Block, shared: Input, bits: int) -> _Candidate:
    """The readers of an input at so many bits; without weights where none are going to run."""
    weights, error = {}, 0.0
    for name in shared.linears:
        W, H = block.weights[name], block.moments_of(name).H
        scheme = replace(block.schemes[name], bits=bits)
        weights[name] = to_codes(W, GRIDS.search(W, H, scheme, block.dtype), scheme).dequantize(
            block.dtype
        )
        error += output_error(weights[name].float() - W, H)
    return _Candidate(error, weights if bits <= ANCHOR or bits == QUIET else {})


def _ratio(candidate: _Candidate, anchor: _Candidate) -> float:
    return candidate.error / anchor.error if anchor.error else 0.0


def _final(original: _Original, index: int, block: Block, candidate: _Candidate) -> Tensor:
    """The final states with these weights in the block, whose own are put back."""
    for name, W in candidate.weights.items():
        block.place(name, W)
    F = original.finish(index)
    for name in candidate.weights:
        block.place(name, block.weights[name])
    return F


@dataclass(frozen=True)
class _Original:
    """The model with all its blocks in memory. norm: the final one; head: float32 (vocabulary, hidden)"""

    walk: Walk
    norm: nn.Module
    head: Tensor

    def finish(self, index: int) -> Tensor:
        """The final states, (tokens, hidden) in the model's dtype, from what enters this block on."""
        X = self.walk.hidden
        assert X is not None
        for i in range(index, len(self.walk)):
            entering = self.walk.enter(i)
            X = entering.forward(self.walk.layers[i], X)
        finals = [self.norm(x).flatten(0, -2) for x in entering.batches(X)]
        return torch.cat(finals).to(self.walk.folder.dtype)


@contextmanager
def _whole(walk: Walk) -> Iterator[_Original]:
    """All blocks of an embedded walk in memory, with hidden states in float32 between them.

    In 16 bits they would round differently after every small change, and that noise (about 0.001
    nats) is as large as what is measured. The linears compute in the model's dtype.
    """
    family, folder, model = walk.family, walk.folder, walk.model
    last = f"{family.embedding if folder.tied_head else family.head}.weight"
    head = finite(folder, last, folder.tensor(last))
    name = f"{family.final_norm}.weight"
    norm = finite(folder, name, folder.tensor(name))
    assign(model, name, norm.to(device=walk.device, dtype=folder.dtype), folder)
    assert walk.hidden is not None
    walk.hidden = walk.enter(0).copy(walk.hidden, torch.float32)
    with ExitStack() as stack:
        for index in range(len(walk)):
            layer = stack.enter_context(walk.open(index))
            for linear in family.linears:
                module = layer.get_submodule(linear)
                narrow = partial(_narrow, folder.dtype)
                stack.callback(module.register_forward_pre_hook(narrow).remove)
        head = head.to(folder.dtype).to(device=walk.device, dtype=torch.float32)
        yield _Original(walk, model.get_submodule(family.final_norm), head)


def _narrow(dtype: torch.dtype, _: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0].to(dtype),)


@torch.no_grad()
def divergences(finals: Sequence[Tensor], goal: Tensor, E: Tensor) -> list[float]:
    """Mean KL(original || candidate) over tokens, in nats, of each candidate's final states.

    finals: F of each candidate; goal: F of the original; E: float32 head. Logits are float32.
    """
    sums = [0.0] * len(finals)
    for start in range(0, len(goal), ROWS):
        rows = slice(start, start + ROWS)
        theirs = _logits(goal[rows], E).log_softmax(-1)
        p = theirs.exp()
        own = torch.linalg.vecdot(p, theirs)
        for i, F in enumerate(finals):
            ours = _logits(F[rows], E).log_softmax(-1)
            sums[i] += float((own - torch.linalg.vecdot(p, ours)).double().sum())
    return [total / len(goal) for total in sums]


def _logits(F: Tensor, E: Tensor) -> Tensor:
    with exact_products(F.dtype):
        return F.float() @ E.T
