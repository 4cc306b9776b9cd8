"""A run, from a recipe to a served checkpoint and a row in the table. Data flows one way, top to bottom."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from calibration.generated import generated_tokens
from calibration.texts import load_mix, load_texts
from calibration.tokens import TokenBlocks, calibration_blocks, interleave
from compress.config import STAGES, Run
from compress.environment import environment
from compress.errors import UserError
from compress.export.audit import audit, write_manifest
from compress.export.formats import FORMATS
from compress.kv_cache.stage import check as check_cache
from compress.kv_cache.stage import quantize_cache
from compress.measure import (
    check_context,
    check_tasks,
    measure_accuracy,
    measure_blocks,
    measure_context,
    measure_decode,
    measure_size,
    open_windows,
)
from compress.model.families import family_of
from compress.model.folder import ModelFolder, write_json
from compress.model.sources import open_tokenizer, resolve_model
from compress.quantize.search import budget, choose
from compress.quantize.stage import quantize, settle
from compress.report.table import METRICS, table
from compress.rotate import rotate, rotated_sizes
from compress.runtime.load import load_dense
from eval.memory import give_back, peak_cuda, peak_rss, reset_peak, rss

log = logging.getLogger(__name__)


def check(run: Run) -> None:
    """Raises UserError if the recipe does not fit its model, or a text or task does not exist.

    Reads no weights and writes no output: a sweep checks all its runs before the first one starts.
    """
    settings = run.settings
    model = ModelFolder(resolve_model(settings.model.source, settings.model.revision))
    _check_stages(run, model)
    if run.needs_data:
        _calibration(run, model)
    elif settings.data.generated:
        log.warning("no method of the recipe looks at data: data.generated is not used")
    if settings.eval is not None:
        for text in settings.eval.texts:
            load_texts(text, settings.eval.text_field, settings.eval.split)
        check_tasks(settings.eval)
    if settings.context is not None:
        check_context(settings.context, model)


def _check_stages(run: Run, model: ModelFolder) -> None:
    stages = run.settings.stages
    if "quantize" in stages:
        _check_quantize(run, model)
    if "rotate" in stages:
        rotated_sizes(model, family_of(model.config))
    if run.repair is not None:
        run.repair.check(model, run.settings.data.sequences)
    if run.cache is not None:
        check_cache(model, run.cache)


def _check_quantize(run: Run, model: ModelFolder) -> None:
    export = run.settings.export
    if FORMATS[export].half and model.dtype.itemsize != 2:
        raise UserError(
            f"export={export} holds models of bfloat16 or float16 exactly, {model.path} is "
            f"{str(model.dtype).removeprefix('torch.')}: choose export=compressed-tensors"
        )
    settle(model, family_of(model.config), run.schemes)
    if run.search is not None:
        budget(model, run.search, run.schemes)


def run_recipe(run: Run, name: str, out: Path) -> dict[str, Any]:
    """Compress, export, audit, evaluate, measure. Returns what it wrote to metrics.json.

    ``out`` gets a folder for each stage, checkpoint/, metrics.json and table.md; each appears under
    its name only when it is whole. Raises UserError before any weight is read if the recipe does not
    fit model or data.
    """
    settings = run.settings
    model = ModelFolder(resolve_model(settings.model.source, settings.model.revision))
    tokenizer = open_tokenizer(model)
    windows = {}
    if settings.eval is not None:
        windows = open_windows(settings.eval, tokenizer)
    for leftover in (out / name for name in (*STAGES, "checkpoint")):
        if leftover.exists():
            raise UserError(f"{leftover} exists already: choose another hydra.run.dir")

    compression = _compress(run, model, tokenizer, out)
    checkpoint = ModelFolder(out / "checkpoint")

    rows: dict[str, dict[str, Any]] = {
        "base": {"size": measure_size(model)},
        "candidate": {"size": measure_size(checkpoint)},
    }
    sections = _measured(run, checkpoint, model, windows, tokenizer, out / "rotate")
    compression |= sections.pop("compression", {})
    for row, found in sections.items():
        rows[row] |= found

    metrics = {
        "name": name,
        "model": {"name": settings.model.name, "fingerprint": model.fingerprint},
        "recipe": asdict(settings),
        "compression": compression,
        **rows,
        "environment": environment(run.device),
    }
    with _whole(out / METRICS) as partial:
        write_json(partial, metrics)
    _draw(compression, rows, out)
    (out / "table.md").write_text(table([metrics]), encoding="utf-8")
    return metrics


def _measured(
    run: Run,
    checkpoint: ModelFolder,
    model: ModelFolder,
    windows: dict[str, TokenBlocks],
    tokenizer: Any,
    rotated: Path,
) -> dict[str, dict[str, Any]]:
    """Sections of metrics.json for the rows ``base`` and ``candidate``, and for ``compression``."""
    settings = run.settings
    rows: dict[str, dict[str, Any]] = {"base": {}, "candidate": {}, "compression": {}}
    if settings.eval is not None:
        accuracy = measure_accuracy(
            checkpoint, model, windows, settings.eval, tokenizer, run.device
        )
        for row, found in accuracy.items():
            rows[row] |= found
        if settings.eval.block_tokens is not None and "quantize" in settings.stages:
            quantized = ModelFolder(rotated) if "rotate" in settings.stages else model
            rows["compression"]["block_kl"] = measure_blocks(
                checkpoint, quantized, windows, settings.eval, run.device
            )
    if settings.context is not None:
        log.info("measuring accuracy at length")
        at_length = measure_context(checkpoint, model, settings.context, tokenizer, run.device)
        for row, found in at_length.items():
            rows[row]["context"] = found
    if settings.speed is not None:
        log.info("measuring decode speed")
        speed = measure_decode({"base": model, "candidate": checkpoint}, settings.speed, run.device)
        for row, found in speed.items():
            rows[row]["speed"] = found
    return rows


def _draw(compression: dict[str, Any], rows: dict[str, dict[str, Any]], out: Path) -> None:
    """The pictures of a run: bits that were searched, where the loss comes from, outliers of the inputs,
    errors of the cache."""
    # Here, not above: the drawing library would be in memory while compressing.
    from compress.report import bits, blocks, context, outliers

    if "search" in compression:
        with _whole(out / bits.PICTURE) as partial:
            bits.draw_bits(compression["search"], partial)
    if compression["calibration_tokens"] is not None and "blocks" in compression:
        by_text = compression.get("block_kl")
        mean = (
            None if not by_text else [sum(v) / len(v) for v in zip(*by_text.values(), strict=True)]
        )
        with _whole(out / blocks.PICTURE) as partial:
            blocks.draw_blocks(compression["blocks"], mean, partial)
    if "outliers" in compression:
        found = compression["outliers"]
        with _whole(out / outliers.PICTURE) as partial:
            outliers.draw_outliers(found, partial)
        with _whole(out / outliers.TABLE) as partial:
            partial.write_text(outliers.outlier_table(found), encoding="utf-8")
    if "context" in rows["candidate"]:
        measured = {row: rows[row]["context"] for row in rows}
        with _whole(out / context.TABLE) as partial:
            partial.write_text(context.context_table(measured), encoding="utf-8")
        if "heads" in measured["candidate"]:
            with _whole(out / context.PICTURE) as partial:
                context.draw_heads(measured["candidate"]["heads"], partial)


def _compress(run: Run, model: ModelFolder, tokenizer: Any, out: Path) -> dict[str, Any]:
    """Run the stages, each from a folder to a folder; export the last one's record, audit it, write its
    manifest."""
    reset_peak()
    start, start_rss = time.perf_counter(), rss()
    data = _calibration(run, model)
    current, reports, seconds = model, dict[str, Any](), dict[str, float]()
    tokens, written = None if data is None else data.tokens, None
    if tokens is not None and run.settings.data.generated:
        written = _generated(run, model, tokenizer)
        seconds["generate"] = time.perf_counter() - start
        log.info(
            "the original wrote %d sequences in %.1f s",
            run.settings.data.generated,
            seconds["generate"],
        )
    for stage in run.settings.stages:
        began = time.perf_counter()
        with _whole(out / stage) as partial:
            before_repair = stage != "repair" and "repair" in run.settings.stages
            most = run.settings.data.generated_before_repair if before_repair else None
            seen = _seen(tokens, written, most)
            reports |= _STAGES[stage](run, model, current, partial, seen)
        give_back()
        current = ModelFolder(out / stage)
        seconds[stage] = time.perf_counter() - began
    origin = {
        "model": model.fingerprint,
        "data": None if data is None else data.sha256,
        "recipe": _recipe_hash(run, reports.get("scheme")),
    }
    log.info("writing the checkpoint and comparing it with the record")
    with _whole(out / "checkpoint") as partial:
        FORMATS[run.settings.export].write(current, partial)
        checked = audit(current, ModelFolder(partial))
        write_manifest(partial, origin)
    total = time.perf_counter() - start
    log.info("compressed and audited in %.1f s: %s", total, out / "checkpoint")
    return {
        "seconds": total,
        "stage_seconds": seconds,
        # In a sweep the process is not fresh: what was resident before counts in the peak.
        "start_rss": start_rss,
        "peak_rss": peak_rss(),
        "peak_cuda": peak_cuda(),
        "origin": origin,
        "calibration_tokens": None if tokens is None else list(tokens.shape),
        "generated_tokens": None if written is None else list(written.shape),
        "audit": checked,
        **reports,
    }


def _rotate(
    run: Run, model: ModelFolder, source: ModelFolder, target: Path, tokens: Tensor | None
) -> dict[str, Any]:
    return {"rotate": rotate(source, target, seed=run.settings.data.seed)}


def _quantize(
    run: Run, model: ModelFolder, source: ModelFolder, target: Path, tokens: Tensor | None
) -> dict[str, Any]:
    schemes, searched = run.schemes, dict[str, Any]()
    if run.search is not None:
        assert tokens is not None
        schemes, found = choose(source, run.search, schemes, tokens, run.device)
        searched = {"search": found}
    return searched | quantize(
        source,
        target,
        tokens=tokens,
        schemes=schemes,
        transforms=run.transforms,
        roundings=run.roundings,
        device=run.device,
    )


def _repair(
    run: Run, model: ModelFolder, source: ModelFolder, target: Path, tokens: Tensor | None
) -> dict[str, Any]:
    assert run.repair is not None
    assert tokens is not None
    return {"repair": run.repair(source, model, target, tokens, run.device)}


def _kv_cache(
    run: Run, model: ModelFolder, source: ModelFolder, target: Path, tokens: Tensor | None
) -> dict[str, Any]:
    assert run.cache is not None
    return quantize_cache(source, target, run.cache, tokens=tokens, device=run.device)


_STAGES = {"rotate": _rotate, "quantize": _quantize, "repair": _repair, "kv_cache": _kv_cache}


def _calibration(run: Run, model: ModelFolder) -> TokenBlocks | None:
    """Calibration tokens, or None if no method of the recipe looks at data."""
    if not run.needs_data:
        return None
    data = run.settings.data
    return _drawn(
        (data.source, data.field, data.split), model.path, data.sequences, data.length, data.seed
    )


@functools.lru_cache(maxsize=1)
def _drawn(
    text: tuple[str, str, str], model: Path, sequences: int, length: int, seed: int
) -> TokenBlocks:
    """Kept from the check to the run, and from run to run of a sweep."""
    return calibration_blocks(
        load_mix(*text),
        open_tokenizer(ModelFolder(model)),
        sequences=sequences,
        length=length,
        seed=seed,
    )


def _seen(tokens: Tensor | None, written: Tensor | None, most: int | None) -> Tensor | None:
    """The calibration tokens with what the original wrote among them, at most ``most`` sequences of it."""
    if tokens is None or written is None:
        return tokens
    return interleave(tokens, written[:most])


def _generated(run: Run, model: ModelFolder, tokenizer: Any) -> Tensor:
    """Calibration sequences that the original writes itself, on the CPU."""
    data = run.settings.data
    return generated_tokens(
        load_dense(model, run.device, model.dtype),
        sequences=data.generated,
        length=data.length,
        tokenizer=tokenizer,
        seed=data.seed,
    ).cpu()


def _recipe_hash(run: Run, scheme: dict[str, Any] | None) -> str:
    """Hash of what decides the checkpoint: stages, methods with their knobs, data, format."""
    settings = asdict(run.settings)
    keys = (
        "stages",
        "head",
        "search",
        "transforms",
        "rounding",
        "repair",
        "kv_cache",
        "data",
        "export",
    )
    decisive = {key: settings[key] for key in keys}
    return hashlib.sha256(json.dumps([decisive, scheme], sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Write beside, rename at the end; on any failure nothing of this process is left."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
        raise
