"""A disk that takes no more: told in one sentence that names the file, wherever in a run it happens."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from compress.errors import UserError

# What a write may end in that a person can mend, and how. Of a disk that is full what is left is told.
FULL = "make space"
ELSEWHERE = "choose another hydra.run.dir"
REMEDIES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: f"{FULL} within the quota",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EROFS: ELSEWHERE,
    errno.EACCES: ELSEWHERE,
    errno.EPERM: ELSEWHERE,
}
# As whole() of run_folder names what is not finished.
UNFINISHED = re.compile(r"\.\d+\.partial\b|\.partial\b")
# Less than this and not even the log of a run has room.
LEAST = 1_000_000


class DiskError(UserError):
    """A file that could not be written. What was whole before still is."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the disk refuses while ``path`` is written, a file or a folder with all in it, is a DiskError that
    names it, or the file in it, if it is known."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        number = _number(error)
        file = _written(error, path)
        if number is None or file is None:
            raise
        raise DiskError(
            f"{UNFINISHED.sub('', str(file))} cannot be written: {os.strerror(number).lower()}, "
            f"{told(free_bytes(file))} free there: {REMEDIES[number]}"
        ) from error


def _number(error: Exception) -> int | None:
    """The errno of a refusal; None of anything else that went wrong."""
    if isinstance(error, OSError):
        return error.errno if error.errno in REMEDIES else None
    text = str(error)
    if isinstance(error, SafetensorError):
        # "... I/O error: No space left on device (os error 28)"
        found = re.search(r"\(os error (\d+)\)", text)
        return int(found[1]) if found and int(found[1]) in REMEDIES else None
    # torch.save tells that a write fell short, not why.
    return errno.ENOSPC if re.search(r"inline_container|PytorchStreamWriter", text) else None


def _written(error: Exception, path: Path) -> Path | None:
    """The file that was being written; None if the error names one that only was to be read."""
    names = [getattr(error, key, None) for key in ("filename", "filename2")]
    given = [Path(os.fsdecode(name)) for name in names if isinstance(name, str | bytes)]
    inside = [file for file in given if file.absolute().is_relative_to(path.absolute())]
    if inside:
        return inside[-1]
    # Copying names its source where the target has no room.
    reading = (
        bool(given) and isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM)
    )
    return None if reading else path


def free_bytes(path: Path) -> int:
    """Bytes that a person may still write where a file is or will be."""
    absolute = path.absolute()
    there = next(p for p in (absolute, *absolute.parents) if p.exists())
    return shutil.disk_usage(there).free


def check_free_bytes(path: Path, least: float = LEAST, of: str = "a run") -> None:
    """Raises DiskError if there is not even ``least`` bytes of room for what ``of`` names."""
    free = free_bytes(path)
    if free < least:
        raise DiskError(
            f"{path} has no room for {of}: it takes at least {told(least)}, {told(free)} are free there: "
            f"{FULL}, or {ELSEWHERE}"
        )


def told(nbytes: float) -> str:
    """As people say it."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
