"""Bytes and bits of a folder, from what is on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.export.formats import FORMATS, Weights
from compress.model.families import Family, family_of
from compress.model.folder import ModelFolder, open_tensors, reading
from compress.model.skeleton import empty_model


def measure_size(folder: ModelFolder) -> dict[str, Any]:
    """Bytes on disk and bits per weight, from file headers.

    bits_linears: everything stored for the linears of the decoder blocks (codes, scales, zero
    points, shapes) over their weights; bits_file: all weight files over all parameters, a tied head
    counted once.
    """
    with reading(folder.path):
        family = family_of(folder.config)
    model = empty_model(folder, folder.dtype)
    suffixes = tuple(f".{name}" for name in family.linears)
    linears = {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if name.startswith(f"{family.blocks}.") and name.endswith(suffixes)
    }
    stored = sum(
        folder.nbytes(name)
        for name in folder.names
        if name.rpartition(".")[0] in linears and not name.endswith(".bias")
    )
    # named_parameters() names a shared tensor once; on the meta device a tie is stated by the
    # config.
    model.tie_weights()
    parameters = sum(p.numel() for p in model.parameters())
    stored += sum(map(_tensor_bytes, _beside(folder)))
    nbytes = file_bytes(folder)
    return {
        "bytes": nbytes,
        "parameters": parameters,
        "bits_linears": 8 * stored / sum(linears.values()),
        "bits_file": 8 * nbytes / parameters,
        "kept": sorted(_kept(folder, family)),
    }


def _beside(folder: ModelFolder) -> list[Path]:
    """Files with weights that only our reader looks at."""
    beside = [folder.path / f.sidecar for f in FORMATS.values() if f.sidecar is not None]
    return [file for file in beside if file.exists()]


def _tensor_bytes(file: Path) -> int:
    with open_tensors(file) as opened:
        return sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118  # no dict


def file_bytes(folder: ModelFolder) -> int:
    return sum(file.stat().st_size for file in (*folder.weight_files, *_beside(folder)))


def _kept(folder: ModelFolder, family: Family) -> Iterator[str]:
    """Weight matrices that stay as they were: embedding, head, and any linear left out."""
    weights = Weights(folder)
    if not weights.linears:
        yield "all weights"
        return
    for name in weights.names:
        module, _, part = name.rpartition(".")
        if part == "weight" and module not in weights.linears and len(folder.shape(name)) == 2:
            shared = folder.tied_head and module == family.embedding
            yield f"{module} (also the {family.head})" if shared else module
