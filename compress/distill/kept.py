"""What of the original a pruned model kept, so that states of the two can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.errors import UserError
from compress.model.families import size_of
from compress.model.folder import PRUNED, ModelFolder, read_json


@dataclass(frozen=True)
class Kept:
    """layers: numbers of the original's blocks; channels: int64 (hidden of the student,), or None for all;
    blocks: how many the original has"""

    layers: tuple[int, ...]
    channels: Tensor | None
    blocks: int

    @property
    def compared(self) -> list[int]:
        """The original's blocks after which its states are what the student's should be after each of its
        own: the one before the next that was kept; the last before the final norm."""
        return [index - 1 for index in (*self.layers[1:], self.blocks)]

    def of_channels(self, states: Tensor) -> Tensor:
        return states if self.channels is None else states[..., self.channels]


def kept_of(source: ModelFolder, original: ModelFolder, device: torch.device) -> Kept:
    """Raises UserError where nothing tells which blocks and channels belong together."""
    ours, theirs = _sizes(source), _sizes(original)
    if ours == theirs:
        # Whatever a note says: the original may be a pruned model itself, whose note travels along.
        return Kept(tuple(range(ours[0])), None, theirs[0])
    note = source.path / PRUNED
    if not note.exists():
        raise UserError(
            f"distill.hidden compares states by block and channel: {source.path} has {ours[0]} x "
            f"{ours[1]}, the original {theirs[0]} x {theirs[1]}, and no {PRUNED} tells which were kept"
        )
    found = read_json(note)
    layers, hidden = found.get("layers") or [], found.get("hidden")
    for part, numbers in (("layers", layers), ("hidden", hidden or [])):
        if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
            raise UserError(f"{note}: {part} is no list of whole numbers")
    sizes = (len(layers), theirs[1] if hidden is None else len(hidden))
    if sizes != ours:
        raise UserError(
            f"{note} keeps {sizes[0]} x {sizes[1]} blocks and channels, the model has {ours[0]} x {ours[1]}"
        )
    _check_numbers(note, "block", layers, theirs[0])
    _check_numbers(note, "channel", hidden or [], theirs[1])
    channels = None if hidden is None else torch.tensor(hidden, device=device)
    return Kept(tuple(layers), channels, theirs[0])


def _check_numbers(note: Path, part: str, numbers: list[int], count: int) -> None:
    for number in numbers:
        if not 0 <= number < count:
            raise UserError(f"{note} keeps {part} {number} of an original that has {count}")


def _sizes(folder: ModelFolder) -> tuple[int, int]:
    """Blocks and channels."""
    return size_of("num_hidden_layers", folder.config), size_of("hidden_size", folder.config)
