"""A run, from a recipe to a served checkpoint and a row in the table. Data flows one way, top to bottom."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from calibration.generated import generated_tokens
from calibration.texts import load_mix, parts_of
from calibration.texts import pin_of as text_pin_of
from calibration.tokens import TokenBlocks, calibration_blocks, interleave
from compress import pins, processes
from compress.config import Run
from compress.distill.knobs import check_schemes
from compress.distill.stage import check_launch, open_accelerator
from compress.engines import TRANSFORMERS
from compress.environment import environment, version_of
from compress.errors import UserError
from compress.export import gguf
from compress.export.audit import CHECKPOINT, audit, write_manifest
from compress.export.formats import FORMATS, Weights, check_fits
from compress.export.outer import check as check_outer
from compress.export.outer import dress
from compress.kv_cache.stage import check as check_cache
from compress.measure.accuracy import (
    check_texts,
    measure_accuracy,
    measure_blocks,
    open_windows,
)
from compress.measure.context import check_context, measure_context
from compress.measure.parts import Parts
from compress.measure.size import measure_size
from compress.measure.speed import check_engines, check_lengths, measure_decode, points_of
from compress.measure.speed import engines_of as speed_engines
from compress.measure.tasks import check_tasks
from compress.model.added import digest_of
from compress.model.check import check_model, check_tokens
from compress.model.families import NO_LOGITS, family_of, has_logits_of_head
from compress.model.folder import (
    ModelFolder,
    Shapes,
    file_sha256,
    read_json,
    save_tensors,
    write_json,
)
from compress.model.sources import open_tokenizer, pin_of, resolve_model
from compress.pictures import draw
from compress.plan.hardware import hardware_here
from compress.plan.loadable import refusals, warnings
from compress.plan.predict import predict
from compress.plan.room import check_room
from compress.plan.rows import engines_of
from compress.plan.whole import check_memory
from compress.prune.preview import previews
from compress.prune.stage import check as check_prune
from compress.quantize import record
from compress.quantize.search import budget
from compress.quantize.stage import check_roundings, linear_names, settle
from compress.report.table import METRICS, table
from compress.report.verdict import verdict
from compress.rotate import rotated_sizes
from compress.run_folder import (
    MEASURED,
    RUN,
    Step,
    check_unheld,
    keep_same,
    made,
    opened,
    step,
    whole,
)
from compress.runtime.load import load_dense
from compress.saved import Saved, changes, code, cost_of, here, sync
from compress.serve.card import write_cards
from compress.stages import Work, run_stage, training_text
from eval.memory import reset_peak, rss
from eval.task_scores import task_sources

log = logging.getLogger(__name__)

# Steps of a run beside its stages: text that the original writes, in one file, and the export.
GENERATE, WRITTEN = "generate", "tokens.safetensors"
# Settings that decide what a stage leaves, beside the text that it looks at.
KNOBS_OF = {
    "prune": ("prune",),
    "distill": ("distill",),
    "rotate": (),
    "quantize": ("scheme", "head", "search", "transforms", "rounding"),
    "repair": ("repair",),
    "kv_cache": ("kv_cache",),
}
# With others of these the same recipe may come out otherwise.
DECISIVE_VERSIONS = ("compress", "torch", "transformers", "safetensors")
# What sources that are elsewhere stand at, in run.json and metrics.json.
PINS = "pins"


def check(run: Run, out: Path | None = None) -> None:
    """Raises UserError if the recipe does not fit its model, a text or task does not exist, or ``out`` holds
    an unfinished run that another process works on.

    Writes no output, and reads no weights but to tell what is there by their hash: a sweep checks all its
    runs before the first one starts.
    """
    run = _pinned(run, out)
    settings = run.settings
    model = ModelFolder(resolve_model(**_named(run)))
    _check_folder(run, model)
    _check_processes(run)
    unserved = _check_stages(run, model)
    check_memory(run, model)
    if run.needs_data:
        _calibration(run, model)
    elif settings.data.generated:
        log.warning("no method of the recipe looks at data: data.generated is not used")
    if settings.eval is not None:
        check_texts(settings.eval, model)
        check_tasks(settings.eval, model)
    if settings.context is not None:
        check_context(settings.context, model)
    if settings.speed is not None:
        check_engines(settings.speed)
        check_lengths({"the model": model}, settings.speed)
        speed_engines(settings.speed, {"the model": model})
    if out is not None and (out / RUN).exists():
        check_unheld(out)
        _check_taken(run, out, _fingerprints(run, _decisive(run, model)))
    for line in unserved:
        log.warning("not for every engine: %s", line)


def _named(run: Run) -> dict[str, Any]:
    """How a recipe names its model."""
    model = run.settings.model
    return {"source": model.source, "revision": model.revision, "allow_pickle": model.allow_pickle}


def _pinned(run: Run, out: Path | None) -> Run:
    """The run with what its sources that are elsewhere stand at: what ``out`` recorded of an earlier start,
    though a branch may have moved since, and else what is found now. Raises UserError for one that cannot be
    had."""
    settings = run.settings
    with contextlib.suppress(UserError):
        # One that was killed before it was written has none.
        recorded = read_json(out / RUN).get(PINS) if out is not None else None
        pins.remember(recorded if isinstance(recorded, dict) else {})
    resolve_model(**_named(run))
    texts = list[str]()
    if run.needs_data or run.distill is not None:
        texts += parts_of(settings.data.source)
    if settings.eval is not None:
        texts += settings.eval.texts
    if settings.context is not None:
        texts.append(settings.context.text)
    found = [pin_of(settings.model.source, settings.model.revision), *map(text_pin_of, texts)]
    return replace(run, pins={source: pin for one in found for source, pin in one.items()})


def _check_folder(run: Run, model: ModelFolder) -> None:
    """Raises UserError for a folder whose files do not fit its config.json."""
    quantized = record.KEY in model.config or model.config.get("quantization_config") is not None
    if quantized and "quantize" in run.settings.stages:
        # Told as what it is, below.
        return
    weights = Weights(model)
    check_model(model, weights.names, plain=weights.format == "plain")


def _check_taken(run: Run, out: Path, fingerprints: dict[str, dict[str, Any]]) -> None:
    """Raises UserError if an earlier start made checkpoint/ of the same in another format than the first one
    of now."""
    if not (out / CHECKPOINT).exists():
        return
    try:
        checkpoint = made(out, CHECKPOINT)
    except UserError:
        # It is made anew, with a warning.
        return
    found, same = checkpoint.report["format"], checkpoint.fingerprint == fingerprints[CHECKPOINT]
    if same and found != run.first_format:
        raise UserError(
            f"{out / CHECKPOINT} is there in {found} already: name that first, as in "
            f"export=[{found},{run.first_format}], or choose another hydra.run.dir"
        )


def _check_processes(run: Run) -> None:
    """Several processes share no GPU, and train where their launcher put them."""
    wanted = processes.device_type()
    if processes.count() > 1 and (run.device.type != wanted or run.device.index is not None):
        raise UserError(
            f"device={run.settings.device} is not where {processes.count()} processes were started: choose "
            f"device={wanted}"
        )
    if run.needs_data and run.settings.data.sequences < processes.count():
        raise UserError(
            f"data.sequences={run.settings.data.sequences} cannot be shared by {processes.count()} "
            "processes: choose as many or more, or start fewer"
        )
    if processes.count() > 1 and run.distill is not None:
        check_launch(open_accelerator(run.device), run.distill)


def _check_stages(run: Run, model: ModelFolder) -> list[str]:
    """Returns what to warn of."""
    if run.settings.data.all_experts and family_of(model.config).experts is None:
        raise UserError(
            f"data.all_experts=true is for models with experts, which type {model.config['model_type']} has "
            "none of: leave it out"
        )
    sequences = run.settings.data.sequences
    shapes: list[Shapes] = [model]
    if run.prune is not None:
        check_prune(model, run.prune, sequences)
        shapes = list(previews(model, run.prune))
    if run.distill is not None:
        stages = run.settings.stages
        if run.distill.hidden and "rotate" in stages[: stages.index("distill")]:
            raise UserError(
                "distill.hidden compares states of the original with those of a rotated model, which point "
                "elsewhere: leave out rotate or distill.hidden"
            )
        blocks = training_text(run, model).tokens
        run.distill.check(model, run.device, blocks, processes.count())
    if run.repair is not None:
        run.repair.check(model, sequences)
    check_outer(run.settings.stages, run.settings.export, model)
    for shape in shapes:
        check_shape(run, shape)
    return _check_engines(run, model, shapes)


def _check_engines(run: Run, model: ModelFolder, shapes: list[Shapes]) -> list[str]:
    """Raises UserError if an engine of serve.engines would not load what is written. Without serve.engines
    returns what to warn of. shapes: of all candidates that pruning may choose from"""
    given = [engines_of(run, shape) for shape in shapes]
    wanted = run.settings.serve.engines
    broken = [line for engines in given for line in refusals(engines, wanted)]
    if broken:
        raise UserError("; ".join(dict.fromkeys(broken)))
    _check_measuring(run, model, given[0][run.first_format])
    return [] if wanted else warnings(given[0])


def _check_measuring(run: Run, model: ModelFolder, given: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UserError if transformers is to measure a checkpoint that it does not read. given: by engine"""
    answer, asked = given[TRANSFORMERS], list[str]()
    settings = run.settings
    speed = settings.speed
    if speed is not None and TRANSFORMERS in speed_engines(speed, {"the model": model}):
        asked.append("speed=none")
    if settings.eval is not None and settings.eval.tasks and settings.eval.engine == TRANSFORMERS:
        asked.append("another eval.engine")
    if asked and not answer["loads"]:
        reasons = "; ".join(reason["text"] for reason in answer["reasons"])
        raise UserError(
            f"transformers {answer['version']} is to measure this checkpoint and {reasons}; or choose "
            f"{' and '.join(asked)}"
        )


def check_shape(run: Run, model: Shapes) -> None:
    """Raises UserError if the stages do not fit a model of this shape."""
    stages, family = run.settings.stages, family_of(model.config)
    settled, linears = None, dict[str, tuple[int, ...]]()
    if "quantize" in stages:
        linears = {name: model.shape(f"{name}.weight") for name in linear_names(model, family)}
        settled = settle(model, family, run.schemes)
        check_roundings(run.roundings, model.config)
        if run.search is not None:
            budget(model, run.search, run.schemes)
            if gguf.NAME in run.settings.export:
                gguf.check_search(model, settled, run.search.bits)
        if run.distill is not None and "distill" in stages[stages.index("quantize") :]:
            check_schemes(run.schemes)
    for name in run.settings.export:
        check_fits(name, model, settled, linears)
    if "rotate" in stages:
        rotated_sizes(model, family)
    if run.cache is not None:
        check_cache(model, run.cache)


def finished_before(run: Run, out: Path) -> dict[str, Any]:
    """What the finished run in ``out`` wrote to metrics.json. Raises UserError if this one may end otherwise:
    with another recipe, model, text, or version of this program."""
    run = _pinned(run, out)
    metrics, decisive = read_json(out / METRICS), read_json(out / RUN)
    now = _decisive(run, ModelFolder(resolve_model(**_named(run))))
    known, asked = (
        {**decisive, "recipe": metrics.get("recipe")},
        {**now, "recipe": asdict(run.settings)},
    )
    if changed := changes(known, json.loads(json.dumps(asked))):
        raise UserError(f"{out} was made otherwise: {changed}")
    return metrics


def run_recipe(run: Run, name: str, out: Path, *, last: bool = True) -> dict[str, Any]:
    """Compress, export, audit, evaluate, measure. Returns what it wrote to metrics.json.

    ``out`` gets a folder for each stage, checkpoint/ in the first format, checkpoint-NAME/ in each other,
    metrics.json and table.md; each appears under its name only when it is whole. What a killed run left in
    ``out`` is taken over as far as this one would make the same. Raises UserError before any weight is
    computed with if the recipe does not fit model or data, or ``out`` holds something else.
    """
    run = _pinned(run, out)
    settings = run.settings
    model = ModelFolder(resolve_model(**_named(run)))
    tokenizer = open_tokenizer(model)
    windows = {}
    if settings.eval is not None:
        windows = open_windows(settings.eval, tokenizer)
        for blocks in windows.values():
            check_tokens(blocks.tokens, model)
    decisive = _decisive(run, model)
    with opened(out, decisive):
        fingerprints = _fingerprints(run, decisive)
        keep_same(out, fingerprints)
        _check_taken(run, out, fingerprints)
        shapes = [model] if run.prune is None else list(previews(model, run.prune))
        check_room(run, shapes, out, _folders(settings.export))
        compression, exports = _compress(run, model, tokenizer, out, fingerprints)
        if last:
            processes.release(0)
        checkpoint = ModelFolder(out / CHECKPOINT)
        rows: dict[str, dict[str, Any]] = {
            "base": {"size": measure_size(model)},
            "candidate": {"size": measure_size(checkpoint)},
        }
        sections = _measured(run, checkpoint, model, windows, tokenizer, out)
        compression |= sections.pop("compression", {})
        measuring = sections.pop("measuring")
        for row, found in sections.items():
            rows[row] |= found
        judged = verdict(rows["candidate"], rows["base"], settings.gate.limits)
        if judged is not None:
            rows["candidate"]["verdict"] = judged
            log.info("verdict: %s", judged["text"])

        metrics = {
            "name": name,
            "model": {"name": settings.model.name, "fingerprint": model.fingerprint},
            PINS: run.pins,
            "recipe": asdict(settings),
            "compression": compression,
            "exports": exports,
            "measuring": measuring,
            **rows,
            "environment": environment(run.device),
        }
        with whole(out / METRICS) as partial:
            write_json(partial, metrics)
            # Before the run counts as finished: one that is killed here goes on.
            write_cards(metrics, model, out)
            draw(compression, rows, out)
            (out / "table.md").write_text(table([metrics]), encoding="utf-8")
            # Finished is what is on the disk, all of it.
            sync(out)
        shutil.rmtree(out / MEASURED, ignore_errors=True)
    return metrics


def _measured(
    run: Run,
    checkpoint: ModelFolder,
    model: ModelFolder,
    windows: dict[str, TokenBlocks],
    tokenizer: Any,
    out: Path,
) -> dict[str, dict[str, Any]]:
    """Sections of metrics.json: rows ``base`` and ``candidate``, what joins ``compression``, ``measuring``.
    What an earlier start measured is not measured again."""
    settings, start = run.settings, time.perf_counter()
    rows: dict[str, dict[str, Any]] = {"base": {}, "candidate": {}, "compression": {}}
    folders = {"checkpoint": checkpoint.fingerprint, "model": model.fingerprint}
    parts = Parts(Saved(out / MEASURED, folders | here(run.device)))
    files = _companions(model)
    if settings.eval is not None:
        asked = [asdict(settings.eval), {text: w.sha256 for text, w in windows.items()}]
        accuracy = measure_accuracy(
            checkpoint,
            model,
            windows,
            settings.eval,
            tokenizer,
            run.device,
            parts.of("accuracy", [*asked, files, task_sources()]),
        )
        for row, found in accuracy.rows.items():
            rows[row] |= found
        accuracy.write(out)
        told = settings.eval.block_tokens is not None and "quantize" in settings.stages
        if told and not has_logits_of_head(model.config):
            log.info(
                "the loss of single blocks is not measured for models of this type: %s", NO_LOGITS
            )
        elif told:
            quantized = _quantized(settings.stages, model, out)
            rows["compression"]["block_kl"] = measure_blocks(
                checkpoint,
                quantized,
                windows,
                settings.eval,
                run.device,
                parts.of("blocks", asked),
            )
    if settings.context is not None:
        log.info("measuring accuracy at length")
        at_length = measure_context(
            checkpoint,
            model,
            settings.context,
            tokenizer,
            run.device,
            parts.of("context", [asdict(settings.context), files]),
        )
        for row, found in at_length.items():
            rows[row]["context"] = found
    if settings.speed is not None:
        log.info("measuring decode speed")
        speed = measure_decode(
            {"base": model, "candidate": checkpoint},
            settings.speed,
            run.device,
            parts.of("speed", asdict(settings.speed)),
        )
        for row, engines in speed.items():
            first, *others = engines.values()
            rows[row]["speed"] = {**first, "other_engines": others}
        _add_predicted(rows, {"base": model, "candidate": checkpoint}, run)
    # Of a run that was killed and went on: this process.
    cost = cost_of(out / MEASURED)
    rows["measuring"] = {
        "seconds": time.perf_counter() - start,
        "resumed": parts.taken,
        "state": None if cost is None else asdict(cost),
    }
    return rows


def _add_predicted(
    rows: dict[str, dict[str, Any]], folders: dict[str, ModelFolder], run: Run
) -> None:
    """What the first point of the speed measurement would be by this device's roofline, if it is known."""
    speed, hardware = run.settings.speed, hardware_here(run.device)
    if speed is None or hardware is None:
        return
    if "plan" in family_of(folders["base"].config).refuses:
        log.info("speed is not predicted for models of this type: see compress families")
        return
    point = points_of(speed)[0]
    if point.least_input is not None:
        # Of a mix of sizes there is no one step.
        return
    for row, folder in folders.items():
        rows[row]["predicted"] = predict(folder, hardware, point)


def _quantized(stages: list[str], model: ModelFolder, out: Path) -> ModelFolder:
    """The folder that was quantized: what the stage before left, or the original."""
    before = stages[: stages.index("quantize")]
    return ModelFolder(out / before[-1]) if before else model


def _compress(
    run: Run,
    model: ModelFolder,
    tokenizer: Any,
    out: Path,
    fingerprints: dict[str, dict[str, Any]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the stages, each from a folder to a folder; export the last one's record in every format, audit it,
    write its manifest. Returns the sections ``compression`` and ``exports`` of metrics.json."""
    reset_peak()
    start, start_rss = time.perf_counter(), rss()
    data = _calibration(run, model)
    tokens, written = None if data is None else data.tokens, None
    steps: dict[str, Step] = {}
    if GENERATE in fingerprints:
        own = fingerprints[GENERATE]
        steps[GENERATE] = step(
            out,
            GENERATE,
            lambda target, state: _generate(run, model, tokenizer, target, _saved(run, state, own)),
            own,
        )
        written = load_file(out / GENERATE / WRITTEN)["tokens"]
    current = model
    for stage in run.settings.stages:
        before_repair = stage != "repair" and "repair" in run.settings.stages
        most = run.settings.data.generated_before_repair if before_repair else None
        seen = _seen(tokens, written, most)
        steps[stage] = _stage(stage, run, model, current, out, seen, fingerprints[stage])
        current = ModelFolder(out / stage)
    reports: dict[str, Any] = {}
    for found in steps.values():
        reports |= found.report
    origin = {
        "model": model.fingerprint,
        "data": None if data is None else data.sha256,
        "recipe": _recipe_hash(run, reports.get("scheme")),
    }
    seconds = {name: found.seconds for name, found in steps.items()}
    exports = {}
    for name, folder in _folders(run.settings.export).items():
        steps[folder], exports[name] = export(
            name, current, out, folder, origin, model, fingerprints[folder]
        )
    taken = [name for name, found in steps.items() if found.taken]
    total = time.perf_counter() - start + sum(steps[name].seconds for name in taken)
    log.info("compressed and audited in %.1f s: %s", total, out / CHECKPOINT)
    peaks = [found.peak_cuda for found in steps.values() if found.peak_cuda is not None]
    compression = {
        # Of a run that was killed and went on: its finished steps, and this process.
        "seconds": total,
        "stage_seconds": seconds,
        "resumed": taken,
        "state": _state_cost(steps, total),
        # In a sweep the process is not fresh: what was resident before counts in the peak.
        "start_rss": start_rss,
        "peak_rss": max(found.peak_rss for found in steps.values()),
        "peak_cuda": max(peaks, default=None),
        "origin": origin,
        "calibration_tokens": None if tokens is None else list(tokens.shape),
        "generated_tokens": None if written is None else list(written.shape),
        "audit": steps[CHECKPOINT].report["audit"],
        **reports,
    }
    return compression, exports


def _state_cost(steps: dict[str, Step], total: float) -> dict[str, Any]:
    """What it cost that the run could be killed: the most ``bytes`` on disk at once, ``seconds`` of writing,
    their ``share`` of the total."""
    found = [done.state for done in steps.values() if done.state is not None]
    seconds = sum(cost["seconds"] for cost in found)
    return {
        "saves": sum(cost["saves"] for cost in found),
        "bytes": max((cost["bytes"] for cost in found), default=0),
        "seconds": seconds,
        "share": seconds / total,
    }


def _stage(
    name: str,
    run: Run,
    model: ModelFolder,
    source: ModelFolder,
    out: Path,
    tokens: Tensor | None,
    fingerprint: dict[str, Any],
) -> Step:
    known = fingerprint | here(run.device)
    return step(
        out,
        name,
        lambda target, state: run_stage(
            name, Work(run, model, source, target, state, known, tokens)
        ),
        fingerprint,
    )


def _folders(exports: Iterable[str]) -> dict[str, str]:
    """The folder of each format: the first is the one that is measured."""
    first, *others = dict.fromkeys(exports)
    return {first: CHECKPOINT} | {name: beside(name) for name in others}


def beside(export: str) -> str:
    """The folder of a format beside the one that is measured."""
    return f"{CHECKPOINT}-{export}"


def export(
    name: str,
    record: ModelFolder,
    out: Path,
    folder: str,
    origin: dict[str, Any],
    original: ModelFolder,
    fingerprint: dict[str, Any] | None = None,
) -> tuple[Step, dict[str, Any]]:
    """A step of a run: write a record to ``folder`` in the format ``name``, compare it with the record, write
    its manifest. original: what the record may be the language part of. Returns the step, and what
    ``exports`` of metrics.json says of it."""

    def make(target: Path, _: Path) -> dict[str, Any]:
        return _export(name, record, target, origin, original)

    found = step(out, folder, make, fingerprint)
    size = measure_size(ModelFolder(out / folder))
    return found, {"folder": folder, "size": size, "audit": found.report["audit"]}


def _export(
    name: str, record: ModelFolder, target: Path, origin: dict[str, Any], original: ModelFolder
) -> dict[str, Any]:
    log.info("writing the checkpoint as %s and comparing it with the record", name)
    FORMATS[name].write(record, target)
    dress(target, original)
    checked = audit(record, ModelFolder(target), FORMATS[name].quantized)
    write_manifest(target, origin)
    return {"format": name, "audit": checked}


def _calibration(run: Run, model: ModelFolder) -> TokenBlocks | None:
    """Calibration tokens, or None if no method of the recipe looks at data."""
    if not run.needs_data:
        return None
    data = run.settings.data
    return _drawn(
        (data.source, data.field, data.split),
        model.path,
        data.sequences,
        data.length,
        data.seed,
        frozenset(run.pins.items()),
    )


@functools.lru_cache(maxsize=1)
def _drawn(
    text: tuple[str, str, str],
    model: Path,
    sequences: int,
    length: int,
    seed: int,
    pinned: frozenset[tuple[str, str]],
) -> TokenBlocks:
    """Kept from the check to the run, and from run to run of a sweep. pinned: of another text at another time
    the name may be the same"""
    folder = ModelFolder(model)
    blocks = calibration_blocks(
        load_mix(*text), open_tokenizer(folder), sequences=sequences, length=length, seed=seed
    )
    check_tokens(blocks.tokens, folder)
    return blocks


def _seen(tokens: Tensor | None, written: Tensor | None, most: int | None) -> Tensor | None:
    """The calibration tokens with what the original wrote among them, at most ``most`` sequences of it."""
    if tokens is None or written is None:
        return tokens
    return interleave(tokens, written[:most])


def _generate(
    run: Run, model: ModelFolder, tokenizer: Any, target: Path, saved: Saved
) -> dict[str, Any]:
    """Write calibration sequences that the original makes itself: they join the tokens of every stage."""
    data = run.settings.data
    tokens = generated_tokens(
        load_dense(model, run.device, model.dtype),
        sequences=data.generated,
        length=data.length,
        tokenizer=tokenizer,
        seed=data.seed,
        saved=saved,
    )
    target.mkdir()
    save_tensors(target / WRITTEN, {"tokens": tokens.cpu()})
    log.info("the original wrote %d sequences", data.generated)
    return {}


def _decisive_settings(run: Run) -> dict[str, Any]:
    """What of a recipe decides the numbers: stages, methods with their knobs, data. Formats hold them all."""
    settings = asdict(run.settings)
    if run.distill is not None:
        knobs = run.distill
        minutes = knobs.minutes if knobs.budget == "minutes" else None
        settings["distill"] = knobs.decisive | {"minutes": minutes}
    keys = (
        "stages",
        "head",
        "search",
        "transforms",
        "rounding",
        "repair",
        "prune",
        "distill",
        "kv_cache",
        "data",
    )
    return {key: settings[key] for key in keys}


def _decisive(run: Run, model: ModelFolder) -> dict[str, Any]:
    """All that decides the bytes of a run's folders."""
    data = _calibration(run, model)
    settings = _decisive_settings(run)
    settings["data"] |= {"sha256": None if data is None else data.sha256}
    if run.distill is not None:
        settings["distill"] |= {"sha256": training_text(run, model).sha256}
    return {
        "model": {
            "fingerprint": model.fingerprint,
            "files": _companions(model),
            "family": digest_of(model.config),
        },
        # For a start after this one, which reads the same; steps depend on the content.
        PINS: run.pins,
        **settings,
        "scheme": run.settings.scheme,
        "device": run.device.type,
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
        "versions": {name: version_of(name) for name in DECISIVE_VERSIONS},
        "code": code(),
    }


def _fingerprints(run: Run, decisive: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What decides each step of a run, in order: its own settings, what is common, and the step before."""
    settings, data = run.settings, decisive["data"]
    if not run.needs_data:
        data = {"seed": data["seed"]}
    own: dict[str, dict[str, Any]] = {}
    if run.needs_data and settings.data.generated:
        own[GENERATE] = {"data": data}
    for stage in settings.stages:
        own[stage] = {key: decisive[key] for key in KNOBS_OF[stage]}
        # Training has a text of its own, which its knobs name; turning looks at none.
        textless = stage in ("rotate", "distill")
        own[stage]["data"] = {"seed": data["seed"]} if textless else data
    # A manifest has the hash of the whole recipe.
    whole_recipe = {key: decisive[key] for key in _decisive_settings(run)}
    own |= {folder: whole_recipe for folder in _folders(run.settings.export).values()}
    common = {key: decisive[key] for key in ("model", "device", "versions", "code")}
    before, found = {"step": "model", "sha256": decisive["model"]["fingerprint"]}, {}
    for name, fingerprint in own.items():
        found[name] = fingerprint | common | {"after": before}
        if name not in _folders(run.settings.export).values():
            text = json.dumps(found[name])
            before = {"step": name, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return found


def _companions(model: ModelFolder) -> dict[str, str]:
    """SHA-256 of the files that travel along, of which the tokenizer decides what is measured too."""
    return {file.name: file_sha256(file) for file in model.companions()}


def _saved(run: Run, state: Path, fingerprint: dict[str, Any]) -> Saved:
    return Saved(state, fingerprint | here(run.device))


def _recipe_hash(run: Run, scheme: dict[str, Any] | None) -> str:
    decisive = _decisive_settings(run)
    return hashlib.sha256(json.dumps([decisive, scheme], sort_keys=True).encode()).hexdigest()
