"""The calibration tokens on their way through one block, of the original model and of the pruned one.

The pruned block runs with its parts gone as zeros, in the shape it had: what it computes is then exactly
what the smaller one will. Passes over the tokens keep their hidden states, never the neurons of an MLP.

X (sequences, length, hidden); weight (sequences, length)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.model.families import Family
from compress.model.walk import Activations
from compress.processes import Team


class _Stop(Exception):
    """What was asked for has been seen: the rest of the block need not run."""


@contextmanager
def _inputs_of(module: nn.Module, *, last: bool) -> Iterator[list[Tensor]]:
    """Notes what the module reads; ``last``: and ends the block there."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor]) -> None:
        seen.append(args[0])
        if last:
            raise _Stop

    handle = module.register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


class Passage:
    """One block and what enters it, as ``Activations.inputs``."""

    def __init__(self, module: nn.Module, family: Family, entering: Activations):
        self.module, self.family, self.X = module, family, entering.inputs
        self._arguments, self._rows, self._states = (
            entering.arguments,
            entering.rows,
            entering.states,
        )
        # What the linear at the end of attention reads, once it was asked for.
        self._attended: Tensor | None = None

    def part(self, name: str) -> Any:
        return self.module.get_submodule(name)

    @property
    def team(self) -> Team:
        """The processes that share the sequences."""
        return self._states.team

    @property
    def device(self) -> torch.device:
        """Where the block is; its states need not be there."""
        return self._states.device

    def batches(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Rows of all tensors that run at once, on the device of the block."""
        return zip(*(self._states.read(t.split(self._rows)) for t in tensors), strict=True)

    def _kept(self, parts: Iterable[Tensor]) -> Tensor:
        """The parts of all batches as one tensor, where states are kept."""
        return self._states.joined(parts, len(self.X))

    def run(self) -> tuple[Tensor, Tensor]:
        """The states behind attention, which the MLP's norm reads, and those behind the block."""
        middle, out = self._states.like(self.X), self._states.like(self.X)
        places = zip(middle.split(self._rows), out.split(self._rows), strict=True)
        with _inputs_of(self.part(self.family.mlp_norm), last=False) as seen:
            for (x,), (m, y) in zip(self.batches(self.X), places, strict=True):
                y.copy_(self.module(x, **self._arguments))
                m.copy_(seen.pop())
                self._states.done(m)
                self._states.done(y)
        return middle, out

    def observe(self, *names: str) -> Iterator[dict[str, Tensor]]:
        """A batch at a time, what these linears of attention make: the block ends at the one that reads the
        heads."""
        found: dict[str, Tensor] = {}

        def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda _module, _args, out: found.update({name: out})

        handles = [self.part(name).register_forward_hook(note(name)) for name in names]
        try:
            for (x,) in self.batches(self.X):
                self._until(self._output_name, x)
                yield dict(found)
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def watched(self, observers: dict[str, Callable[[Tensor], None]]) -> Iterator[None]:
        """Within it, each observer is shown what the linear of its name reads."""

        def show(observer: Callable[[Tensor], None]) -> Callable[[nn.Module, Any], None]:
            return lambda _module, args: observer(args[0])

        handles = [
            self.part(name).register_forward_pre_hook(show(observer))
            for name, observer in observers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def _output_name(self) -> str:
        return self.family.attention_output

    def attended(self) -> Tensor:
        """What the linear at the end of attention reads, (sequences, length, heads * head size). Kept for the
        passes after it: weights before it must not change any more."""
        if self._attended is None:
            self._attended = self._kept(
                self._until(self._output_name, x) for (x,) in self.batches(self.X)
            )
        return self._attended

    def _until(self, name: str, x: Tensor) -> Tensor:
        with _inputs_of(self.part(name), last=True) as seen:
            try:
                self.module(x, **self._arguments)
            except _Stop:
                return seen[0]
        raise AssertionError(f"the block did not reach {name}")

    @contextmanager
    def _replayed(self, attended: Tensor) -> Iterator[None]:
        """Within it attention is its output linear, on what it read before."""
        out = self.part(self._output_name)
        attention = self.part(self._output_name.rpartition(".")[0])
        attention.forward = lambda *_, **__: (out(attended), None)
        try:
            yield
        finally:
            del attention.forward

    def middle(self) -> Tensor:
        """The states behind attention as it is now."""
        return self._kept(
            self._replay_until(self.family.mlp_norm, x, attended)
            for x, attended in self.batches(self.X, self.attended())
        )

    def neurons(self) -> Iterator[Tensor]:
        """What the last linear of the MLP reads, a batch at a time."""
        for x, attended in self.batches(self.X, self.attended()):
            yield self._replay_until(self.family.mlp_output, x, attended)

    def _replay_until(self, name: str, x: Tensor, attended: Tensor) -> Tensor:
        with self._replayed(attended):
            return self._until(name, x)

    def leave(self) -> Tensor:
        """The states behind the block as it is now."""

        def parts() -> Iterator[Tensor]:
            for x, attended in self.batches(self.X, self.attended()):
                with self._replayed(attended):
                    yield self.module(x, **self._arguments)

        return self._kept(parts())


def token_weights(X: Tensor) -> Tensor:
    """A token's error counts relative to the size of its state: 1 / mean x^2, (sequences, length).

    A few tokens have states a hundred times the others'; the next norm divides by the size anyway.
    """
    return 1 / X.float().square().mean(-1).clamp(min=1e-6)
