"""Which sequences a step sees, at which rate, and how many steps a budget buys. No weights here."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.tokens import HELD_OUT
from compress.distill.knobs import Distill

# How many of the held-out sequences are looked at.
SEQUENCES = 16
# Of the minutes, kept for what the first steps do not show: writing the folder, and steps that are slower.
MARGIN = 0.05


def batch_rows(step: int, knobs: Distill, rows: Tensor) -> Tensor:
    """The sequences of a step, (batch,), a function of seed and step alone.

    rows: the numbers of all sequences that are trained on. They are shuffled anew for every epoch; a batch
    may take the end of one and the start of the next.
    """
    places = torch.arange(step * knobs.batch, (step + 1) * knobs.batch)
    epochs = {e: _order(e, knobs.seed, len(rows)) for e in (places // len(rows)).unique().tolist()}
    picked = [epochs[place // len(rows)][place % len(rows)] for place in places.tolist()]
    return rows[torch.stack(picked)]


def seen(steps: int, knobs: Distill, rows: Tensor) -> Tensor:
    """The sequences of so many steps. rows: as for ``batch_rows``"""
    if steps * knobs.batch >= len(rows):
        return rows
    return torch.cat([batch_rows(step, knobs, rows) for step in range(steps)])


def _order(epoch: int, seed: int, count: int) -> Tensor:
    # Of a generator's seed on the CPU only 32 bits count.
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:4]
    generator = torch.Generator().manual_seed(int.from_bytes(mixed))
    return torch.randperm(count, generator=generator)


def share_of(rows: Tensor, process: int, processes: int, micro_batch: int) -> tuple[Tensor, ...]:
    """The part of a batch that one process runs, in pieces that run at once."""
    return rows[process::processes].split(micro_batch)


def rate_at(step: int, steps: int, knobs: Distill) -> float:
    """The learning rate of a step: up in a straight line over the warm-up, down as a half cosine."""
    warm = max(1, round(knobs.warmup * steps))
    if step < warm:
        return knobs.rate * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    least = knobs.final_rate
    return knobs.rate * (least + (1 - least) * (1 + math.cos(math.pi * done)) / 2)


def steps_of(knobs: Distill, length: int) -> int | None:
    """How many steps the budget buys; None for minutes. length: tokens of a sequence"""
    if knobs.tokens is not None:
        return math.ceil(knobs.tokens / (knobs.batch * length))
    return knobs.steps


def enough(knobs: Distill) -> int | None:
    """Sequences of which the budget trains on none twice and as many are held out as are looked at; None for
    minutes: nobody knows yet."""
    steps = steps_of(knobs, knobs.length)
    if steps is None:
        return None
    trained = steps * knobs.batch
    return max(trained + trained // (HELD_OUT - 1) + 1, SEQUENCES * HELD_OUT)


@dataclass(frozen=True)
class Costs:
    """Seconds: of a step, of looking at the held-out sequences, of saving the state."""

    step: float
    held_out: float
    saving: float


def affordable(seconds: float, costs: Costs, save_every: int, checks: int) -> int:
    """How many steps fit into the seconds that are left.

    checks: how often the held-out sequences will be looked at
    """
    left = seconds * (1 - MARGIN) - checks * costs.held_out
    return max(0, math.floor(left / (costs.step + costs.saving / save_every)))
