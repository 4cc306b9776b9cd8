"""The original that a student follows: run beside it, or run once before and kept on disk in short."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from compress.distill.kept import Kept
from compress.distill.knobs import Distill
from compress.distill.losses import States, Top, next_tokens, top_of
from compress.distill.state import sha256
from compress.distill.student import BlockOutputs, Wanted
from compress.errors import UserError
from compress.model.families import Family, family_of
from compress.model.folder import ModelFolder, read_json, save_tensors, write_json
from compress.progress import track
from compress.runtime.load import load_dense
from compress.saved import here, sync

log = logging.getLogger(__name__)

# Sequences in a file of the cache.
GROUP = 32
FINGERPRINT = "fingerprint.json"
PARTS = ("tokens", "log_p", "log_tail", "text_nll")


@dataclass(frozen=True)
class Rows:
    """Numbers of the sequences that are trained on, and of those that are looked at"""

    trained: Tensor
    held: Tensor

    @property
    def groups(self) -> list[Tensor]:
        """Of the files of a cache."""
        return [*self.trained.split(GROUP), *self.held.split(GROUP)]


class Teacher(Protocol):
    """Gives what the original makes of sequences."""

    def __call__(self, rows: Tensor, tokens: Tensor) -> Wanted:
        """rows: numbers of the sequences; tokens: int64 (sequences, length) of them, on the device"""
        ...


class LiveTeacher:
    """The original itself."""

    def __init__(self, model: Any, family: Family, kept: Kept | None, knobs: Distill):
        """kept: what the student has of it, where states are compared"""
        self.model, self.kept, self.outputs = model, kept, None
        blocks = list(model.get_submodule(family.blocks))
        if kept is not None:
            self.outputs = BlockOutputs([blocks[index] for index in kept.compared])
        if knobs.compile:
            for block in blocks:
                block.forward = torch.compile(block.forward, dynamic=False)

    def __call__(self, rows: Tensor, tokens: Tensor) -> Wanted:
        goal, states = self.states(tokens), list[Tensor]()
        if self.kept is not None and self.outputs is not None:
            states = [self.kept.of_channels(state) for state in self.outputs.take()]
        return Wanted(goal, states)

    @torch.no_grad()
    def states(self, tokens: Tensor) -> States:
        H = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        return States(H.flatten(0, 1), self.model.get_output_embeddings().weight)


def open_teacher(
    original: ModelFolder, kept: Kept | None, knobs: Distill, device: torch.device
) -> LiveTeacher:
    """The original of a folder, in its type, on the device. kept: as LiveTeacher has it"""
    model = load_dense(original, device, original.dtype)
    return LiveTeacher(model, family_of(original.config), kept, knobs)


class CachedTeacher:
    """What the original made of sequences, read from the files that ``fill_cache`` wrote."""

    def __init__(self, folder: Path, rows: Rows, device: torch.device):
        """rows: that are there, as ``fill_cache`` had them"""
        self.folder, self.device = folder, device
        self.place = {
            row: (group, index)
            for group, part in enumerate(rows.groups)
            for index, row in enumerate(part.tolist())
        }

    def __call__(self, rows: Tensor, tokens: Tensor) -> Wanted:
        found: dict[str, list[Tensor]] = {part: [] for part in PARTS}
        for row in rows.tolist():
            group, index = self.place[row]
            with safe_open(_file(self.folder, group), framework="pt") as file:
                for part in PARTS:
                    found[part].append(file.get_slice(part)[index])
        whole = {part: torch.cat(found[part]).to(self.device) for part in PARTS}
        return Wanted(Top(**whole), [])


def fill_cache(
    folder: Path,
    original: ModelFolder,
    text: Tensor,
    rows: Rows,
    knobs: Distill,
    accelerator: Any,
    device: torch.device,
) -> None:
    """Write what the original makes of the sequences ``rows`` of ``text`` (n, length), a file a group of
    them: of those trained on at the temperature of the training, of those looked at at 1. What is there
    already is kept if it is of the same original, text and knobs.

    The processes share the groups.
    """
    fingerprint = {
        "original": original.fingerprint,
        "text": sha256(text),
        "trained": sha256(rows.trained),
        "held": sha256(rows.held),
        "top_k": knobs.top_k,
        "temperature": knobs.temperature,
        **here(device),
    }
    if accelerator.is_main_process:
        _prepare(folder, fingerprint)
    accelerator.wait_for_everyone()
    groups, trained = list(enumerate(rows.groups)), len(rows.trained.split(GROUP))
    groups = groups[accelerator.process_index :: accelerator.num_processes]
    groups = [(g, part) for g, part in groups if not _file(folder, g).exists()]
    if groups:
        teacher = open_teacher(original, None, knobs, device)
        for group, part in track(groups, "the original's most likely tokens"):
            path, held = _file(folder, group), group >= trained
            _write_group(path, teacher, text[part].to(device), knobs, held)
    accelerator.wait_for_everyone()


def _prepare(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Leave a folder with this fingerprint; groups of the same are kept."""
    if folder.exists() and _known(folder) != fingerprint:
        log.warning("the original's cache in %s is not of this run: it is made anew", folder)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.partial"):
        leftover.unlink()
    partial = folder / f"{FINGERPRINT}.partial"
    write_json(partial, fingerprint)
    partial.rename(folder / FINGERPRINT)


def _known(folder: Path) -> dict[str, Any] | None:
    """The fingerprint in a folder; None where a kill or a full disk left none that can be read."""
    try:
        return read_json(folder / FINGERPRINT)
    except UserError:
        return None


@torch.no_grad()
def _write_group(
    path: Path, teacher: LiveTeacher, text: Tensor, knobs: Distill, held: bool
) -> None:
    found: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    temperature = 1.0 if held else knobs.temperature
    for tokens in text.split(knobs.micro_batch):
        goal = teacher.states(tokens)
        goal = goal.exact() if held else goal
        top = top_of(goal, next_tokens(tokens), knobs.top_k, temperature)
        for part in PARTS:
            found[part].append(getattr(top, part).unflatten(0, tokens.shape).cpu())
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_tensors(partial, {part: torch.cat(found[part]) for part in PARTS})
    sync(partial)
    partial.rename(path)


def _file(folder: Path, group: int) -> Path:
    return folder / f"group-{group:05d}.safetensors"
