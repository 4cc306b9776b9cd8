"""The original that a student follows: run beside it, or run once before and kept on disk in short."""

from __future__ import annotations

import logging
import os
import shutil
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
from compress.model.families import Family, family_of
from compress.model.folder import ModelFolder, read_json, save_tensors, write_json
from compress.progress import track
from compress.runtime.load import load_dense

log = logging.getLogger(__name__)

# Sequences in a file of the cache.
GROUP = 32
FINGERPRINT = "fingerprint.json"
PARTS = ("tokens", "log_p", "log_tail", "text_nll")


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

    def __init__(self, folder: Path, rows: Tensor, device: torch.device):
        """rows: numbers of the sequences that are there, as ``fill_cache`` had them"""
        self.folder, self.device = folder, device
        self.place = {row: place for place, row in enumerate(rows.tolist())}

    def __call__(self, rows: Tensor, tokens: Tensor) -> Wanted:
        found: dict[str, list[Tensor]] = {part: [] for part in PARTS}
        for row in rows.tolist():
            group, index = divmod(self.place[row], GROUP)
            with safe_open(_file(self.folder, group), framework="pt") as file:
                for part in PARTS:
                    found[part].append(file.get_slice(part)[index])
        whole = {part: torch.cat(found[part]).to(self.device) for part in PARTS}
        return Wanted(Top(**whole), [])


def fill_cache(
    folder: Path,
    original: ModelFolder,
    text: Tensor,
    rows: Tensor,
    knobs: Distill,
    accelerator: Any,
    device: torch.device,
) -> None:
    """Write what the original makes of the sequences ``rows`` of ``text`` (n, length), a file a group of
    them; what is there already is kept if it is of the same original, text and knobs.

    The processes share the groups.
    """
    fingerprint = {
        "original": original.fingerprint,
        "text": sha256(text),
        "rows": sha256(rows),
        "top_k": knobs.top_k,
        "temperature": knobs.temperature,
    }
    if accelerator.is_main_process:
        if folder.exists() and read_json(folder / FINGERPRINT) != fingerprint:
            log.warning("the original's cache in %s is of another run: it is made anew", folder)
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FINGERPRINT, fingerprint)
    accelerator.wait_for_everyone()
    groups = list(enumerate(rows.split(GROUP)))
    groups = groups[accelerator.process_index :: accelerator.num_processes]
    groups = [(g, part) for g, part in groups if not _file(folder, g).exists()]
    if groups:
        teacher = open_teacher(original, None, knobs, device)
        for group, part in track(groups, "the original's most likely tokens"):
            _write_group(_file(folder, group), teacher, text[part].to(device), knobs)
    accelerator.wait_for_everyone()


@torch.no_grad()
def _write_group(path: Path, teacher: LiveTeacher, text: Tensor, knobs: Distill) -> None:
    found: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    for tokens in text.split(knobs.micro_batch):
        top = top_of(teacher.states(tokens), next_tokens(tokens), knobs.top_k, knobs.temperature)
        for part in PARTS:
            found[part].append(getattr(top, part).unflatten(0, tokens.shape).cpu())
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_tensors(partial, {part: torch.cat(found[part]) for part in PARTS})
    partial.rename(path)


def _file(folder: Path, group: int) -> Path:
    return folder / f"group-{group:05d}.safetensors"
