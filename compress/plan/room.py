"""The room that a run's folder needs on the disk, at least: what it certainly writes and has not yet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compress.config import Run
from compress.disk import check_free_bytes
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
    for export, folder in folders.items():
        if not (out / folder).exists():
            found.append(as_planned(shape, schemes, run.cache, export, searched).files)
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
            nbytes = plain.attention.parameters + plain.mlp.parameters + plain.rest.stored
            found.append(nbytes - size_of(begun))
    return [max(0.0, nbytes) for nbytes in found]
