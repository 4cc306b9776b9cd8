"""What a number depends on beside the recipe: versions, device, commit, date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("compress", "torch", "transformers", "safetensors", "lm-eval", "datasets", "hydra-core")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and date, for metrics.json."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's model and core count as the system tells them."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    """The installed version of a package; None if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cache_dir() -> Path:
    """The user cache of this project: ``$XDG_CACHE_HOME/compress`` or ``~/.cache/compress``."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(base).expanduser() / "compress"
    path.mkdir(parents=True, exist_ok=True)
    return path


def _commit() -> str | None:
    """The commit of this source tree; None for an installed copy."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
