"""Running a model block by block: weights of one block in memory, hidden states between two blocks.

tokens (sequences, length); X hidden states (sequences, length, hidden)
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.model.ahead import Ahead, pays
from compress.model.families import Family
from compress.model.folder import ModelFolder
from compress.model.skeleton import assign, dtype_in, empty_model, finite
from compress.model.states import States
from compress.processes import ALONE, Team, as_bytes


@dataclass
class Activations:
    """What enters a block for the calibration tokens, (sequences, length, hidden) each.

    inputs: through the compressed blocks before it
    original: through the original blocks before it; None unless the walk carries it
    targets: what the original block makes of ``original``
    arguments: what the model hands the block besides (masks, rotary tables), for any number of rows
    rows: sequences that run at once
    states: where all these are kept, which need not be where the block is
    """

    inputs: Tensor
    original: Tensor | None
    targets: Tensor | None
    arguments: dict[str, Any]
    rows: int
    states: States = field(default_factory=States)

    def batches(self, X: Tensor) -> Iterator[Tensor]:
        """Rows of X that run at once, on the device of the block."""
        return self.states.read(X.split(self.rows))

    def copy(self, X: Tensor, dtype: torch.dtype) -> Tensor:
        """X in another type."""
        return self.states.joined((x.to(dtype) for x in self.batches(X)), len(X))

    def forward(self, module: nn.Module, X: Tensor) -> Tensor:
        """The block's outputs on X, a batch at a time."""
        outputs = (run(module, x, self.arguments) for x in self.batches(X))
        return self.states.joined((y.to(X.dtype) for y in outputs), len(X))


def run(module: nn.Module, X: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """What a block makes of hidden states."""
    found = module(X, **arguments)
    return found[0] if isinstance(found, tuple) else found


class Readable(Protocol):
    """Something that gives tensors by name."""

    @property
    def names(self) -> list[str]: ...

    def tensor(self, name: str) -> Tensor: ...


class Walk:
    """The decoder blocks of a folder in order, with the hidden states that enter the current one.

    read: where weights come from, if not from the folder as they are stored
    spill: a folder that hidden states are kept in, if not in memory
    ahead: whether the next block is read while one runs, so that two are in memory
    team: the processes that share the sequences: hidden states are those of this one's
    """

    def __init__(
        self,
        folder: ModelFolder,
        family: Family,
        device: torch.device,
        tokens_per_batch: int = 4096,
        read: Readable | None = None,
        *,
        spill: Path | None = None,
        ahead: bool | None = None,
        team: Team = ALONE,
    ):
        self.folder = folder
        self.source: Readable = folder if read is None else read
        self.family = family
        self.device = device
        self.tokens_per_batch = tokens_per_batch
        self.model = empty_model(folder, folder.dtype)
        self.layers: nn.ModuleList = self.model.get_submodule(family.blocks)
        self.states = States(device, spill, team)
        self.hidden: Tensor | None = None
        self.original: Tensor | None = None
        self._ahead: Ahead | None = None
        if pays(device) if ahead is None else ahead:
            self._ahead = Ahead(
                self.source.tensor, device, lambda name: dtype_in(name, family, folder.dtype)
            )
        self._rows = 1
        # What the model hands to each of its blocks beside the hidden states.
        self._arguments: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self.layers)

    def prefix(self, index: int) -> str:
        return f"{self.family.blocks}.{index}"

    @torch.no_grad()
    def embed(self, tokens: Tensor, original: bool = False) -> None:
        """Set the hidden states to the embeddings of ``tokens``; ``original`` carries a second copy
        through the blocks as they are.

        Every block is asked what it would be called with (masks, rotary tables: they differ between
        architectures and between blocks), by running the model with blocks that only take notes.
        The notes are of one sequence: all have the same length and no padding, so they fit every
        row.
        """
        family, model = self.family, self.model
        path = family.blocks.rpartition(".")[0]
        outside = self._outside(path)
        for name in outside:
            # Not looked at as a whole, which would have all of it in memory: tokens name few of its rows.
            table = self.source.tensor(name)
            assign(model, name, table.to(self.device, self.folder.dtype), self.folder)
            del table
        decoder = model.get_submodule(path)
        _buffers_to(decoder, self.device)
        notes = [NoteTaker(layer, family.tuples) for layer in self.layers]
        norm = model.get_submodule(family.final_norm)
        model.set_submodule(family.blocks, nn.ModuleList(notes))
        model.set_submodule(family.final_norm, nn.Identity())
        self._rows = max(1, self.tokens_per_batch // tokens.shape[1])
        tokens = tokens[self.states.team.share(len(tokens), self._rows)].to(self.device)
        width = model.get_submodule(family.embedding).weight.shape[1]
        self.states.settle(tokens.numel() * width * self.folder.dtype.itemsize)
        try:
            decoder(input_ids=tokens[:1], use_cache=False)
            self._arguments = [note.arguments for note in notes]
            states = (
                finite(
                    self.folder,
                    f"{family.embedding}.weight",
                    decoder(input_ids=rows, use_cache=False).last_hidden_state,
                )
                for rows in tokens.split(self._rows)
            )
            self.hidden = self.states.joined(states, len(tokens))
        finally:
            model.set_submodule(family.blocks, self.layers)
            model.set_submodule(family.final_norm, norm)
            for name in outside:
                _to_meta(model.get_submodule(name.rpartition(".")[0]))
        self.original = self.hidden if original else None

    def _outside(self, decoder: str) -> list[str]:
        """What the decoder has before its blocks: embeddings of tokens, and of positions in some families."""
        behind = (f"{self.family.blocks}.", f"{self.family.final_norm}.")
        return [
            name
            for name in self.source.names
            if name.startswith(f"{decoder}.") and not name.startswith(behind)
        ]

    @contextmanager
    def open(self, index: int) -> Iterator[nn.Module]:
        """The block with its weights in memory; they are freed at the end of the context.

        Raises UserError if the folder holds a tensor of this block that its config has no place for.
        """
        layer = self.layers[index]
        prefix = f"{self.prefix(index)}."
        for name, tensor in self._tensors(index):
            assign(layer, name.removeprefix(prefix), tensor, self.folder, prefix)
        missing = [name for name, p in layer.named_parameters() if p.is_meta]
        if missing:
            raise UserError(f"{self.folder.path} holds no tensor {prefix}{missing[0]}")
        try:
            yield layer
        finally:
            _to_meta(layer)

    def _names(self, index: int) -> list[str]:
        prefix = f"{self.prefix(index)}."
        return [name for name in self.source.names if name.startswith(prefix)]

    def _tensors(self, index: int) -> Iterable[tuple[str, Tensor]]:
        """The tensors of a block; those of the next one are then read while it runs."""
        if self._ahead is None:
            return ((name, self._read(name)) for name in self._names(index))
        found = [
            (name, finite(self.folder, name, tensor))
            for name, tensor in self._ahead.take(self._names(index))
        ]
        if index + 1 < len(self):
            self._ahead.start(self._names(index + 1))
        return found

    def _read(self, name: str) -> Tensor:
        """A tensor in the model's dtype: some files keep norms or everything in float32. Raises UserError if
        it holds NaN or Inf."""
        dtype = dtype_in(name, self.family, self.folder.dtype)
        tensor = self.source.tensor(name).to(device=self.device, dtype=dtype)
        return finite(self.folder, name, tensor)

    def call_of(self, index: int) -> tuple[dict[str, Any], int]:
        """What the model hands a block besides hidden states, and how many sequences run at once."""
        return self._arguments[index], self._rows

    @torch.no_grad()
    def enter(self, index: int) -> Activations:
        """What enters the opened block, which has its original weights still."""
        assert self.hidden is not None, "embed() comes first"
        arguments, rows = self.call_of(index)
        found = Activations(self.hidden, self.original, None, arguments, rows, self.states)
        if self.original is not None:
            found.targets = found.forward(self.layers[index], self.original)
        return found

    @torch.no_grad()
    def leave(self, index: int, activations: Activations) -> None:
        """Make the outputs of the block, as it is now, what enters the next one."""
        self.hidden = activations.forward(self.layers[index], activations.inputs)
        self.original = activations.targets

    def check_same(self, index: int, module: nn.Module) -> None:
        """Raises RuntimeError if the processes of the team have made this block another."""
        team = self.states.team
        if team.count > 1:
            team.check_same(f"the weights of {self.prefix(index)}", _checksum(module))


def _checksum(module: nn.Module) -> int:
    """CRC-32 of the weights, quantized ones as what they stand for."""
    found = 0
    for parameter in module.parameters():
        found = zlib.crc32(as_bytes(parameter.detach().cpu().contiguous()).numpy().data, found)
    return found


def _buffers_to(module: nn.Module, device: torch.device) -> None:
    """Move the real buffers (rotary tables) of a module to the device its blocks run on."""
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if not buffer.is_meta:
                setattr(owner, name, buffer.to(device))


def _to_meta(module: nn.Module) -> None:
    """Free the weights of a module; tables that no checkpoint holds stay."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


class NoteTaker(nn.Module):
    """Stands in for a block: notes how it was called last and lets the hidden states pass.

    tuples: whether blocks of the family return their hidden states as the first of several
    """

    def __init__(self, layer: nn.Module, tuples: bool) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}
        self.called = False
        self._layer, self._tuples = [layer], tuples

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A model asks its blocks what kind they are.
            return getattr(self._layer[0], name)

    def forward(self, hidden_states: Tensor, *_: Any, **arguments: Any) -> Any:
        self.arguments, self.called = arguments, True
        return (hidden_states, None) if self._tuples else hidden_states
