"""What the remote sources of a run stood at when they were first looked at: a name on the hub at a commit, a
URL at a state of its files.

Asked once, kept for the process, recorded in run.json: every later step reads the same, and so does a run
that goes on after a branch has moved.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

_known: dict[str, str] = {}
# A commit, or the digest of a listing; it names a folder.
PIN = re.compile(r"[0-9a-f]{40,64}")


def known(source: str) -> str | None:
    """The pin of a source, if it has one yet."""
    return _known.get(source)


def pinned(source: str, ask: Callable[[], str]) -> str:
    """The pin of a source, asked for if it has none."""
    if source not in _known:
        _known[source] = ask()
    return _known[source]


def remember(found: Mapping[str, object]) -> None:
    """Take over pins that a run recorded; what is none is left out, as the file may be anybody's."""
    _known.update(
        {source: p for source, p in found.items() if isinstance(p, str) and PIN.fullmatch(p)}
    )


def forget(source: str) -> None:
    """Ask anew for a source whose pin cannot be had any more."""
    _known.pop(source, None)
