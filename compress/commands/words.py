"""Words such as KEY=VALUE of the verbs that do not read a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from compress.errors import UserError


def plain(doc: str | None) -> str:
    """A docstring as a terminal shows it."""
    return (doc or "").replace("``", "")


def read_pairs(words: Iterable[str], keys: Sequence[str]) -> dict[str, str]:
    """Key -> value, the last of several. Raises UserError for a word of another key or without a value."""
    given = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in keys or not value:
            raise UserError(f"{word} is not KEY=VALUE with a key of {', '.join(keys)}")
        given[key] = value
    return given


def truth(key: str, value: str) -> bool:
    """Raises UserError for what is neither true nor false."""
    if value not in ("true", "false"):
        raise UserError(f"{key}={value} is not allowed: choose true or false")
    return value == "true"
