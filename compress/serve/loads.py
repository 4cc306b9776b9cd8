"""Which engines load a folder, and which folder of a run an engine takes.

The rules are those of ``compress.plan.loadable``; whatever asks about a folder asks ``answers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compress.engines import ENGINES, LLAMA_CPP
from compress.errors import UserError
from compress.export.audit import CHECKPOINT
from compress.model.folder import ModelFolder, read_json
from compress.plan.rows import loadable_folder
from compress.quantize.record import KEY


@dataclass(frozen=True)
class Answer:
    """Whether an engine loads a folder. reasons: why not; notes: what to know where it does; proved: where
    such a checkpoint was loaded (engines.Proof), None: read in the engine's source and not run"""

    version: str
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    proved: str | None = None

    @property
    def loads(self) -> bool:
        return not self.reasons


def answers(path: Path, tp: int = 1) -> dict[str, Answer]:
    """engine -> whether it loads the folder on ``tp`` devices, for all of ENGINES. Raises UserError for a
    folder that is not understood here."""
    if gguf_of(path) is not None and not (path / "config.json").exists():
        # Of others, and nothing is known of what is in it.
        reasons = (f"{path.name} holds a GGUF file alone, which llama.cpp reads",)
        others = {name: Answer(engine.version, reasons) for name, engine in ENGINES.items()}
        return others | {LLAMA_CPP: Answer(ENGINES[LLAMA_CPP].version)}
    found = {}
    for name, told in loadable_folder(ModelFolder(path), tp).items():
        reasons, notes = (tuple(e["text"] for e in told[key]) for key in ("reasons", "notes"))
        found[name] = Answer(told["version"], reasons, notes, told["proved"])
    return found


def gguf_of(folder: Path) -> Path | None:
    """The GGUF file of a folder; None if it has none. Raises UserError if there are several."""
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{folder} holds {len(files)} GGUF files, one is needed")
    return files[0] if files else None


def checkpoints(folder: Path) -> list[Path]:
    """The folders that can be served: of a run its checkpoint/ and then those of other formats, else the
    folder itself. Raises UserError if there is none."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    found = [folder / CHECKPOINT, *sorted(folder.glob(f"{CHECKPOINT}-*"))]
    # Beside them may be what a killed process left, and files of containers.
    found = [path for path in (*found, folder) if path.suffix != ".partial" and _is_model(path)]
    if found == [folder] and _is_record(folder):
        raise UserError(f"{folder} is the record of a run, which no engine reads: serve the run")
    if found:
        return found
    raise UserError(f"{folder} is neither a run with a {CHECKPOINT}/ nor a model folder")


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").exists() or (folder.is_dir() and gguf_of(folder) is not None)


def _is_record(folder: Path) -> bool:
    config = folder / "config.json"
    return config.exists() and KEY in read_json(config)


def place(folders: Mapping[Path, Mapping[str, Answer]], engine: str) -> tuple[Path, Answer]:
    """The first folder that an engine loads; if it loads none, the first one and what is in the way."""
    for path, found in folders.items():
        if found[engine].loads:
            return path, found[engine]
    first = next(iter(folders))
    return first, folders[first][engine]
