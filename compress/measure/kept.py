"""Figures of an original, which are the same for every candidate: kept in the user cache."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from compress.environment import environment
from compress.model.folder import file_sha256, write_json
from compress.user_cache import cache_dir


def cache_file(kind: str, asked: list[Any], device: torch.device) -> Path:
    """Where the user cache has a figure of an original, named by all that it depends on."""
    facts = environment(device)
    key = json.dumps([*asked, _code(), *(facts[k] for k in ("versions", "device", "threads"))])
    return cache_dir() / kind / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


@functools.cache
def _code() -> list[str]:
    """A hash of each file that computes: a commit does not tell of changed files, nor an installed copy of a
    commit."""
    root = Path(__file__).parents[2]
    folders = (root / name for name in ("calibration", "compress", "eval"))
    files = sorted(
        f for folder in folders for end in ("py", "cpp") for f in folder.rglob(f"*.{end}")
    )
    return [file_sha256(file) for file in files]


def keep(file: Path, found: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    write_json(partial, found)
    partial.replace(file)
