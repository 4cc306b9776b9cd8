"""Writing what goes beside a checkpoint: new folders alone, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compress.errors import UserError
from compress.run_folder import whole


def write_new(folder: Path, files: Mapping[str, str]) -> Path:
    """A new folder with these files (path in it -> text). Raises UserError if there is one already, or it
    cannot be written."""
    if folder.exists():
        raise UserError(
            f"{folder} exists already: remove it, or name another (triton=FOLDER, docker=FOLDER)"
        )
    try:
        with whole(folder) as partial:
            for name, text in files.items():
                file = partial / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    return folder
