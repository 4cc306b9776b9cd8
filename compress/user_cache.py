"""Where this project keeps what it can make again: fetched models, texts, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The user cache of this project: ``$XDG_CACHE_HOME/compress`` or ``~/.cache/compress``."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(base).expanduser() / "compress"
    path.mkdir(parents=True, exist_ok=True)
    return path
