"""Figures of an original, which are the same for every candidate: kept in the user cache."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from compress.environment import environment
from compress.errors import UserError
from compress.model.folder import read_json, write_json
from compress.saved import code, sync
from compress.user_cache import cache_dir


def cache_file(kind: str, asked: list[Any], device: torch.device) -> Path:
    """Where the user cache has a figure of an original, named by all that it depends on."""
    facts = environment(device)
    key = json.dumps([*asked, code(), *(facts[k] for k in ("versions", "device", "threads"))])
    return cache_dir() / kind / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def kept(file: Path) -> dict[str, Any] | None:
    """The figure; None if there is none that can be read."""
    try:
        return read_json(file)
    except UserError:
        return None


def keep(file: Path, found: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    write_json(partial, found)
    sync(partial)
    partial.replace(file)
