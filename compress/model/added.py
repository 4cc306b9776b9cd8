"""Families that a person added: JSON files in a folder of the user's settings, one a family.

A file holds the fields of ``families.Family`` that are not as by default: texts, lists of texts, tables of
texts, ``inputs`` and ``experts`` as objects of their own fields. ``compress families --probe`` writes one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

from compress.errors import UserError
from compress.model.families import FAMILIES, Experts, Family, Input, family_of
from compress.model.folder import read_json, write_json

# Fields that a file does not set.
OURS = ("when", "twins")


def families_dir() -> Path:
    """``$XDG_CONFIG_HOME/compress/families``, or ``~/.config/compress/families``."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "compress" / "families"


def added() -> list[Family]:
    """Those of the folder, by the names of their files. Raises UserError for one that holds none."""
    return [read_family(file) for file in sorted(families_dir().glob("*.json"))]


def digest_of(config: Mapping[str, Any]) -> str | None:
    """SHA-256 of the family of a config.json, if a person added it: another file may make another model of
    the same folder."""
    family = family_of(dict(config))
    if family in FAMILIES:
        return None
    return hashlib.sha256(json.dumps(_told(family), sort_keys=True).encode()).hexdigest()


def read_family(path: Path) -> Family:
    """Raises UserError, with the key, for a file that holds no family."""
    found = read_json(path)
    try:
        return _made(Family, found)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def write_family(path: Path, family: Family) -> None:
    """What of it is not as by default."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, _told(family))


def _told(value: Any) -> dict[str, Any]:
    found = {}
    for part in fields(value):
        own = getattr(value, part.name)
        default = part.default if part.default_factory is MISSING else part.default_factory()
        if own == default or part.name in OURS:
            continue
        if part.name == "inputs":
            own = [_told(shared) for shared in own]
        elif isinstance(own, Experts):
            own = asdict(own)
        found[part.name] = own
    return found


def _made(kind: Any, found: Any) -> Any:
    """An object of this dataclass. Raises ValueError for keys and values that it does not have."""
    if not isinstance(found, dict):
        raise ValueError(f"{found!r} is no object")
    hints = get_type_hints(kind)
    known = [part.name for part in fields(kind) if part.name not in OURS]
    for key in found:
        if key not in known:
            raise ValueError(f"{key} is not known: known are {', '.join(known)}")
    values = {key: _value(key, hints[key], value) for key, value in found.items()}
    needed = [p.name for p in fields(kind) if p.default is p.default_factory is MISSING]
    if missing := [key for key in needed if key not in values]:
        raise ValueError(f"{missing[0]} is missing")
    return kind(**values)


def _value(key: str, hint: Any, value: Any) -> Any:
    if hint == tuple[Input, ...] and isinstance(value, list):
        return tuple(_made(Input, inner) for inner in value)
    if hint == (Experts | None):
        return None if value is None else _made(Experts, value)
    if hint == tuple[str, ...] and isinstance(value, list) and all(map(_is_text, value)):
        return tuple(value)
    if hint == Mapping[str, str] and isinstance(value, dict) and all(map(_is_text, value.values())):
        return value
    if hint == (str | None) and (value is None or _is_text(value)):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (str, bool) and type(value) is hint:
        return value
    raise ValueError(f"{key}={value!r} is not of its kind")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
