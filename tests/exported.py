"""A model as it would be served: rounded to nearest, without data, in compressed-tensors."""

from __future__ import annotations

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
