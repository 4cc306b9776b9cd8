"""``compress bench FOLDER ...``: decode speed and memory of plain or exported folders, interleaved, at batch
sizes and patterns, or the sizes of a traffic, by one engine or several."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from compress.commands.traffic import TrafficWords, traffic_words
from compress.commands.words import plain
from compress.compose import compose_settings, expand_shorthand
from compress.config import SpeedConfig, cache_scheme_of, device_of, schemes_of
from compress.environment import environment
from compress.errors import UserError
from compress.measure.speed import check_engines, measure_decode, token_limit
from compress.model.folder import ModelFolder, write_json
from compress.model.shapes import PREFIX, ShapeFolder
from compress.model.sources import resolve_model
from compress.report.serving import mixture_table, serving_figures
from compress.report.speed import bench_report
from compress.runtime.random import RandomModel
from eval.traffic import Pattern, Traffic, describe, mixed, patterns

# What says the sizes that a traffic says too.
SIZES = ("speed", "speed.patterns", "speed.mix", "speed.scale")
Folders = dict[str, ModelFolder | RandomModel]


def main(words: list[str]) -> int:
    """Prints a table, or with --json all there is; 1 if a folder was not measured at all."""
    parser = argparse.ArgumentParser("compress bench", description=plain(__doc__))
    parser.add_argument(
        "words",
        nargs="+",
        metavar="FOLDER|KEY=VALUE",
        help="folders, the original first, or shape:NAME[,scheme=,head=,kv_cache=], random weights built in "
        "place; speed.*, device, engine=NAME[,NAME], traffic=LOG",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument(
        "--out", type=Path, help="FILE.json to write, with FILE.md and FILE.png beside it"
    )
    asked = parser.parse_intermixed_args(words)
    told, rest = traffic_words(asked.words)
    names = [word for word in rest if "=" not in word or word.startswith(PREFIX)]
    overrides = [_expanded(word) for word in rest if word not in names]
    if not names:
        raise UserError("bench needs at least one FOLDER")
    settings = compose_settings(expand_shorthand(overrides))
    if settings.speed is None:
        raise UserError("speed=none leaves nothing to measure")
    check_engines(settings.speed)
    traffic = None if told is None else _traffic(told, overrides)
    if asked.out is not None:
        _check_out(asked.out)
    device = device_of(settings)
    labels = short_names(names)
    folders = {labels[name]: _opened(name) for name in names}
    speed, sizes = settings.speed, []
    if told is not None and traffic is not None:
        _check_traffic(traffic, folders)
        sizes = patterns(traffic, told.patterns)
        speed = _of_sizes(speed, sizes)
    _tell_progress()
    try:
        results = measure_decode(folders, speed, device)
    except RuntimeError as error:
        raise UserError(str(error)) from error
    facts = environment(device)
    found = {
        # Folders by their short names: where they lie on this machine is of no use elsewhere.
        "command": " ".join(["compress bench", *(_told(word, labels) for word in asked.words)]),
        "environment": facts,
        "speed": asdict(speed),
        "folders": results,
    }
    report = bench_report(results, facts)
    if traffic is not None:
        found["traffic"] = mixture = _mixture(traffic, sizes, speed, results)
        report += f"\n{mixture_table(mixture, results)}\n"
    if asked.out is not None:
        write_json(asked.out, found)
        asked.out.with_suffix(".md").write_text(report, encoding="utf-8")
        _draw(results, asked.out.with_suffix(".png"))
    print(json.dumps(found, indent=2) if asked.json else report)
    points = [speed["points"] for engines in results.values() for speed in engines.values()]
    return int(any(all("refused" in point for point in of_one) for of_one in points))


def _opened(name: str) -> ModelFolder | RandomModel:
    """A folder, or SHAPE with the numbers that are asked for: shape:llama-3.1-8b,scheme=int4,head=int8."""
    if not name.startswith(PREFIX):
        return ModelFolder(resolve_model(name, None))
    shape, *words = name.removeprefix(PREFIX).split(",")
    # Raises UserError now, not in a process of its own.
    ShapeFolder(shape)
    groups = {word.partition("=")[0].partition(".")[0] for word in words}
    if not groups <= {"scheme", "head", "kv_cache"}:
        raise UserError(f"{name} is not allowed: a shape takes scheme=, head= and kv_cache=")
    settings = compose_settings(["recipe=rtn-int4", *words])
    quantized = "scheme" in groups or "head" in groups
    return RandomModel(
        shape, schemes_of(settings) if quantized else None, cache_scheme_of(settings)
    )


def _expanded(word: str) -> str:
    key, _, value = word.partition("=")
    return f"speed.engines=[{value}]" if key == "engine" else word


def _traffic(told: TrafficWords, overrides: list[str]) -> Traffic:
    """Raises UserError if the log cannot be read, or the sizes to measure are said in two ways."""
    for word in overrides:
        key = word.partition("=")[0].lstrip("+~")
        if key in SIZES or key.startswith("speed.mix."):
            raise UserError(
                f"traffic={told.log} and {word} both say the sizes: leave one of them out"
            )
    return told.open()


def _check_traffic(traffic: Traffic, folders: Folders) -> None:
    """Raises UserError for requests that a model does not take: they are not dropped unasked."""
    for name, folder in folders.items():
        limit = token_limit(folder)
        if limit is not None and (above := traffic.above(limit)):
            raise UserError(
                f"{above} of {len(traffic)} requests of {traffic.name} ({above / len(traffic):.1%}) need "
                f"more tokens than the {limit} that {name} takes: leave them out with "
                f"traffic.longest={limit}"
            )


def _of_sizes(speed: SpeedConfig, sizes: list[Pattern]) -> SpeedConfig:
    return replace(speed, patterns=[[p.input_length, p.output_length] for p in sizes], mix=None)


def _mixture(
    traffic: Traffic, sizes: list[Pattern], speed: SpeedConfig, results: Mapping[str, Any]
) -> dict[str, Any]:
    """The traffic, the sizes that stand for it, and what each candidate makes of them at every batch."""
    weights = [size.weight for size in sizes]
    return {
        "traffic": describe(traffic),
        "patterns": [asdict(size) for size in sizes],
        "weighted": {
            folder: {
                engine: [mixed(found["points"], weights, batch) for batch in speed.batches]
                for engine, found in engines.items()
            }
            for folder, engines in results.items()
        },
    }


def _draw(results: Mapping[str, Mapping[str, Any]], target: Path) -> None:
    # Here, not above: drawing takes a second to load, and memory while others are measured.
    from compress.report.drawn import draw_figures

    speeds = {
        folder if len(engines) == 1 else f"{folder} ({engine})": speed
        for folder, engines in results.items()
        for engine, speed in engines.items()
    }
    draw_figures(serving_figures(speeds), target)


def _told(word: str, labels: Mapping[str, str]) -> str:
    """A word without where a folder or a log lies."""
    key, equals, value = word.partition("=")
    if key == "traffic" and equals:
        return f"traffic={Path(value).name}"
    return labels.get(word, word)


def _check_out(out: Path) -> None:
    if out.suffix != ".json":
        raise UserError(f"--out {out} is not allowed: choose a name that ends in .json")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out} cannot be written: there is no folder {out.parent}")


def short_names(words: list[str]) -> dict[str, str]:
    """For each folder the least of the end of its path that tells it from the others."""
    names = {word: word for word in words if word.startswith(PREFIX)}
    paths = {w: Path(w).expanduser().absolute().parts for w in words if w not in names}
    for word, parts in paths.items():
        others = {other for other in paths.values() if other != parts}
        least = next(n for n in range(1, 99) if all(o[-n:] != parts[-n:] for o in others))
        names[word] = Path(*parts[-least:]).as_posix()
    return names


def _tell_progress() -> None:
    """What is measured goes to standard error as it is known."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("eval.speed").setLevel(logging.INFO)
