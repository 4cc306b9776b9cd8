"""The state of unfinished work in a folder: what a killed process had done, for the next one to go on from.

Work that goes part by part (blocks, windows, tasks) offers its position after each part: facts as JSON, and
tensors. A position is written beside, synced, renamed, then the one before it is removed: a kill or a power
cut at any moment leaves a whole one, or none.

Saving is cheap by its own measure: an offered position is kept if the work since the last one took at least
``TIMES`` as long as keeping it takes, syncing included (as long as the last one took, by its bytes; before
the first as long as on a slow disk). So the state costs at most 1 / TIMES of the time, and a kill costs the
work since the last position: TIMES a save, or one part, whichever is longer.

A state is gone on from only by work with the same fingerprint: what it works on and how, the sources that
compute, versions, device and threads. Any other, and one that cannot be read, is removed with a warning that
says what differs.

Processes that share a stage save together, when the main one finds it cheap, each in a folder of its own; the
positions before go when all have theirs. They go on from the newest that all have.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.environment import PACKAGES, device_name, version_of
from compress.errors import UserError
from compress.model.folder import file_sha256, read_json, write_json
from compress.model.tensor_file import CHUNK, TensorFile
from compress.processes import ALONE, Team

log = logging.getLogger(__name__)
now = time.perf_counter

# Work that is worth a save, in times what the save takes.
TIMES = 50
# What a save is taken to cost before one was measured: seconds, and bytes a second.
SLOW_SECONDS, SLOW_RATE = 0.05, 200e6

PREFIX, PARTIAL = "position-", ".partial"
FACTS, TENSORS, FILES, COST = "facts.json", "tensors.safetensors", "files", "cost.json"


@dataclass
class Cost:
    """What a state cost in this process. bytes: the most that were on disk for it at once"""

    saves: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def add(self, on_disk: int, seconds: float) -> None:
        self.saves += 1
        self.bytes = max(self.bytes, on_disk)
        self.seconds += seconds

    def write(self, state: Path) -> None:
        write_json(state / COST, asdict(self))

    def clear(self, state: Path) -> None:
        """Forget what an earlier process wrote."""
        (state / COST).unlink(missing_ok=True)


class Tensors(Mapping[str, Tensor]):
    """The tensors of a file, on the CPU, each a copy that is made when it is asked for."""

    def __init__(self, path: Path):
        """Raises SafetensorError."""
        self._file = safe_open(path, framework="pt")
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self.mapped(name).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def mapped(self, name: str) -> Tensor:
        """The tensor as it lies in the file, which may be larger than the memory. For what is soon gone: the
        next position removes the file, but the disk has its room back only when nothing looks at it."""
        return self._file.get_tensor(name)


@dataclass(frozen=True)
class Position:
    """Where a piece of work was."""

    facts: dict[str, Any]
    tensors: Tensors

    def under(self, name: str) -> dict[str, Tensor]:
        """The tensors that ``named`` put under a name."""
        prefix = f"{name}."
        return {
            k.removeprefix(prefix): self.tensors[k] for k in self.tensors if k.startswith(prefix)
        }


def named(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """These tensors under a name, beside others of a position."""
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}


class Saved:
    """The state folder of one piece of work, in one process."""

    def __init__(
        self,
        path: Path | None,
        fingerprint: dict[str, Any] | None = None,
        whole: Path | None = None,
        team: Team = ALONE,
    ):
        """path: a folder of this alone, made when it is needed; None keeps nothing

        fingerprint: what must be the same for a position to be gone on from, nested, JSON
        whole: the state that this is a part of: all of it is removed where the fingerprint is another
        team: the processes that share the work; what is not the main one's is in a folder within ``path``
        """
        self.path, self.whole, self.team = path, path if whole is None else whole, team
        self.fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint or {}))
        # Since when there is work that no position holds.
        self._since = now()
        self._count = 0
        # Of the last save: its bytes and seconds.
        self._last: tuple[int, float] | None = None
        self._cost = Cost()
        # Of the files of ``files`` that a position named already: they are written once.
        self._sums: dict[str, int] = {}

    def part(self, name: str) -> Saved:
        """The state of a part of the work, with the same fingerprint."""
        if self.path is None:
            return self
        return Saved(self.path / name, self.fingerprint, self.whole, self.team)

    def alone(self) -> Saved:
        """Of what the main process does by itself within work that is shared."""
        return Saved(self.path, self.fingerprint, self.whole)

    @property
    def _own(self) -> Path:
        """The folder of this process."""
        assert self.path is not None
        return self.path if self.team.is_main else self.path / f"process-{self.team.rank}"

    def load(self) -> Position | None:
        """The newest whole position of the same work, None if there is none; all else is cleared away."""
        self._since = now()
        if self.path is None:
            return None
        self._cost.clear(self._own)
        for leftover in self._own.glob(f"{PREFIX}*{PARTIAL}"):
            shutil.rmtree(leftover)
        positions = self._positions()
        common = set.intersection(*map(set, self.team.exchange(list(map(_number, positions)))))
        newest = [folder for folder in positions if _number(folder) == max(common, default=0)]
        # Where the others have none the main one says why its own is not gone on from.
        if not positions and self.team.is_main and self.path.exists():
            log.info("%s: no position was kept, it starts from its beginning", _named(self.path))
        looked_at = newest or positions[-1:]
        found, stale = self._read(looked_at[0]) if looked_at else (None, self.path)
        if not all(self.team.exchange(bool(newest) and found is not None)):
            if self.team.is_main:
                shutil.rmtree(stale, ignore_errors=True)
            self.team.exchange(None)
            return None
        for folder in positions:
            if folder not in newest:
                shutil.rmtree(folder)
        self._count = _number(newest[0])
        self._since = now()
        return found

    def _read(self, folder: Path) -> tuple[Position | None, Path]:
        """A position, None with a warning for one that cannot be read or is of other work; and which folder
        goes if nobody goes on from it."""
        assert self.path is not None
        try:
            saved = read_json(folder / FACTS)
            if changed := changes(saved["fingerprint"], self.fingerprint):
                assert self.whole is not None
                log.warning("%s starts anew: %s", _named(self.whole), changed)
                return None, self.whole
            check_sums(folder, saved["checksums"])
            if self.team.is_main:
                assert self.path is not None
                check_sums(self.path / FILES, saved["files"])
                self._sums = saved["files"]
            return Position(saved["facts"], Tensors(folder / TENSORS)), self.path
        except (UserError, SafetensorError, OSError, KeyError, AttributeError) as error:
            log.warning(
                "%s starts anew: its state cannot be read: %s", _named(folder.parent), error
            )
            return None, self.path

    def offer(self, facts: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> bool:
        """Save if that is cheap beside the work since the last position. Returns whether it was saved."""
        given = {} if tensors is None else tensors
        if self.path is None:
            return False
        due = now() - self._since >= TIMES * self._expected(given)
        if not self.team.exchange(due)[0]:
            return False
        self.save(facts, given)
        return True

    def _expected(self, tensors: dict[str, Tensor]) -> float:
        """Seconds that saving these takes."""
        nbytes = sum(t.nbytes for t in tensors.values())
        if self._last is None:
            return SLOW_SECONDS + nbytes / SLOW_RATE
        before, seconds = self._last
        return seconds * max(1.0, nbytes / max(1, before))

    def save(self, facts: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        """Write a position, and sync with it what is in ``files``; then remove the ones before it.

        facts: JSON
        """
        if self.path is None:
            return
        start, given = now(), tensors or {}
        before = self._positions()
        self._count += 1
        target = self._own / f"{PREFIX}{self._count}"
        partial = target.with_name(target.name + PARTIAL)
        partial.mkdir(parents=True)
        # Tensor by tensor: states that were spilled may be larger than the memory.
        file = TensorFile(partial / TENSORS)
        for name, tensor in given.items():
            file.add(name, tensor.detach())
        file.close()
        write_json(
            partial / FACTS,
            {
                "fingerprint": self.fingerprint,
                "checksums": checksums(partial),
                "files": self._checked_files(),
                "facts": facts,
            },
        )
        sync(partial)
        if self.team.is_main and (self.path / FILES).exists():
            sync(self.path / FILES)
        partial.rename(target)
        # A folder that is new is in the one above it.
        assert self.whole is not None
        for folder in (self._own, self.path, self.whole, self.whole.parent):
            sync_names(folder)
        # A kill leaves one that all have.
        self.team.exchange(None)
        on_disk = sum(map(size_of, (target, *before)))
        for folder in before:
            shutil.rmtree(folder)
        self._since = now()
        self._note(sum(t.nbytes for t in given.values()), on_disk, self._since - start)

    def _checked_files(self) -> dict[str, int]:
        """Checksums of the files that are whole by now."""
        assert self.path is not None
        if self.team.is_main and (self.path / FILES).exists():
            self._sums = checksums(self.path / FILES, self._sums)
        return self._sums

    def _note(self, nbytes: int, on_disk: int, seconds: float) -> None:
        assert self.path is not None
        self._last = nbytes, seconds
        # They save at the same time: of their seconds the main one's count, of their bytes all.
        self._cost.add(sum(self.team.exchange(on_disk)), seconds)
        if self.team.is_main:
            self._cost.write(self.path)

    @contextlib.contextmanager
    def files(self, target: Path) -> Iterator[Path]:
        """The folder to write the files of ``target`` to as the work goes on; in the end they are there.

        Comes after ``load``. A position holds the files that were whole when it was saved; what was begun
        after it is written again. The main process alone writes any.
        """
        if self.path is None or not self.team.is_main:
            yield target
            return
        folder = self.path / FILES
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        target.mkdir(parents=True)
        # The state stays whole until the work is: a kill from here on costs nothing.
        for file in sorted(folder.iterdir()):
            link(file, target / file.name)

    def _positions(self) -> list[Path]:
        """Whole ones, oldest first."""
        found = [p for p in self._own.glob(f"{PREFIX}*") if p.suffix != PARTIAL]
        return sorted(found, key=_number)


# Keeps nothing: for work that nobody needs to go on with.
NOWHERE = Saved(None)


def here(device: torch.device) -> dict[str, Any]:
    """The part of a fingerprint that is of this machine and this copy of the program."""
    return {
        "code": code(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }


@functools.cache
def code() -> str:
    """SHA-256 over each file that computes: a commit does not tell of changed files, nor an installed copy of
    a commit."""
    root = Path(__file__).parents[1]
    folders = (root / name for name in ("calibration", "compress", "eval"))
    files = sorted(
        f for folder in folders for end in ("py", "cpp") for f in folder.rglob(f"*.{end}")
    )
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()


def cost_of(state: Path) -> Cost | None:
    """What the states under a folder cost since this process loaded them. None if none was saved."""
    found = [Cost(**read_json(file)) for file in state.rglob(COST)]
    if not found:
        return None
    return Cost(*(sum(values) for values in zip(*map(astuple, found), strict=True)))


def changes(known: Any, asked: Any) -> str:
    """What differs between two fingerprints, in words; empty if nothing does."""
    return ", ".join(_changes(known, asked, ""))


def _changes(known: Any, asked: Any, key: str) -> list[str]:
    # As text: methods run in the order in which they are named.
    if json.dumps(known) == json.dumps(asked):
        return []
    if isinstance(known, dict) and isinstance(asked, dict):
        names = list(dict.fromkeys([*known, *asked]))
        return [
            text
            for name in names
            for text in _changes(known.get(name), asked.get(name), f"{key}.{name}" if key else name)
        ] or [f"{key} was {', '.join(known)}, is {', '.join(asked)}"]
    if _is_hash(known) and _is_hash(asked):
        return [f"{key} is another"]
    return [f"{key} was {_said(known)}, is {_said(asked)}"]


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == hashlib.sha256().digest_size * 2


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _named(state: Path) -> str:
    """The work whose state this is, as a person knows it: ``quantize`` of quantize.state, and its part."""
    for parent in state.parents:
        if parent.suffix == ".state":
            return " ".join((parent.stem, *state.relative_to(parent).parts))
    return state.stem


def _number(position: Path) -> int:
    return int(position.name.removeprefix(PREFIX))


def checksums(folder: Path, known: Mapping[str, int] | None = None) -> dict[str, int]:
    """CRC-32 of each file in a folder, by its path there. known: of those that need not be read"""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = {str(file.relative_to(folder)): file for file in files}
    had = known or {}
    return {n: had[n] if n in had else _checksum(file) for n, file in names.items()}


def check_sums(folder: Path, known: dict[str, int]) -> None:
    """Raises UserError for a file that has not the bytes that ``checksums`` saw."""
    for name, checksum in known.items():
        file = folder / name
        if not file.exists() or _checksum(file) != checksum:
            raise UserError(f"{file} does not hold the bytes that were written")


def _checksum(file: Path) -> int:
    found = 0
    with file.open("rb") as opened:
        while part := opened.read(CHUNK):
            found = zlib.crc32(part, found)
    return found


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def sync(path: Path) -> None:
    """Return when a file, or a folder with all that is in it, is on the disk."""
    if path.is_dir():
        for inner in path.iterdir():
            sync(inner)
    sync_names(path)


def sync_names(path: Path) -> None:
    """Return when a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link(file: Path, target: Path) -> None:
    """The same file under another name where the disk allows it: nothing writes into a finished folder."""
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copyfile(file, target)
