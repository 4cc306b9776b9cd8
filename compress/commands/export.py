"""``compress export RUN export=[NAME,...]``: further formats of a finished run, from its record."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from compress.commands.words import plain
from compress.compose import compose_settings
from compress.config import check_exports, check_formats
from compress.errors import UserError
from compress.export.audit import CHECKPOINT
from compress.export.formats import FORMATS, check_fits
from compress.export.outer import check as check_outer
from compress.kv_cache.folder import scheme_of
from compress.model.folder import ModelFolder, Shapes, read_json, reading, write_json
from compress.model.shapes import ShapeFolder
from compress.order import check_order
from compress.pipeline import beside, export
from compress.plan.loadable import warnings
from compress.plan.rows import loadable_formats
from compress.quantize import record
from compress.report.table import METRICS
from compress.run_folder import held, whole
from compress.serve.card import write_cards

log = logging.getLogger(__name__)


def main(words: list[str]) -> int:
    """Writes RUN/checkpoint-NAME for each format, compared with the record, adds it to metrics.json, and
    writes the cards anew."""
    parser = argparse.ArgumentParser("compress export", description=plain(__doc__))
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("formats", metavar="export=[NAME,...]", help=f"of {', '.join(FORMATS)}")
    asked = parser.parse_args(words)
    if not asked.formats.startswith("export="):
        raise UserError(f"{asked.formats} is not export=NAME or export=[NAME,...]")
    settings = compose_settings([asked.formats])
    check_exports(settings)
    names = list(settings.export)
    if not (asked.run / METRICS).exists():
        raise UserError(f"{asked.run} holds no finished run: there is no {METRICS}")
    with held(asked.run):
        metrics = read_json(asked.run / METRICS)
        with reading(asked.run / METRICS):
            stages, origin = metrics["recipe"]["stages"], metrics["compression"]["origin"]
            # They are names of folders of the run.
            check_order(stages)
        source = ModelFolder(asked.run / stages[-1])
        # What the model is beside its language part is in every format.
        original = ModelFolder(asked.run / CHECKPOINT)
        check(source, names)
        check_outer(stages, names, original)
        for name in names:
            _check_free(asked.run, name, metrics)
        for name in names:
            _, made = export(name, source, asked.run, beside(name), origin, original)
            metrics["exports"] = {**metrics.get("exports", {}), name: made}
            with whole(asked.run / METRICS) as partial:
                write_json(partial, metrics)
                # The card of checkpoint/ has the original's licence. Before the format counts as there.
                write_cards(metrics, ModelFolder(asked.run / CHECKPOINT), asked.run)
            bits, size = made["size"]["bits_linears"], made["size"]["bytes"] / 1e6
            print(
                f"{asked.run / made['folder']}: {size:.1f} MB, {bits:.2f} bits a weight in linears, compared "
                "with the record"
            )
    return 0


def check(source: ModelFolder, names: list[str]) -> None:
    """Raises UserError if a format does not hold what a record or plain folder does; warns of engines that
    load none of them."""
    cache, schemes = scheme_of(source), None
    linears: dict[str, tuple[int, ...]] = {}
    if record.KEY in source.config:
        schemes = record.schemes_of(source)
        linears = {name: source.shape(f"{name}.codes") for name in record.linears(source)}
    check_formats(names, schemes, cache)
    shapes: Shapes = source
    if schemes is not None:
        # With the names and widths that a record stores otherwise.
        shapes = ShapeFolder(str(source.path), source.config)
    for name in names:
        check_fits(name, shapes, schemes, linears)
    sixteen = ShapeFolder(str(source.path), source.config)
    for line in warnings(loadable_formats(names, sixteen, schemes, cache)):
        log.warning("not for every engine: %s", line)


def _check_free(run: Path, name: str, metrics: dict[str, Any]) -> None:
    """Raises UserError if the run has the format already, or something else in its place."""
    folder = run / beside(name)
    known = metrics.get("exports", {}).get(name)
    if known is not None:
        raise UserError(f"{run / known['folder']} has this run as {name} already: leave it out")
    # With its report it is what was made when metrics.json was not written yet.
    if folder.exists() and not folder.with_name(f"{folder.name}.json").exists():
        raise UserError(f"{folder} is there already: move it, or leave {name} out")
