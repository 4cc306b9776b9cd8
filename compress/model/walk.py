"""Running a model block by block: weights of one block in memory, hidden states between two blocks.

tokens (sequences, length); hidden states: one (batch, length, hidden) tensor a batch
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.model.families import Family
from compress.model.folder import ModelFolder
from compress.model.skeleton import assign, empty_model


class Walk:
    """The decoder blocks of a folder in order, with the hidden states that enter the current one."""

    def __init__(
        self,
        folder: ModelFolder,
        family: Family,
        device: torch.device,
        tokens_per_batch: int = 4096,
    ):
        self.folder = folder
        self.family = family
        self.device = device
        self.tokens_per_batch = tokens_per_batch
        self.model = empty_model(folder, folder.dtype)
        self.layers: nn.ModuleList = self.model.get_submodule(family.blocks)
        self.hidden: list[Tensor] = []
        # What the model hands to each of its blocks beside the hidden states, for each batch.
        self._arguments: list[list[dict[str, Any]]] = []

    def __len__(self) -> int:
        return len(self.layers)

    def prefix(self, index: int) -> str:
        return f"{self.family.blocks}.{index}"

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> None:
        """Set the hidden states to the embeddings of ``tokens``.

        Every block is asked what it would be called with (masks, rotary tables: they differ between
        architectures and between blocks), by running the model with blocks that only take notes.
        """
        family, model = self.family, self.model
        assign(model, f"{family.embedding}.weight", self._read(f"{family.embedding}.weight"))
        decoder = model.get_submodule(family.blocks.rpartition(".")[0])
        _buffers_to(decoder, self.device)
        notes = [_NoteTaker() for _ in self.layers]
        norm = model.get_submodule(family.final_norm)
        model.set_submodule(family.blocks, nn.ModuleList(notes))
        model.set_submodule(family.final_norm, nn.Identity())
        batch = max(1, self.tokens_per_batch // tokens.shape[1])
        try:
            for rows in tokens.to(self.device).split(batch):
                self.hidden.append(decoder(input_ids=rows, use_cache=False).last_hidden_state)
        finally:
            model.set_submodule(family.blocks, self.layers)
            model.set_submodule(family.final_norm, norm)
            model.get_submodule(family.embedding).to("meta")
        self._arguments = [note.calls for note in notes]

    @contextmanager
    def open(self, index: int) -> Iterator[nn.Module]:
        """The block with its weights in memory; they are freed at the end of the context.

        Raises UserError if the folder holds a tensor of this block that its config has no place for.
        """
        layer = self.layers[index]
        prefix = f"{self.prefix(index)}."
        for name in self.folder.names:
            if name.startswith(prefix):
                assign(layer, name.removeprefix(prefix), self._read(name))
        missing = [name for name, p in layer.named_parameters() if p.is_meta]
        if missing:
            raise UserError(f"{self.folder.path} holds no tensor {prefix}{missing[0]}")
        try:
            yield layer
        finally:
            layer.to("meta")

    def _read(self, name: str) -> Tensor:
        """A tensor in the model's dtype: some files keep norms or everything in float32."""
        return self.folder.tensor(name).to(device=self.device, dtype=self.folder.dtype)

    @torch.no_grad()
    def run(self, index: int, keep: bool) -> None:
        """Run the opened block on the hidden states; ``keep`` makes its outputs the new ones."""
        layer = self.layers[index]
        for i, arguments in enumerate(self._arguments[index]):
            output = layer(self.hidden[i], **arguments)
            if keep:
                self.hidden[i] = output


def _buffers_to(module: nn.Module, device: torch.device) -> None:
    """Move the real buffers (rotary tables) of a module to the device its blocks run on."""
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if not buffer.is_meta:
                setattr(owner, name, buffer.to(device))


class _NoteTaker(nn.Module):
    """Stands in for a block: notes how it was called and lets the hidden states pass."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.calls.append(arguments)
        return hidden_states
