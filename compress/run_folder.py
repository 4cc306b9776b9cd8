"""The folder of a run, and what a second start in it takes over from a killed one.

``run.json`` says what decides the results, and is locked while a process works in the folder. A step (the
generated text, a stage, the checkpoint) is a folder NAME with its report NAME.json beside it; both appear
under these names only when they are whole and on the disk. NAME.state is what an unfinished one goes on from.

A report holds the fingerprint of its step: what decided it, and what it started from. A step is taken over
if that is still the same; the first that differs is made anew, with all that are behind it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import yaml

from compress.disk import writing
from compress.errors import UserError
from compress.model.folder import WEIGHTS, read_json, write_json
from compress.report.table import METRICS
from compress.saved import changes, check_sums, checksums, cost_of, sync, sync_names
from eval.memory import give_back, peak_cuda, peak_rss

log = logging.getLogger(__name__)

RUN = "run.json"
# What a run has measured so far.
MEASURED = "measured.state"
# What the command line leaves in a folder before a run begins in it.
BEFORE = (".hydra", "compress.log")
# How words begin that decide nothing of what comes out.
UNDECIDING = ("spill=",)


@dataclass(frozen=True)
class Step:
    """What a step left: its report, its seconds, the peak bytes of the process that made it so far.

    taken: it was made by an earlier start; state: what its state cost, see ``saved.Cost``; files: checksums
    of its weights
    """

    report: dict[str, Any]
    seconds: float
    peak_rss: int
    peak_cuda: int | None
    taken: bool
    state: dict[str, Any] | None = None
    fingerprint: dict[str, Any] | None = None
    files: dict[str, int] | None = None


def check_free(out: Path) -> None:
    """Raises UserError if a folder holds a finished run, or anything else but an unfinished one."""
    _check_unfinished(out)
    if (out / RUN).exists() or not out.is_dir():
        return
    if any(file.name not in BEFORE for file in out.iterdir()):
        raise UserError(f"{out} is not empty: choose another hydra.run.dir")


def _check_unfinished(out: Path) -> None:
    if (out / METRICS).exists():
        raise UserError(f"{out} holds a finished run: choose another hydra.run.dir")


def unfinished(folder: Path, overrides: list[str]) -> Path | None:
    """The newest unfinished run in a folder of runs that the same words asked for, and nobody works on."""
    for run in _newest(folder, "*"):
        if not (run / METRICS).exists() and _free_and_of(run, overrides):
            return run
    return None


def unfinished_sweep(jobs: Sequence[tuple[Path, list[str]]]) -> list[Path] | None:
    """The folders of the newest unfinished sweep that the same words asked for, and nobody works on: one a
    job, which is there or not yet.

    jobs: of each its folder of runs and its words. Folders of a sweep are TIME-NUMBER in these
    """
    for first in _newest(jobs[0][0], "*-0"):
        began = first.name.removesuffix("-0")
        runs = [folder / f"{began}-{number}" for number, (folder, _) in enumerate(jobs)]
        begun = [(run, job[1]) for run, job in zip(runs, jobs, strict=True) if (run / RUN).exists()]
        finished = all((run / METRICS).exists() for run in runs)
        if not finished and all(_free_and_of(run, words) for run, words in begun):
            return runs
    return None


def _newest(folder: Path, names: str) -> list[Path]:
    """The folders that hold a run, by name, which is a time; the newest first."""
    return [run.parent for run in sorted(folder.glob(f"{names}/{RUN}"), reverse=True)]


def _free_and_of(run: Path, overrides: list[str]) -> bool:
    """Whether a run was asked for by these words, and nobody works on it."""
    asked = run / ".hydra" / "overrides.yaml"
    # Hydra's own file: a power cut may have left anything.
    with contextlib.suppress(UserError, OSError, ValueError, yaml.YAMLError):
        check_unheld(run)
        known = yaml.safe_load(asked.read_text(encoding="utf-8"))
        if isinstance(known, list):
            return _deciding(list(map(str, known))) == _deciding(overrides)
    return False


def _deciding(words: list[str]) -> list[str]:
    """The words that decide what comes out."""
    return [word for word in words if not word.startswith(UNDECIDING)]


def check_unheld(out: Path) -> None:
    """Raises UserError if another process works in the folder of an unfinished run."""
    with (out / RUN).open("r+", encoding="utf-8") as file:
        _lock(file, out)


@contextlib.contextmanager
def opened(out: Path, decisive: dict[str, Any]) -> Iterator[None]:
    """Hold the folder of a run, new or left by a killed one, for this process.

    decisive: what decides the results, nested, JSON, for people to read
    What killed processes left half-written is cleared away. Raises UserError as ``check_free`` and
    ``check_unheld`` do.
    """
    check_free(out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / RUN).open("a+", encoding="utf-8") as file:
        _lock(file, out)
        # Another process may have ended in the meantime.
        _check_unfinished(out)
        # In place: a file that replaced it would not be the one that is locked.
        file.truncate(0)
        file.write(json.dumps(decisive, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        _clear(out)
        yield


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Hold the folder of a finished run for this process; what killed ones left half-written is cleared.

    Raises UserError if there is none, or another process holds it.
    """
    if not (out / RUN).exists():
        raise UserError(f"{out} is not the folder of a run: there is no {RUN}")
    with (out / RUN).open("r+", encoding="utf-8") as file:
        _lock(file, out)
        _clear(out)
        yield


def _clear(out: Path) -> None:
    for leftover in out.glob("*.partial"):
        _remove(leftover)


def _lock(file: IO[str], out: Path) -> None:
    """The lock goes with the process that holds it, however that ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another process works in {out}: wait for it, or choose another hydra.run.dir"
        ) from None


def keep_same(out: Path, steps: dict[str, dict[str, Any]]) -> None:
    """Leave only what an earlier start made as this run would: a warning says where it differs.

    steps: the fingerprint of each step of the run, nested, JSON, in order; each holds that of the one before
    """
    anew = False
    for name, fingerprint in steps.items():
        if not anew and (out / name).exists():
            changed = _changed(out, name, fingerprint)
            if changed:
                log.warning("%s starts anew: %s", name, changed)
                anew = True
        if anew:
            _discard(out, name)
    for state in out.glob("*.state"):
        if state.stem not in steps and state.name != MEASURED:
            shutil.rmtree(state)
    for report in out.glob("*.json"):
        if report.stem in steps or not (out / report.stem).is_dir():
            continue
        # As that state, of a stage that the recipe has no more; further formats of the same record stay.
        with contextlib.suppress(UserError):
            known = made(out, report.stem).fingerprint
            if known is not None and all(changes(known, own) for own in steps.values()):
                log.info("%s is no step of this run: removed", report.stem)
                _discard(out, report.stem)


def _changed(out: Path, name: str, fingerprint: dict[str, Any]) -> str:
    """Why a step that is there is not what would be made, in words; empty if it is."""
    try:
        known = made(out, name)
    except UserError as error:
        return f"its report cannot be read: {error}"
    if known.fingerprint is None or known.files is None:
        return "another version of this program made it"
    if changed := changes(known.fingerprint, fingerprint):
        return changed
    try:
        check_sums(out / name, known.files)
    except UserError as error:
        return str(error)
    return ""


def made(out: Path, name: str) -> Step:
    """A step that an earlier start made. Raises UserError if its report is none."""
    file = out / f"{name}.json"
    found = read_json(file)
    try:
        return Step(**found, taken=True)
    except TypeError as error:
        raise UserError(f"{file} is not the report of a step") from error


def _discard(out: Path, name: str) -> None:
    """Remove a step and its state. A kill on the way leaves nothing that counts as one."""
    for path in (out / name, out / f"{name}.state"):
        if path.exists():
            leftover = path.with_name(f"{path.name}.{os.getpid()}.partial")
            path.rename(leftover)
            _remove(leftover)
    (out / f"{name}.json").unlink(missing_ok=True)


def step(
    out: Path,
    name: str,
    make: Callable[[Path, Path], dict[str, Any]],
    fingerprint: dict[str, Any] | None = None,
) -> Step:
    """Take over the step ``name`` if an earlier start made it, else make it.

    make: (target, state) -> report: writes the folder ``target``, which does not exist yet, and may keep in
    the folder ``state`` what it needs to go on after being killed; ``state`` exists if it did so before, and
    is removed once the step is whole.
    fingerprint: what ``keep_same`` is going to ask for
    """
    folder, report, state = out / name, out / f"{name}.json", out / f"{name}.state"
    taken = folder.exists()
    if taken:
        log.info("%s: taken over from an earlier start", name)
    else:
        began = time.perf_counter()
        with whole(folder) as target:
            found = make(target, state)
            give_back()
            # Before the folder has its name: a finished step always has its report.
            with whole(report) as partial:
                cost = cost_of(state)
                facts = {
                    "seconds": time.perf_counter() - began,
                    "peak_rss": peak_rss(),
                    "peak_cuda": peak_cuda(),
                    "state": None if cost is None else asdict(cost),
                    "fingerprint": fingerprint,
                    # Of a card and the manifest that names it more is to come.
                    "files": {
                        name: checksum
                        for name, checksum in checksums(target).items()
                        if name.endswith(WEIGHTS)
                    },
                    "report": found,
                }
                write_json(partial, facts)
    if state.exists():
        shutil.rmtree(state)
    return replace(made(out, name), taken=taken)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write beside, rename at the end; on any failure nothing of this process is left.

    What has the name is on the disk: a power cut leaves it whole, or not there.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with writing(partial):
            yield partial
            sync(partial)
        partial.rename(path)
        sync_names(path.parent)
    except BaseException:
        _remove(partial)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
