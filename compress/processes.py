"""Several processes of one run, as ``accelerate launch`` or torchrun starts them; none is started here.

The main process goes through the recipe; the others wait for what it hands them (``stages.join``). With one
process every function returns at once, and no process group is made.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# The others wait while the main one prunes or quantizes a large model.
TIMEOUT = timedelta(days=2)
# What a launcher tells a process of its place among the others.
PLACE = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")


def count() -> int:
    """How many processes work on this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return count() == 1 or int(os.environ["RANK"]) == 0


def device_type() -> str:
    """What several processes train on: a GPU each, or the CPU."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    return "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"


def wait() -> None:
    """Return when every process is here."""
    if count() > 1:
        with _while_main_lives():
            torch.distributed.barrier(group=_group())


def from_main(value: T) -> T:
    """The value that the main process calls this with, in every process; the others wait for it."""
    if count() == 1:
        return value
    box = [value]
    with _while_main_lives():
        torch.distributed.broadcast_object_list(box, src=0, group=_group())
    return box[0]


def release(code: int) -> None:
    """Let the others end with this exit code: from here on the main process is alone, as is all it starts.
    Called by another process, which knows its code: it leaves."""
    if count() > 1:
        if is_main():
            from_main(code)
        torch.distributed.destroy_process_group()
        alone()


def alone() -> None:
    """Speak to the others no more. The launcher ends them when this process fails."""
    for name in PLACE:
        os.environ.pop(name, None)


@functools.cache
def _group() -> Any:
    """The processes as accelerate sets them up, for training, and a group of their own for waiting and
    handing over: on the CPU, since a collective that waits keeps a GPU busy."""
    from accelerate import PartialState

    PartialState(cpu=device_type() == "cpu", timeout=TIMEOUT)
    return torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)


@contextmanager
def _while_main_lives() -> Iterator[None]:
    """The others end without a word when the main process is gone: it has said why."""
    try:
        yield
    except RuntimeError:
        if is_main():
            raise
        raise SystemExit(1) from None
