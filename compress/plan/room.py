"""The room that a run's folder needs on the disk, at least: what it certainly writes and has not yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from compress.config import Run
from compress.disk import check_free_bytes
from compress.export import gguf
from compress.export.shards import SHARD_BYTES
from compress.model.families import family_of
from compress.model.folder import Shapes
from compress.plan.checkpoint import as_planned
from compress.quantize.stage import settle
from compress.saved import size_of

# Stages that write a plain folder of their own; that of kv_cache is links.
PLAIN = ("prune", "distill", "rotate")


def check_room(run: Run, shapes: Sequence[Shapes], out: Path, folders: dict[str, str]) -> None:
    """Raises DiskError if what is missing in ``out`` certainly does not fit.

    shapes: of the last stage's model, all that pruning may choose from; folders: format -> its folder
    """
    least = min(sum(_missing(run, shape, out, folders)) for shape in shapes)
    check_free_bytes(out, least, "what this run writes")


def _missing(run: Run, shape: Shapes, out: Path, folders: dict[str, str]) -> list[float]:
    """Least bytes of each folder that is not there."""
    settings, found = run.settings, list[float]()
    schemes = None
    if "quantize" in settings.stages:
        schemes = settle(shape, family_of(shape.config), run.schemes)
    # Where bits are searched, what a linear takes is not known before: not counted.
    searched = None if run.search is None else 0.0
    twice = 0.0
    for export, folder in folders.items():
        if not (out / folder).exists():
            files = as_planned(shape, schemes, run.cache, export, searched).files
            found.append(files)
            # Of the last one: all else is there by then.
            twice = 0.0 if export == gguf.NAME else _twice(files, shape)
    found.append(twice)
    for stage in settings.stages:
        if (out / stage).exists() or stage == "kv_cache":
            continue
        plain, begun = as_planned(shape, None), out / f"{stage}.state"
        if stage in PLAIN:
            # A distillation of a record writes a record.
            if not ("quantize" in settings.stages and stage == "distill"):
                found.append(plain.files - size_of(begun))
        else:
            # A record has a byte a weight.
            nbytes = sum(part.parameters for part in plain.linears) + plain.rest.stored
            found.append(nbytes - size_of(begun))
    return [max(0.0, nbytes) for nbytes in found]


def _twice(files: float, shape: Shapes) -> float:
    """The least that is on the disk twice at some time while an export of so many bytes is written: a file
    gets its tensors when its header is known (``TensorFile``), and of a single one these are all."""
    if files <= SHARD_BYTES:
        return files
    largest = max(math.prod(shape.shape(name)) for name in shape.names) * shape.dtype.itemsize
    # The file before the last one has at least so much, and the last one counts if it has half of that.
    return max(0.0, SHARD_BYTES - largest) / 2
