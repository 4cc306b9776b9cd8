"""The comparison table: originals and candidates side by side, from metrics.json files alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.model.folder import read_json
from eval.speed import pattern_of
from eval.task_scores import headline, stderr_of

# Files of a run: every number of it, and figures by token (compress.measure.accuracy).
METRICS, TOKENS = "metrics.json", "accuracy.safetensors"
# What every run has written since the first.
KEYS = {"name", "model", "recipe", "base", "candidate", "environment"}
ABSENT = "-"


def find_runs(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The metrics of every finished run below the paths, oldest first.

    Raises UserError if there is none, or no such folder, or a file of that name is not of a run.
    """
    paths = list(paths)
    for path in paths:
        if not path.is_dir():
            raise UserError(f"there is no folder {path}")
    # By its true place: a folder may be named twice.
    files = {file.resolve(): file for path in paths for file in path.rglob(METRICS)}
    runs = [{**_metrics(file), "folder": str(file.parent)} for file in files.values()]
    if not runs:
        raise UserError(f"no finished run below {', '.join(map(str, paths))}: none has {METRICS}")
    return sorted(runs, key=lambda run: run["environment"]["date"])


def _metrics(file: Path) -> dict[str, Any]:
    found = read_json(file)
    if not found.keys() >= KEYS:
        raise UserError(f"{file} is not of a run of compress: it lacks {', '.join(sorted(KEYS))}")
    dated = found["environment"]
    if not isinstance(dated, dict) or not isinstance(dated.get("date"), str):
        raise UserError(f"{file} is not of a run of compress: its environment has no date")
    return found


@dataclass(frozen=True)
class Row:
    """A model as it was, or what a run made of it.

    label: tells it from the others of its model
    model: the fingerprint of the original
    values: its section of metrics.json (size, texts, tasks, ...)
    base: the same of its original; of an original None
    run: the whole metrics.json; of an original those of the newest run that measured its speed, if any
    """

    label: str
    model: str
    values: Mapping[str, Any]
    base: Mapping[str, Any] | None
    run: Mapping[str, Any]


def rows_of(runs: list[dict[str, Any]]) -> list[Row]:
    """Each model's original and then its runs, oldest first.

    The original's row takes each section, and of texts, tasks and what was served each one, from the newest
    run of its model that measured it.
    """
    rows = []
    for fingerprint in dict.fromkeys(run["model"]["fingerprint"] for run in runs):
        of_model = [run for run in runs if run["model"]["fingerprint"] == fingerprint]
        original: dict[str, Any] = {}
        for run in of_model:
            for section, found in run["base"].items():
                if section in ("texts", "tasks", "served"):
                    original[section] = original.get(section, {}) | (found or {})
                elif found:
                    original[section] = found
        newest = ([run for run in of_model if _answered(run["base"].get("speed"))] or of_model)[-1]
        # Together: the device is that which the run names, and the prediction is of the first point.
        original |= {key: newest["base"].get(key) for key in ("speed", "predicted")}
        name = f"{of_model[-1]['model']['name']} (original)"
        rows.append(Row(name, fingerprint, original, None, newest))
        names = [run["name"] for run in of_model]
        for run in of_model:
            twice = f" of {run['environment']['date']}" if names.count(run["name"]) > 1 else ""
            rows.append(Row(run["name"] + twice, fingerprint, run["candidate"], run["base"], run))
    return rows


def _answered(speed: Mapping[str, Any] | None) -> bool:
    """Whether any point was measured, not refused."""
    # Runs of before there were points were not refused any.
    return any("refused" not in point for point in speed.get("points", [{}])) if speed else False


def table(runs: list[dict[str, Any]]) -> str:
    """A Markdown table of the runs, each model's original first, with what the columns mean below."""
    rows = [
        [plain_markdown(cell).replace("|", "\\|") for cell in row] for row in cells(rows_of(runs))
    ]
    legend = [f"- {plain_markdown(line)}" for line in legend_lines(runs)]
    return markdown(rows) + "\n\n" + "\n".join(legend) + "\n"


def plain_markdown(text: str) -> str:
    """Text that may hold a name, so that it breaks no line, and is no HTML, link or picture."""
    return " ".join(text.splitlines()).replace("<", "&lt;").replace("](", "]&#40;")


def cells(rows: list[Row]) -> list[list[str]]:
    """The wide table as text, the header first."""
    texts = _keys(rows, "texts")
    tasks = _keys(rows, "tasks")
    # Quantizing leaves as many weights as there were.
    pruned = any(
        row.base and row.values["size"]["parameters"] != row.base["size"]["parameters"]
        for row in rows
    )
    header = ["", *(["M weights"] if pruned else []), "MB", "bits/weight linears", "whole file"]
    header += [f"perplexity {text}" for text in texts] + [f"KL {text}" for text in texts]
    header += [f"top-1 {text}" for text in texts] + [short(task) for task in tasks]
    at_length = any("context" in row.values for row in rows)
    agreed = any("agreement" in row.values for row in rows)
    header += ["agrees for"] if agreed else []
    header += ["cache", "KL at length", "facts found"] if at_length else []
    header += ["TTFT ms", "tokens/s", "peak MB", "kernel"]
    judged = any(verdict_of(row) for row in rows)
    header += ["verdict"] if judged else []
    lines = []
    for row in rows:
        beside = row.base or {}
        weights = [f"{row.values['size']['parameters'] / 1e6:.1f}"] if pruned else []
        line = [row.label, *weights, *_cells(row.values, texts, tasks)]
        line += [_agreed(row.values.get("agreement"))] if agreed else []
        line += _context(row.values.get("context"), beside.get("context")) if at_length else []
        line += _speed(row.values.get("speed"), beside.get("speed"))
        lines.append([*line, verdict_of(row) or ABSENT] if judged else line)
    return [header, *lines]


def verdict_of(row: Row) -> str | None:
    """What a run says of itself in a line, with what its own gate said."""
    verdict = row.values.get("verdict")
    if not verdict:
        return None
    gate = verdict.get("gate")
    if not gate:
        return verdict["text"]
    judged = "passed" if gate["passed"] else "FAILED: " + ", ".join(gate["failed"])
    return f"{verdict['text']}; gate {judged}"


def _keys(rows: list[Row], section: str) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row.values.get(section) or {}))


def short(task: str) -> str:
    return task.removeprefix("packaged_")


def _cells(row: Mapping[str, Any], texts: list[str], tasks: list[str]) -> list[str]:
    size = row["size"]
    cells = [
        f"{size['bytes'] / 1e6:.1f}",
        f"{size['bits_linears']:.2f}",
        f"{size['bits_file']:.2f}",
    ]
    found = [row.get("texts", {}).get(text, {}) for text in texts]
    cells += [_with_error(text, "perplexity", "{:.2f}") for text in found]
    cells += [_with_error(text, "kl", "{:.4f}") for text in found]
    cells += [_with_error(text, "top1", "{:.1%}") for text in found]
    cells += [_task(row.get("tasks", {}).get(task)) for task in tasks]
    return cells


def _agreed(found: Mapping[str, Any] | None) -> str:
    return ABSENT if found is None else f"{found['mean']:.1f} of {found['generated']}"


def _context(found: Mapping[str, Any] | None, base: Mapping[str, Any] | None) -> list[str]:
    """Bytes of the cache over those of 16 bits, divergence over long windows, share of facts found."""
    if not found:
        return [ABSENT] * 3
    own = [kind for kinds in found["retrieval"].values() for kind in kinds.values()]
    asked = sum(kind["questions"] for kind in own)
    facts = sum(kind["questions"] * kind["accuracy"] for kind in own)
    cells = ["16 bits", ABSENT, f"{facts:.0f}/{asked}" if asked else ABSENT]
    if base:
        share = found["positions"]["cache_bytes"] / base["positions"]["cache_bytes"]
        cells[:2] = [f"{share:.3f}x", _with_error(found["positions"], "kl", "{:.4f}")]
    return cells


def _with_error(values: Mapping[str, float], key: str, form: str) -> str:
    return with_error(values[key], values[f"{key}_stderr"], form) if key in values else ABSENT


def with_error(value: float, stderr: float | None, form: str) -> str:
    """A figure with its standard error, if it has one: a single window shows no spread."""
    if stderr is None or math.isnan(stderr):
        return form.format(value)
    return f"{form.format(value)} ±{form.format(stderr).rstrip('%')}"


def _task(score: Mapping[str, float] | None) -> str:
    if score is None:
        return ABSENT
    metric = headline(score)
    return f"{100 * score[metric]:.1f} ±{100 * score[stderr_of(metric)]:.1f}" if metric else ABSENT


def _speed(speed: Mapping[str, Any] | None, base: Mapping[str, Any] | None) -> list[str]:
    point = first_point(speed)
    if point is None:
        return [ABSENT] * 4
    tokens = f"{point['tokens_per_s']:.1f} ±{point['tokens_per_s_iqr'] / 2:.1f}"
    beside = first_point(base)
    if beside is not None:
        together = speed is None or speed["load"].get("together", True)
        tokens += f" ({speedup(point, beside, together=together):.2f}x)"
    memory = point["peak_cuda"] or point["peak_rss"]
    kernels = "+".join(point["kernels"]) or "unquantized"
    return [f"{point['ttft_ms']:.0f}", tokens, f"{memory / 1e6:.0f}", kernels]


def first_point(speed: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The point of a speed that stands for it in the table; None if there is none, or it was refused."""
    if not speed:
        return None
    # Runs of before there were points have the figures of their only one beside its load.
    point = speed["points"][0] if "points" in speed else {**speed["load"], **speed}
    return None if "refused" in point else point


def speedup(point: Mapping[str, Any], base: Mapping[str, Any], *, together: bool = True) -> float:
    """Candidate / original: the median over the rounds, in each of which both ran, one after the other; of
    what did not run in the same rounds the ratio of the medians."""
    if not together:
        return point["tokens_per_s"] / base["tokens_per_s"]
    pairs = zip(point["rounds"]["tokens_per_s"], base["rounds"]["tokens_per_s"], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def markdown(rows: list[list[str]]) -> str:
    """Rows of cells, the first of them the header, as a table with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _asked(task: Mapping[str, Any]) -> str:
    if task["questions"] == task.get("of"):
        return f"all {task['questions']} questions"
    return f"the first {task['questions']} questions"


def legend_lines(runs: list[dict[str, Any]]) -> list[str]:
    """What the columns mean, with the settings of the newest run."""
    run = runs[-1]
    row, env = run["candidate"], run["environment"]
    lines = [
        "MB: weight files. Bits per weight: of the quantized linears with scales and zero points; of the "
        f"whole file. Not quantized: {', '.join(row['size']['kept']) or 'nothing'}."
    ]
    for name, text in row.get("texts", {}).items():
        lines.append(
            f"{name}: {text['tokens']} tokens predicted in windows of {text['window']} ({text['dtype']}); "
            "KL(original || candidate) in nats per token; ± is a standard error over windows."
        )
    for name, task in row.get("tasks", {}).items():
        metric = headline(task)
        figure = "no metric of its own, see metrics.json" if metric is None else f"{metric} in %"
        lines.append(
            f"{short(name)}: {figure}, {_asked(task)}, "
            f"{task.get('fewshot', 0)}-shot, lm-eval "
            f"{env['versions']['lm-eval']}; ± is a standard error."
        )
    if found := row.get("agreement"):
        lines.append(
            f"Agrees for: how many tokens greedy decoding writes as the original does, the mean of "
            f"{found['prompts']} prompts of {found['prompt_tokens']} tokens."
        )
    if "verdict" in row:
        lines.append("Verdict: ± is half of a 95 % interval of the change on the same tokens.")
    if "context" in row:
        context = row["context"]
        lengths = ", ".join(context["retrieval"]) or "no"
        lines.append(
            f"Cache: its bytes at the end of {context['window']} tokens over those of 16 bits. KL at length: "
            f"{context['positions']['windows']} such windows of {context['text']}, every token through the "
            f"cache ({context['dtype']}); facts found in {lengths} tokens of it. See context.md of each run."
        )
    if point := first_point(row.get("speed")):
        load = row["speed"]["load"]
        rounds, ratio = (
            ("interleaved rounds", "in the rounds of the same run")
            if load.get("together", True)
            else ("requests, one model AFTER the other", "of the medians")
        )
        lines.append(
            f"Speed: {pattern_of(point)} tokens in/out, "
            f"batch {point['batch']}, median of {load['repeats']} {rounds}, ± half the interquartile "
            f"range, (x) the ratio to the original {ratio}; peak memory "
            f"{'while decoding' if row['speed']['memory_since_load'] else 'of the process'}. "
            f"{env['device']}, torch {env['versions']['torch']}."
        )
    settings = [
        # Runs of before there was a context have no such key.
        [*map(r["recipe"].get, ("eval", "context", "speed")), r["environment"]["device"]]
        for r in runs
    ]
    if any(other != settings[-1] for other in settings):
        lines.append(
            "NOT ALL ROWS are measured with these settings or on this device: see each metrics.json."
        )
    return lines + apart(runs)


def apart(runs: list[dict[str, Any]]) -> list[str]:
    """What may differ between rows of several thread counts, devices or versions of torch; nothing of one."""
    environments = [run["environment"] for run in runs]
    given = {
        "threads": [env.get("threads") for env in environments],
        "devices": [env["device"] for env in environments],
        "versions of torch": [env["versions"]["torch"] for env in environments],
    }
    several = {
        what: dict.fromkeys(str(value) for value in values if value is not None)
        for what, values in given.items()
    }
    named = [
        f"{' and '.join(values)} ({what})" for what, values in several.items() if len(values) > 1
    ]
    if not named:
        return []
    return [
        f"Rows were made with {'; '.join(named)}: sums are taken in another order there, so the same recipe "
        "may round some codes otherwise and end in other bytes; figures of such rows that are within each "
        "other's errors tell nothing (docs/architecture.md, What is the same in every run)."
    ]
