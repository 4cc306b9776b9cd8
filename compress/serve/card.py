"""Writes the model card into every exported folder of a run, with the commands that serve it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.engines import TENSORRT, TRANSFORMERS
from compress.errors import UserError
from compress.export.audit import CHECKPOINT, MANIFEST, add_text
from compress.hub import key
from compress.model.card import CARD, licence_of
from compress.model.folder import ModelFolder
from compress.model.sources import is_hub_name
from compress.plan.rows import served_folder
from compress.report.card import Base, Serving, model_card
from compress.serve.command import PROGRAMS, name_of_run, serve_command
from compress.serve.loads import answers, checkpoints

# What commands of a card call the folder, which is elsewhere by then.
FOLDER = Path("FOLDER")


def write_cards(metrics: Mapping[str, Any], model: ModelFolder, out: Path) -> None:
    """README.md in checkpoint/ and the folders of other formats, and its line in their manifests.

    metrics: all of metrics.json; model: the original
    """
    named = metrics["recipe"]["model"]
    source = named["source"] if is_hub_name(named["source"]) else None
    # Runs of before have none.
    commit = metrics.get("pins", {}).get(key("model", named["source"], named.get("revision")))
    base = Base(metrics["model"]["name"], source, licence_of(model.path), commit)
    for folder in checkpoints(out):
        if (folder / MANIFEST).exists():
            text = model_card(
                metrics,
                base,
                serving(folder, name_of_run(metrics)),
                title=name_of_run(metrics),
                format_name=served_folder(ModelFolder(folder)).export,
                measured=folder.name == CHECKPOINT,
            )
            add_text(folder, CARD, text)


def serving(folder: Path, name: str) -> list[Serving]:
    """The command of every engine that loads a folder, which it calls FOLDER."""
    found = []
    for engine, answer in answers(folder).items():
        if not answer.loads:
            continue
        named = None if engine in (TRANSFORMERS, TENSORRT) else name
        try:
            command = serve_command(
                engine, folder, name=named, program=PROGRAMS.get(engine), place=FOLDER
            )
        except UserError:
            # It loads such a folder, but its server does not.
            continue
        proved = f"such a checkpoint was {answer.proved}" if answer.proved else "not run"
        notes = (proved, *answer.notes, *command.notes)
        found.append(Serving(f"{engine} {answer.version}", command.line(), notes))
    return found
