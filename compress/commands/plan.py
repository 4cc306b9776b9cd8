"""``compress plan recipe=NAME model=... hardware=NAME``: what a recipe would give, before a weight is read.

Sizes, decode speed by the roofline, memory, the run's own needs, and which engines would load the result,
beside the 16-bit original. Without a recipe: of the model as it is."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

import torch

from compress.commands.words import plain
from compress.compose import compose_settings, expand_shorthand, options
from compress.config import RecipeConfig, Run, parse
from compress.errors import UserError
from compress.model.families import check_applies, family_of
from compress.model.folder import ModelFolder, Shapes
from compress.model.shapes import PREFIX, ShapeFolder
from compress.model.sources import config_elsewhere, resolve_model
from compress.pipeline import check_shape
from compress.plan.calibration import stages, uncounted
from compress.plan.checkpoint import Checkpoint, as_planned, on_disk
from compress.plan.hardware import CPU, Hardware, hardware_of
from compress.plan.loadable import refusals
from compress.plan.rows import answers, engines_of, loadable_folder, matches, row
from compress.prune.preview import previews
from compress.prune.shape import KEYS
from compress.prune.stage import check as check_prune
from compress.quantize.scheme import Schemes
from compress.quantize.search import budget
from compress.quantize.stage import settle
from compress.report.table import markdown

BASE, CANDIDATE = "base", "candidate"


def main(words: list[str]) -> int:
    """Prints tables, or with --json all there is; 2 if the recipe does not fit the model, or an engine of
    serve.engines would not load the result."""
    parser = argparse.ArgumentParser("compress plan", description=plain(__doc__))
    parser.add_argument(
        "words",
        nargs="*",
        metavar="KEY=VALUE",
        help="recipe, model (a path, owner/name, shape:NAME, shape:PATH/config.json), hardware, "
        "plan.batches, plan.context, serve.engines, serve.tp, and any key of a recipe",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    asked = parser.parse_intermixed_args(words)
    for word in asked.words:
        if "=" not in word:
            raise UserError(f"{word} is not KEY=VALUE, as in recipe=awq-int4 hardware=h100")
    settings = compose_settings(expand_shorthand(asked.words))
    if settings.hardware is None:
        raise UserError(f"hardware= is missing: choose one of {', '.join(options('hardware'))}")
    found = plan(settings)
    print(json.dumps(found, indent=2) if asked.json else text(found))
    return 2 if "refused" in found or found["unserved"] else 0


def plan(settings: RecipeConfig) -> dict[str, Any]:
    """Everything that --json prints. Raises UserError for what is not known, or does not fit together."""
    assert settings.hardware is not None
    hardware, wanted = hardware_of(settings.hardware, again=True), settings.plan
    model = settings.model
    shapes = open_shapes(model.source, model.revision, model.allow_pickle)
    check_applies("plan", shapes.config)
    device = torch.device(CPU) if hardware.name == CPU else None
    base = on_disk(shapes, device) if isinstance(shapes, ModelFolder) else as_planned(shapes, None)
    found: dict[str, Any] = {
        "model": settings.model.name,
        "hardware": asdict(hardware),
        "plan": asdict(wanted),
        "serve": asdict(settings.serve),
        "rows": {BASE: _row(base, hardware, settings)},
    }
    if settings.stages:
        more = _candidate(parse(settings), shapes, hardware, device)
        found["rows"] |= more.pop("rows", {})
        return {**found, "unserved": [], **more}
    engines = loadable_folder(shapes, settings.serve.tp, hardware.capability)
    unserved = refusals({"": engines}, settings.serve.engines)
    return found | {"engines": engines, "unserved": unserved}


def open_shapes(source: str, revision: str | None, allow_pickle: bool = False) -> Shapes:
    """A folder, or the shapes of a config alone: of a hub name or a URL only config.json is looked at.

    Raises UserError for a config alone that is of a quantized model: what is stored is in its files' headers.
    """
    if source.startswith(PREFIX):
        shapes = ShapeFolder(source.removeprefix(PREFIX))
    elif (config := config_elsewhere(source, revision)) is not None:
        shapes = ShapeFolder(str(config))
    else:
        return ModelFolder(resolve_model(source, revision, allow_pickle))
    if "quantization_config" in shapes.config:
        raise UserError(
            f"{source} is quantized: a config alone says nothing of its bytes, give the folder of its files"
        )
    return shapes


def _row(model: Checkpoint, hardware: Hardware, settings: RecipeConfig) -> dict[str, Any]:
    wanted = settings.plan
    return row(model, hardware, wanted.batches, wanted.context, settings.serve.tp)


def _candidate(
    run: Run, shapes: Shapes, hardware: Hardware, device: torch.device | None
) -> dict[str, Any]:
    """The parts of the plan that a recipe adds; {linears, refused} where it does not fit the model."""
    settings = run.settings
    quantizes = "quantize" in settings.stages
    if run.prune is not None:
        check_prune(shapes, run.prune, settings.data.sequences)
        # Of several candidates the first: which one is taken is measured.
        shapes = next(previews(shapes, run.prune))
    found = {"linears": matches(shapes, run.schemes) if quantizes else []}
    try:
        check_shape(run, shapes)
    except UserError as error:
        return found | {"refused": str(error)}
    if "rotate" in settings.stages:
        shapes = ShapeFolder(str(shapes.path), {**shapes.config, "tie_word_embeddings": False})
    schemes = settle(shapes, family_of(shapes.config), run.schemes) if quantizes else None
    model = as_planned(shapes, schemes, run.cache, run.first_format, _searched(run, shapes), device)
    if schemes is not None:
        found["linears"] = matches(shapes, schemes)
    engines = engines_of(run, shapes, hardware.capability)
    return {
        "stages": ", ".join(settings.stages),
        "scheme": _numbers(run, schemes),
        **found,
        # Of several shapes that pruning would try, the first.
        "shape": {key: shapes.config.get(key) for key in KEYS.values()},
        "calibration": [asdict(stage) for stage in stages(run, shapes, model, hardware)],
        "uncounted": uncounted(run),
        # Of several formats those of the first, as everything else here is; and of each.
        "engines": next(iter(engines.values())),
        "engines_of": engines,
        "unserved": refusals(engines, settings.serve.engines),
        "rows": {CANDIDATE: _row(model, hardware, settings)},
    }


def _numbers(run: Run, schemes: Schemes | None) -> str | None:
    """The name of what the linears are stored in; where their bits are searched, the choices."""
    if schemes is None or run.search is None:
        return None if schemes is None else schemes.name
    bits = sorted(run.search.bits)
    return f"{bits[0]} to {bits[-1]} bits, searched"


def _searched(run: Run, shapes: Shapes) -> float | None:
    """Bytes of the linears where a search chooses their bits: what it may spend, scales included."""
    if run.search is None:
        return None
    if run.search.megabytes is not None:
        return 1e6 * run.search.megabytes
    assert run.search.average_bits is not None
    groups = budget(shapes, run.search, run.schemes).groups
    # Between the nearest choices, as bytes grow evenly with bits.
    bits = sorted(run.search.bits)
    low = max([b for b in bits if b <= run.search.average_bits], default=bits[0])
    high = min([b for b in bits if b >= run.search.average_bits], default=bits[-1])
    sizes = [sum(group.nbytes(b, shapes.dtype) for group in groups) for b in (low, high)]
    share = 0.0 if high == low else (run.search.average_bits - low) / (high - low)
    return sizes[0] + share * (sizes[1] - sizes[0])


def text(found: dict[str, Any]) -> str:
    """The tables of a plan."""
    hardware, wanted = found["hardware"], found["plan"]
    rows = {f"{found['model']} (original)": found["rows"][BASE]}
    if CANDIDATE in found["rows"]:
        rows[found["scheme"] or found["stages"]] = found["rows"][CANDIDATE]
    parts = [
        f"{found['serve']['tp']} x {hardware['name']}: {hardware['gigabytes']:.0f} GB, "
        f"{hardware['gigabytes_per_second']:.0f} GB/s, "
        + ", ".join(f"{kind} {rate:.4g} TFLOPS" for kind, rate in hardware["teraflops"].items())
        + f"; context of {wanted['context']} tokens",
        _sizes(rows),
        _points(rows),
        _whole(rows),
    ]
    if "prune" in found.get("stages", ""):
        sizes = ", ".join(f"{key} {size}" for key, size in found["shape"].items())
        parts.append(f"Pruned to (where several shapes are tried, the first): {sizes}")
    if found.get("linears"):
        parts.append(_linears(found["linears"]))
    if "refused" in found:
        parts.append(f"the recipe does not fit: {found['refused']}")
    if found.get("calibration"):
        parts.append(_calibration(found["calibration"]))
    if found.get("uncounted"):
        parts.append(f"Not counted in the run's own needs: {', '.join(found['uncounted'])}.")
    if "engines" in found:
        for form, engines in found.get("engines_of", {"": found["engines"]}).items():
            title = f"Engines, of {form}:" if form else "Engines:"
            parts.append("\n".join([title, *answers(engines)]))
    if found["unserved"]:
        parts.append("serve.engines would not load it:\n" + "\n".join(found["unserved"]))
    parts.append(
        "Times are the shortest that memory and arithmetic allow: max(bytes / bandwidth, operations / rate). "
        "Memory is weights and cache on each device; a program takes more. docs/architecture.md has the "
        "formulas."
    )
    return "\n\n".join(part for part in parts if part)


def _sizes(rows: dict[str, Any]) -> str:
    header = ["", "M weights", "file MB", "bits/weight linears", "whole file", "cache KB/token"]
    lines = [[*header, "largest batch"]]
    lines += [
        [
            name,
            f"{r['parameters'] / 1e6:.1f}",
            f"{r['bytes'] / 1e6:.1f}",
            f"{r['bits_linears']:.2f}",
            f"{r['bits_file']:.2f}",
            f"{r['cache_bytes_per_token'] / 1e3:.1f}",
            str(r["largest_batch"]),
        ]
        for name, r in rows.items()
    ]
    return markdown(lines)


def _points(rows: dict[str, Any]) -> str:
    lines = [
        ["", "batch", "GB", "fits", "TTFT ms", "limit", "decode ms", "tokens/s", "limit", "flops/byte: MLP",
         "attention", "prefill MLP", "prefill attention"],
    ]  # fmt: skip
    for name, r in rows.items():
        for p in r["points"]:
            of = p["intensity"]
            lines.append(
                [
                    name,
                    str(p["batch"]),
                    f"{p['memory_bytes'] / 1e9:.2f}",
                    "yes" if p["fits"] else "no",
                    f"{p['ttft_ms']:.4g}",
                    p["ttft_limit"],
                    f"{p['itl_ms']:.2f}",
                    f"{p['tokens_per_s']:.1f}",
                    p["limit"],
                    *(f"{of['decode'][part]:.3g}" for part in ("mlp", "attention")),
                    *(f"{of['prefill'][part]:.3g}" for part in ("mlp", "attention")),
                ]
            )
    return markdown(lines)


def _whole(rows: dict[str, Any]) -> str:
    """The same as published calculators count, where that is something else."""
    lines = []
    for name, r in rows.items():
        if r["weights"] == r["read"]:
            continue
        counted = [(p["batch"], p["all_weights"]) for p in r["points"]]
        points = [
            f"{w['itl_ms']:.2f} ms and {w['tokens_per_s']:.1f} tokens/s at batch {batch}"
            for batch, w in counted
        ]
        lines.append(
            f"{name}: with all {r['weights'] / 1e9:.2f} GB of weights read in a step, as published "
            f"calculators count (a step looks up one row a token of the embedding): {', '.join(points)}"
        )
    return "\n".join(lines)


def _linears(entries: list[dict[str, Any]]) -> str:
    lines = [["linear", "out x in", "of them", "scheme", "left in 16 bits because"]]
    lines += [
        [e["name"], "{} x {}".format(*e["shape"]), str(e["count"]), e["scheme"] or "-", e["reason"] or ""]
        for e in entries
    ]  # fmt: skip
    return markdown(lines)


def _calibration(entries: list[dict[str, Any]]) -> str:
    lines = [["the run itself", "peak MB above its start", "held by", "seconds, roughly"]]
    lines += [
        [e["name"], f"{e['bytes'] / 1e6:.0f}", e["what"], f"{e['seconds']:.3g}"] for e in entries
    ]
    return markdown(lines)
