"""The model card of an exported folder: what it is, made from what and how, and what was found.

It states nothing that the run did not measure, and names what it did not; figures are those of metrics.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from calibration.texts import LOADERS
from compress.report.served import served_report
from compress.report.table import markdown, plain_markdown, table, verdict_of
from compress.report.table import rows_of as table_rows

# Keys of a recipe that decide nothing in the checkpoint.
UNTOLD = (
    "model", "eval", "context", "speed", "gate", "device", "hardware", "plan", "traffic", "serve",
)  # fmt: skip
SHAPING = ("prune", "distill")


@dataclass(frozen=True)
class Base:
    """The original. hub: owner/name, if it came from there, at commit; licence: as a card's YAML states it"""

    name: str
    hub: str | None
    licence: Mapping[str, str]
    commit: str | None = None


@dataclass(frozen=True)
class Serving:
    """How an engine serves the folder, which the line calls FOLDER. notes: what to know before"""

    engine: str
    line: str
    notes: Sequence[str] = ()


def model_card(
    metrics: Mapping[str, Any],
    base: Base,
    serving: Sequence[Serving],
    *,
    title: str,
    format_name: str,
    measured: bool,
) -> str:
    """The card as Markdown with YAML on top.

    format_name: of this folder; measured: whether the figures are of its files, not of the same codes in
    another format
    """
    metrics = without_places(metrics)
    parts = [
        _front_matter(metrics, base, format_name),
        f"# {plain_markdown(title)}",
        _summary(metrics, base, format_name),
        _origin(metrics, base, format_name),
        _recipe(metrics),
        _found(metrics, format_name, measured),
        _served(metrics),
        _formats(metrics),
        _serving(serving),
        _unmeasured(metrics),
        _environment(metrics["environment"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def without_places(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """metrics.json as a reader elsewhere may see it: of texts in files of this machine the files' names,
    wherever they are named, and of a server that failed no line of its log."""
    names = _names(metrics)
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def told(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {told(key): told(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [told(inner) for inner in value]
        return pattern.sub(lambda m: names[m[0]], value) if isinstance(value, str) else value

    found: dict[str, Any] = told(metrics)
    for row in ("base", "candidate"):
        for entry in (found[row].get("served") or {}).values():
            if "error" in entry["agreement"]:
                entry["agreement"]["error"] = "its server failed"
    return found


def _names(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Text in a file of this machine -> its name, numbered where several files have the same."""
    every = sorted(set(_sources(metrics)))
    files = [source for source in every if "/" in source and _is_file(source)]
    taken = set(every) - set(files)
    names = {}
    for source in files:
        name, number = Path(source).name, 1
        while name in taken:
            number += 1
            name = f"{Path(source).name} ({number})"
        taken.add(name)
        names[source] = name
    return names


def _is_file(source: str) -> bool:
    """Whether a text is no name that others know."""
    return source.startswith(("/", "~", ".")) or Path(source).suffix in LOADERS


def _sources(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Every text that a run names."""
    recipe = metrics["recipe"]
    mix = recipe["data"]["source"]
    yield from [mix] if Path(mix).exists() else mix.split("+")
    yield from (recipe.get("eval") or {}).get("texts", [])
    if recipe.get("context"):
        yield recipe["context"]["text"]
    for row in (metrics["base"], metrics["candidate"]):
        yield from row.get("texts") or {}


def _front_matter(metrics: Mapping[str, Any], base: Base, format_name: str) -> str:
    stages = metrics["recipe"]["stages"]
    shaped = any(stage in SHAPING for stage in stages)
    fields: dict[str, Any] = {**base.licence}
    if base.hub is not None:
        relation = "finetune" if shaped else "quantized"
        fields |= {"base_model": base.hub, "base_model_relation": relation}
    if format_name != "gguf":
        fields["library_name"] = "transformers"
    fields["pipeline_tag"] = "text-generation"
    fields["tags"] = ["compress", format_name, recipe_name(metrics)]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def recipe_name(metrics: Mapping[str, Any]) -> str:
    """The recipe alone, without what was changed in it."""
    return str(metrics["name"]).partition(" ")[0]


def _summary(metrics: Mapping[str, Any], base: Base, format_name: str) -> str:
    size, before = metrics["candidate"]["size"], metrics["base"]["size"]
    ours, theirs = (
        f"{row['bytes'] / 1e6:.1f} MB of weights, {row['bits_file']:.2f} bits per weight"
        for row in (size, before)
    )
    return (
        f"{plain_markdown(base.name)} by the recipe {_code(metrics['name'])}, in the format {format_name}. "
        f"The run's checkpoint/ has {ours} of the whole file; the original {theirs}."
    )


def _origin(metrics: Mapping[str, Any], base: Base, format_name: str) -> str:
    compression, data = metrics["compression"], metrics["recipe"]["data"]
    at = "" if base.commit is None else f" at commit {_code(base.commit)}"
    lines = [
        f"Original: {base.hub or plain_markdown(base.name)}{at}; SHA-256 over its config and weights: "
        f"`{metrics['model']['fingerprint']}`."
    ]
    if base.licence:
        licence = plain_markdown(base.licence["license"])
        lines.append(f"Licence, as the original states it: {licence}.")
    else:
        lines.append("Licence: the original's folder does not state one, so none is stated here.")
    shape = compression.get("calibration_tokens")
    if shape is None:
        lines.append("Calibration data: none; no method of the recipe looks at any.")
    else:
        sha256 = (compression.get("origin") or {}).get("data")
        lines.append(
            f"Calibration data: {shape[0]} sequences of {shape[1]} tokens of "
            f"{plain_markdown(data['source'])}, seed {plain_markdown(str(data.get('seed')))}; "
            f"SHA-256 `{sha256}`."
        )
    lines += [
        f"{plain_markdown(source)} was read at commit {_code(pin)}."
        for source, pin in metrics.get("pins", {}).items()
        if source.startswith("dataset ")
    ]
    if written := compression.get("generated_tokens"):
        lines.append(f"The original wrote {written[0]} sequences of {written[1]} tokens more.")
    if audit := compression.get("audit"):
        checked = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in audit.items())
        lines.append(f"Written files compared bit by bit with what was decided: {checked}.")
    scheme = compression.get("scheme") or {}
    if format_name == "gguf" and scheme.get("linears", {}).get("symmetric") is False:
        lines.append("GGUF keeps the least value of a group with zero points in float16.")
    return _section("What it is made from", _bullets(lines))


def _recipe(metrics: Mapping[str, Any]) -> str:
    told = {k: v for k, v in metrics["recipe"].items() if v and k not in UNTOLD}
    if metrics["compression"].get("calibration_tokens") is None:
        told.pop("data", None)
    dumped = yaml.safe_dump(_stated(told), sort_keys=False, allow_unicode=True).strip()
    name = " ".join(metrics["name"].splitlines())
    command = f"compress recipe={name} model=FOLDER_OF_THE_ORIGINAL"
    # Longer than any row of them in a value.
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", dumped))]))
    return _section("Recipe", f"    {command}\n\n{fence}yaml\n{dumped}\n{fence}")


def _code(text: str) -> str:
    """A name as code, which it cannot end."""
    return f"`{' '.join(text.splitlines()).replace('`', chr(39))}`"


def _stated(value: Any) -> Any:
    """A recipe without the knobs that it leaves open."""
    if not isinstance(value, Mapping):
        return value
    return {key: _stated(inner) for key, inner in value.items() if inner is not None}


def _found(metrics: Mapping[str, Any], format_name: str, measured: bool) -> str:
    candidate = metrics["candidate"]
    lines = []
    if not measured:
        lines.append(
            f"Measured on the run's checkpoint/, whose weights this folder holds as {format_name}: compared "
            "with the same record, not measured itself."
        )
    rows = [row for row in table_rows([dict(metrics)]) if row.base is not None]
    said = verdict_of(rows[0])
    if said:
        lines.append(f"Against the original: {plain_markdown(said)}.")
    if said and not candidate["verdict"].get("measurable", True):
        lines.append(
            "No measurable loss means that the paired comparison with the original, on these texts and tasks "
            "and corrected for their number, finds none; a smaller one may be there."
        )
    return _section(
        "Accuracy, size and speed", "\n\n".join([*lines, table([dict(metrics)]).strip()])
    )


def _served(metrics: Mapping[str, Any]) -> str:
    rows = [row for row in table_rows([dict(metrics)]) if row.values.get("served")]
    return _section("Served", served_report(rows).strip()) if rows else ""


def _formats(metrics: Mapping[str, Any]) -> str:
    exports = metrics.get("exports") or {}
    if not exports:
        return ""
    lines = [["format", "folder", "MB", "bits per weight of the file"]]
    for name, found in exports.items():
        size = found["size"]
        bits = f"{size['bits_file']:.2f}" if "bits_file" in size else "-"
        lines.append([name, str(found["folder"]), f"{size['bytes'] / 1e6:.1f}", bits])
    return _section("Formats of the same run", markdown(lines))


def _serving(serving: Sequence[Serving]) -> str:
    if not serving:
        return _section("Serving", "No engine is known to load this folder.")
    parts = [
        "FOLDER is this folder. That an engine loads it was read in its source where it says not run."
    ]
    for entry in serving:
        beside = f" ({plain_markdown('; '.join(entry.notes))})" if entry.notes else ""
        parts.append(f"{entry.engine}{beside}:\n\n    {entry.line}")
    return _section("Serving", "\n\n".join(parts))


def _unmeasured(metrics: Mapping[str, Any]) -> str:
    row = metrics["candidate"]
    kinds = {
        "texts": "perplexity, and divergence from the original on text",
        "tasks": "tasks",
        "agreement": "how long greedy decoding writes the same",
        "context": "long contexts",
        "speed": "decode speed and memory",
    }
    lines = [what for key, what in kinds.items() if not row.get(key)]
    if not row.get("served"):
        lines.append("answers of serving engines")
    lines.append(
        "whatever is not in the table: other texts, languages and tasks, safety, other hardware"
    )
    return _section("Not measured", _bullets(lines))


def _environment(found: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items() if v is not None)
    commit = f" at {found['commit']}" if found.get("commit") else ""
    text = f"{found['date']}, {found['device']}; Python {found['python']}, {versions}{commit}."
    return _section("Made with", plain_markdown(text))


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
