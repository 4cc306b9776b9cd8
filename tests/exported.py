"""A model as it would be served: rounded to nearest, without data, in compressed-tensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from compress.export import compressed_tensors
from compress.model.folder import ModelFolder
from compress.quantize.rounding import Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize


def exported(model: ModelFolder, schemes: Schemes | Scheme, path: Path) -> ModelFolder:
    quantize(
        model,
        path / "record",
        tokens=None,
        schemes=Schemes(schemes) if isinstance(schemes, Scheme) else schemes,
        transforms=[],
        roundings=[Nearest()],
        device=torch.device("cpu"),
    )
    compressed_tensors.write(ModelFolder(path / "record"), path / "out")
    return ModelFolder(path / "out")


def checkpoint_bytes(run: Path) -> dict[str, bytes]:
    """The files of a run's checkpoint/ without the card, which has a date and comes last, and the manifest's
    line of it."""
    files = {file.name: file.read_bytes() for file in sorted((run / "checkpoint").iterdir())}
    manifest = json.loads(files.pop("manifest.json"))
    for held in (files, manifest["files"]):
        held.pop("README.md", None)
    assert set(manifest["files"]) == set(files)
    return {**files, "manifest.json": json.dumps(manifest).encode()}
