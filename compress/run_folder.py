"""The folder of a run, and what a second start in it takes over from a killed one.

``run.json`` says what decides the results, and is locked while a process works in the folder. A step (the
generated text, a stage, the checkpoint) is a folder NAME with its report NAME.json beside it; both appear
under these names only when they are whole. NAME.state is a step's own scratch folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from compress.disk import writing
from compress.errors import UserError
from compress.model.folder import read_json, write_json
from compress.report.table import METRICS
from eval.memory import give_back, peak_cuda, peak_rss

log = logging.getLogger(__name__)

RUN = "run.json"
VERSION = 1
# What the command line leaves in a folder before a run begins in it.
BEFORE = (".hydra", "compress.log")


@dataclass(frozen=True)
class Step:
    """What a step left: its report, its seconds, the peak bytes of the process that made it so far.

    taken: it was made by an earlier start
    """

    report: dict[str, Any]
    seconds: float
    peak_rss: int
    peak_cuda: int | None
    taken: bool


def check_free(out: Path) -> None:
    """Raises UserError if a folder holds a finished run, or anything else but an unfinished one."""
    if (out / METRICS).exists():
        raise UserError(f"{out} holds a finished run: choose another hydra.run.dir")
    if (out / RUN).exists() or not out.is_dir():
        return
    if any(file.name not in BEFORE for file in out.iterdir()):
        raise UserError(f"{out} is not empty: choose another hydra.run.dir")


def check_same(out: Path, decisive: dict[str, Any]) -> None:
    """Raises UserError if the unfinished run in ``out`` would end otherwise, or is being worked on.

    decisive: what decides the results of a run, nested, JSON
    """
    with (out / RUN).open("r+", encoding="utf-8") as file:
        _lock(file, out)
        _compare(out, decisive)


@contextlib.contextmanager
def opened(out: Path, decisive: dict[str, Any]) -> Iterator[None]:
    """Hold the folder of a run, new or left by a killed one, for this process.

    What killed processes left half-written is cleared away. Raises UserError as ``check_free`` and
    ``check_same`` do.
    """
    check_free(out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / RUN).open("a+", encoding="utf-8") as file:
        _lock(file, out)
        _compare(out, decisive)
        # Written once and in place: a file that replaced it would not be the one that is locked.
        if file.tell() == 0:
            file.write(_text(decisive))
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


def _text(decisive: dict[str, Any]) -> str:
    return json.dumps({"version": VERSION, **decisive}, indent=2, ensure_ascii=False) + "\n"


def _compare(out: Path, decisive: dict[str, Any]) -> None:
    """An empty file is that of a process killed before it wrote a word: it fits any run."""
    if (out / RUN).stat().st_size == 0:
        return
    found = _difference(read_json(out / RUN), json.loads(_text(decisive)))
    if found is not None:
        key, theirs, ours = found
        raise UserError(
            f"{out} holds an unfinished run with {key}={theirs}, this one has {ours}: choose another "
            "hydra.run.dir"
        )


def _difference(known: Any, asked: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key that differs, dotted, with both values; of sections that hold different names, or
    the same in another order, the names."""
    if not (isinstance(known, dict) and isinstance(asked, dict)):
        return None if known == asked else (key, known, asked)
    if list(known) != list(asked) and key:
        return key, list(known), list(asked)
    for name in dict.fromkeys([*known, *asked]):
        inner = f"{key}.{name}" if key else name
        found = _difference(known.get(name), asked.get(name), inner)
        if found is not None:
            return found
    return None


def step(out: Path, name: str, make: Callable[[Path, Path], dict[str, Any]]) -> Step:
    """Take over the step ``name`` if an earlier start made it, else make it.

    make: (target, state) -> report: writes the folder ``target``, which does not exist yet, and may keep in
    the folder ``state`` what it needs to go on after being killed; ``state`` exists if it did so before, and
    is removed once the step is whole.
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
                facts = {"seconds": time.perf_counter() - began, "peak_rss": peak_rss()}
                write_json(partial, {**facts, "peak_cuda": peak_cuda(), "report": found})
    if state.exists():
        shutil.rmtree(state)
    return Step(**read_json(report), taken=taken)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write beside, rename at the end; on any failure nothing of this process is left."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with writing(partial):
            yield partial
        partial.rename(path)
    except BaseException:
        _remove(partial)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
