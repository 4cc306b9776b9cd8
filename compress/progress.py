"""Progress bars for people: quiet when the output is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

from compress import processes

T = TypeVar("T")


def track(items: Iterable[T], description: str) -> Iterator[T]:
    """Iterate with a progress bar on standard error, if that is a terminal; of several processes the main one
    shows it."""
    if not (sys.stderr.isatty() and processes.is_main()):
        yield from items
        return
    total = len(items) if isinstance(items, Sized) else None
    yield from rich_track(items, description, total=total, console=Console(stderr=True))
