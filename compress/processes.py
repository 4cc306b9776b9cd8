"""Several processes of one run, as ``accelerate launch`` or torchrun starts them; none is started here.

The main process goes through the recipe; the others wait for what it hands them (``stages.join``). With one
process every function returns at once, and no process group is made.

Within a stage that shares its calibration text they are a ``Team``: each runs some of the sequences, sums
over tokens are those of all, and every decision is made in every process, from the same sums.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from compress.errors import UserError, one_line

T = TypeVar("T")

# The others wait while the main one prunes or quantizes a large model.
TIMEOUT = timedelta(days=2)
# What a launcher tells a process of its place among the others.
PLACE = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")


class Lost(UserError):
    """Another process of this run is gone. What was saved before still is."""


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
        with _while_all_live():
            torch.distributed.barrier(group=_group())


def from_main(value: T) -> T:
    """The value that the main process calls this with, in every process; the others wait for it."""
    if count() == 1:
        return value
    box = [value]
    with _while_all_live():
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


@dataclass(frozen=True)
class Team:
    """The processes that share the sequences of a stage, in order. Alone, all of this is as without it.

    rank: of this process; the main one, 0, writes all files but the others' parts of a state
    Before anything is summed up all tell that they are still there: what one ends with, ends all.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def exchange(self, value: T) -> list[T]:
        """What each process calls this with, in order; they wait for each other. Raises the UserError that
        one of them called ``tell`` with instead, or ``Lost``."""
        return [value] if self.count == 1 else _exchange(value, None)

    def tell(self, error: UserError) -> None:
        """End the stage of the others, wherever they exchange something next, with the same sentence."""
        if self.count > 1:
            with suppress(UserError):
                _exchange(None, one_line(error))

    def from_main(self, make: Callable[[], T]) -> T:
        """What the main process makes of it alone; the others wait for it."""
        value: Any = make() if self.is_main else None
        return self.exchange(value)[0]

    def share(self, sequences: int, at_once: int) -> slice:
        """Which of the sequences are this process's: whole batches where there is one for each, so that they
        are the batches of one process alone."""
        unit = at_once if -(-sequences // at_once) >= self.count else 1
        units = -(-sequences // unit)
        start, end = (unit * (units * rank // self.count) for rank in (self.rank, self.rank + 1))
        return slice(start, min(end, sequences))

    def sum(self, X: Tensor) -> Tensor:
        """X becomes its sum over the processes, the same bits in all."""
        return self._reduce(X, torch.distributed.ReduceOp.SUM)

    def largest(self, X: Tensor) -> Tensor:
        """X becomes the largest of the processes' values, element by element."""
        return self._reduce(X, torch.distributed.ReduceOp.MAX)

    def mean(self, values: Tensor) -> float:
        """The mean of the values of all processes, however many each has."""
        if self.count == 1:
            return float(values.mean())
        found = self.exchange((float(values.double().sum()), values.numel()))
        return sum(total for total, _ in found) / sum(number for _, number in found)

    def gather(self, X: Tensor) -> list[Tensor]:
        """X of every process, in order; they differ in the length of the first axis alone."""
        if self.count == 1:
            return [X]
        parts = []
        for rank, length in enumerate(self.exchange(len(X))):
            own = rank == self.rank
            part = X.contiguous() if own else X.new_empty((length, *X.shape[1:]))
            with _while_all_live():
                torch.distributed.broadcast(as_bytes(part), src=rank, group=_group_on(X.device))
            parts.append(part)
        return parts

    def check_same(self, what: str, value: object) -> None:
        """Raises RuntimeError if the processes decided differently, which the same sums rule out."""
        if any(other != value for other in self.exchange(value)):
            raise RuntimeError(f"the processes of this run differ in {what}")

    def _reduce(self, X: Tensor, how: Any) -> Tensor:
        if self.count > 1:
            self.exchange(None)
            with _while_all_live():
                torch.distributed.all_reduce(X, how, group=_group_on(X.device))
        return X


ALONE = Team()


def team() -> Team:
    """All processes of this run."""
    return Team(int(os.environ["RANK"]), count()) if count() > 1 else ALONE


def as_bytes(X: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, in its memory: what is added to zeros or handed over so stays as it
    is, in every type."""
    return X.view(-1).view(torch.uint8)


def _exchange(value: Any, error: str | None) -> list[Any]:
    found: list[Any] = [None] * count()
    with _while_all_live():
        torch.distributed.all_gather_object(found, (error, value), group=_group())
    for told, _ in found:
        if told is not None:
            raise UserError(told)
    return [own for _, own in found]


def _group_on(device: torch.device) -> Any:
    """The processes as they reach each other's tensors on such a device: on GPUs those of training."""
    return None if device.type == "cuda" else _group()


@contextmanager
def _while_all_live() -> Iterator[None]:
    """The main process says that another one is gone; the others end without a word."""
    try:
        yield
    except RuntimeError as error:
        if is_main():
            raise Lost("another process of this run ended, what it had to say is above") from error
        raise SystemExit(1) from None
