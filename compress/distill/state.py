"""Where a training is, on disk: weights and moments as accelerate saves them, beside what it needs to go on.

A state is written beside and renamed, then the one before it is removed: a kill at any moment leaves a
whole one.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.errors import UserError
from compress.model.folder import read_json, write_json
from compress.saved import Cost, changes, check_sums, checksums, size_of, sync, sync_names

log = logging.getLogger(__name__)

PROGRESS = "progress.json"
PREFIX, PARTIAL = "step-", ".partial"


def sha256(tensor: Tensor) -> str:
    """Of the bytes of a tensor on the CPU."""
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


@dataclass
class Progress:
    """What of a training is neither weights nor moments.

    step: steps that are done; steps: of the whole training, None until minutes are settled to a number
    seconds: since the start, in all processes that worked on it one after another; aside: of them, not in
        steps (loading, held-out sequences, saving)
    curve, held_out: as reported so far; original_nll: of the held-out sequences
    sums: of the losses (loss, kl, ce, hidden) since the last point of the curve; since: its step and its
        seconds in steps
    """

    step: int = 0
    steps: int | None = None
    seconds: float = 0.0
    aside: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)
    original_nll: float | None = None
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    since: list[float] = field(default_factory=lambda: [0, 0.0])


class State:
    """The state folder of one training. Processes save their parts; all else its main one does alone."""

    def __init__(self, path: Path, fingerprint: dict[str, Any], accelerator: Any):
        """fingerprint: what must be the same for a state to be gone on from, as JSON"""
        self.path, self.fingerprint, self.accelerator = path, fingerprint, accelerator
        self._cost = Cost()

    def resume(self) -> Progress:
        """Load the newest state of the same training; a fresh Progress if there is none. Another
        training's is removed, with a warning that says what differs."""
        if self.accelerator.is_main_process:
            self.path.mkdir(parents=True, exist_ok=True)
            self._cost.clear(self.path)
            self._clear()
        self.accelerator.wait_for_everyone()
        found = self._states()
        if not found:
            return Progress()
        newest = found[-1]
        self.accelerator.load_state(str(newest))
        progress = Progress(**read_json(newest / PROGRESS)["progress"])
        log.info("distill goes on after step %d of %s", progress.step, progress.steps)
        return progress

    def _clear(self) -> None:
        """Remove unfinished states, all but the newest, and that too if it is another training's."""
        for folder in self.path.glob(f"{PREFIX}*{PARTIAL}"):
            shutil.rmtree(folder)
        states = self._states()
        for folder in states[:-1]:
            shutil.rmtree(folder)
        if states and (why := self._unfit(states[-1])):
            log.warning("distill starts anew: %s", why)
            shutil.rmtree(states[-1])

    def _unfit(self, folder: Path) -> str:
        """Why a state cannot be gone on from; empty if it can."""
        try:
            saved = read_json(folder / PROGRESS)
            check_sums(folder, saved["checksums"])
            Progress(**saved["progress"])
            return changes(saved["fingerprint"], self.fingerprint)
        except (UserError, OSError, KeyError, TypeError, AttributeError) as error:
            return f"its state cannot be read: {error}"

    def _states(self) -> list[Path]:
        """Whole states, oldest first."""
        found = [p for p in self.path.glob(f"{PREFIX}*") if p.suffix != PARTIAL]
        return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))

    def save(self, progress: Progress) -> None:
        """Write the state after ``progress.step`` and remove those before it."""
        target = self.path / f"{PREFIX}{progress.step}"
        partial = target.with_name(target.name + PARTIAL)
        start = time.perf_counter()
        # Every process writes its part.
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._note(partial, progress, checksums(partial))
            sync(partial)
            before = self._states()
            partial.rename(target)
            for folder in (self.path, self.path.parent):
                sync_names(folder)
            on_disk = sum(map(size_of, (target, *before)))
            for folder in before:
                shutil.rmtree(folder)
            self._cost.add(on_disk, time.perf_counter() - start)
            self._cost.write(self.path)
        self.accelerator.wait_for_everyone()

    def note(self, progress: Progress) -> None:
        """Correct what the newest state says of its progress."""
        if self.accelerator.is_main_process:
            newest = self._states()[-1]
            self._note(newest, progress, read_json(newest / PROGRESS)["checksums"])

    def _note(self, folder: Path, progress: Progress, sums: dict[str, int]) -> None:
        """sums: of its other files"""
        content = {
            "fingerprint": self.fingerprint,
            "checksums": sums,
            "progress": asdict(progress),
        }
        beside = folder / f"{PROGRESS}{PARTIAL}"
        write_json(beside, content)
        sync(beside)
        beside.replace(folder / PROGRESS)
