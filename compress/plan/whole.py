"""What of a run holds whole models, and whether this machine can. Stages that walk take a model of any size;
what measures it, or trains it as a whole, does not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from compress.config import Run
from compress.errors import UserError
from compress.model.folder import DTYPES, Shapes

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Whole:
    """bytes: of the weights that are held together, at the least; instead: what to set to do without"""

    what: str
    bytes: int
    instead: str


def check_memory(run: Run, model: Shapes) -> None:
    """Raises UserError if something holds more weights than the device has memory in all."""
    room = memory_of(run.device)
    for part in held(run, model):
        if part.bytes > room:
            where = "the GPU" if run.device.type == "cuda" else "this machine"
            raise UserError(
                f"{part.what} holds {part.bytes / 1e9:.1f} GB of weights of {model.path}, and {where} has "
                f"{room / 1e9:.1f} GB of memory: {part.instead}"
            )


def held(run: Run, model: Shapes) -> Iterator[Whole]:
    """The parts of a run that hold whole models: the least that they hold, without activations."""
    weights = sum(math.prod(model.shape(name)) for name in model.names)
    yield from _stages(run, weights * model.dtype.itemsize)
    yield from _measures(run, weights, weights * model.dtype.itemsize)


def _stages(run: Run, stored: int) -> Iterator[Whole]:
    if run.settings.data.generated and run.needs_data:
        yield Whole("data.generated", stored, "set data.generated=0")
    if run.search is not None:
        yield Whole("search", stored, "leave search out")
    if "repair" in run.settings.stages:
        yield Whole("the stage repair", 2 * stored, "leave repair out")
    if run.distill is not None:
        yield Whole("the stage distill", stored, "leave distill out")


def _measures(run: Run, weights: int, stored: int) -> Iterator[Whole]:
    settings = run.settings
    # A pruned candidate is smaller by what is not known yet: the original alone counts.
    both = 1 if "prune" in settings.stages else 2
    if settings.eval is not None:
        if settings.eval.texts:
            instead = "set eval=none"
            if DTYPES[settings.eval.dtype] == torch.float32:
                instead += ", or eval.dtype=bfloat16 for half of it"
            nbytes = both * weights * DTYPES[settings.eval.dtype].itemsize
            yield Whole("eval, with the original beside the candidate,", nbytes, instead)
        if settings.eval.tasks:
            yield Whole("eval.tasks", stored, "set eval.tasks=[]")
    if settings.context is not None:
        nbytes = both * weights * DTYPES[settings.context.dtype].itemsize
        yield Whole("context", nbytes, "set context=none")
    if settings.speed is not None:
        yield Whole("speed", stored, "set speed=none")


def memory_of(device: torch.device) -> int:
    """All bytes that a process may hold there: of a GPU; else memory and swap, or what the container is
    allowed."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = psutil.virtual_memory().total + psutil.swap_memory().total
    if CGROUP_LIMIT.exists() and (limit := CGROUP_LIMIT.read_text().strip()).isdigit():
        total = min(total, int(limit))
    return int(total)
