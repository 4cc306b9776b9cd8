"""The report: one HTML file with everything in it, which asks nothing of any network.

Every name that a recipe or a model brings is escaped where it is put into the page; the policy in its head
forbids the page to load anything even so.
"""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from plotly.offline import get_plotlyjs

from compress.report.best import answers
from compress.report.html.data import page_data, rounded, script_json
from compress.report.html.figures import Figure
from compress.report.html.tables import tables
from compress.report.serving import Section
from compress.report.table import ABSENT, Row, rows_of, verdict_of

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)


def report_page(
    runs: list[dict[str, Any]],
    limits: Mapping[str, float] | None,
    folder: Path,
    extra: Sequence[Section] = (),
) -> str:
    """The page about the runs, as find_runs gives them. limits: the gate, None if none was asked for

    folder: where it will lie, which links to the folders of the runs start from
    extra: more to show below the plots of speed
    """
    rows = rows_of(runs)
    data = page_data(rows) | {"extra": [rounded(section.figure) for section in extra]}
    parts = [
        _answers(rows, limits),
        _chooser(rows),
        _plots("accuracy", "Accuracy against size and speed", _ACCURACY),
        tables(rows, limits, runs),
        _plots("speed", "Speed", _SPEED),
        *[_section(i, section) for i, section in enumerate(extra)],
        _plots("blocks", "Loss by block", _BLOCKS),
        _details(rows, data["figures"], folder),
    ]
    title = f"Report of {len(runs)} runs"
    return _PAGE.format(
        title=title,
        about=_e(", ".join(dict.fromkeys(run["model"]["name"] for run in runs))),
        policy=POLICY,
        style=_packaged("style.css"),
        body="\n".join(parts),
        data=script_json(data),
        plotly=get_plotlyjs(),
        script=_packaged("script.js"),
    )


def _packaged(name: str) -> str:
    return (files("compress.report.html") / name).read_text(encoding="utf-8")


_e = html.escape

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<a class="skip" href="#main">To the content</a>
<header>
<div><h1>{title}</h1><p>{about}</p></div>
<button type="button" id="theme" aria-pressed="false">Dark</button>
</header>
<nav aria-label="Sections">
<a href="#answers">Answers</a> <a href="#runs">Runs</a> <a href="#accuracy">Accuracy</a>
<a href="#tables">Tables</a> <a href="#speed">Speed</a> <a href="#blocks">Blocks</a>
<a href="#details">Details</a>
</nav>
<main id="main">
{body}
</main>
<script type="application/json" id="data">{data}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""

# What script.js draws: the id of each plot, and the choices above them.
_ACCURACY = (
    (
        ("y", "Accuracy"),
        ("x", "Size"),
        ("point", "Speed at"),
        ("rate", "Speed as"),
    ),
    (("by-size", "Accuracy against size"), ("by-speed", "Accuracy against decode speed")),
)
_SPEED = (
    ("at", "Requests"),
), (
    ("throughput", "Throughput against batch size"),
    ("ttft", "Time to the first token against tokens in"),
    ("itl", "Time between tokens by position"),
    ("total", "Total time of a request"),
    ("predicted", "Predicted beside measured"),
)  # fmt: skip
_BLOCKS = (("text", "Text"),), (("block-kl", "KL of each block alone"),)


def _plots(
    name: str,
    title: str,
    content: tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]],
) -> str:
    choices, plots = content
    selects = "".join(
        f'<label>{_e(label)} <select id="choose-{key}"></select></label>' for key, label in choices
    )
    figures = "".join(
        f'<figure id="{key}" class="plot" role="img" aria-label="{_e(label)}"></figure>'
        for key, label in plots
    )
    return (
        f'<section id="{name}"><h2>{_e(title)}</h2><div class="choices">{selects}</div>'
        f'<div class="plots">{figures}</div></section>'
    )


def _section(index: int, section: Section) -> str:
    figure = (
        f'<figure class="plot" data-extra="{index}" role="img" aria-label="{_e(section.title)}">'
    )
    return (
        f"<section><h2>{_e(section.title)}</h2><pre>{_e(section.text)}</pre>"
        f"{'' if section.figure is None else figure + '</figure>'}</section>"
    )


def _answers(rows: list[Row], limits: Mapping[str, float] | None) -> str:
    found = answers(rows, limits)
    parts = [
        f"<h3>{_e(model)}</h3><ul>{''.join(f'<li>{_e(text)}</li>' for text in sentences)}</ul>"
        for model, sentences in found.items()
    ]
    return f'<section id="answers"><h2>Which to take</h2>{"".join(parts)}</section>'


def _chooser(rows: list[Row]) -> str:
    """The one legend of all plots; a plot shows what is checked."""
    labels = "".join(
        f'<label><input type="checkbox" checked data-row="{i}"><span class="key" data-key="{i}">'
        f"</span><span>{i}. {_e(row.label)}</span></label>"
        for i, row in enumerate(rows)
    )
    return (
        '<section id="runs"><h2>Runs</h2><p>Numbers and marks are the same in all plots, which show what is '
        'checked here. <button type="button" id="all">All</button> '
        '<button type="button" id="none">None</button></p>'
        f'<div class="legend" role="group" aria-label="Runs that are shown">{labels}</div></section>'
    )


def _details(rows: list[Row], figures: Mapping[str, list[Figure]], folder: Path) -> str:
    parts = [
        _run_details(i, row, figures.get(str(i), []), folder)
        for i, row in enumerate(rows)
        if row.base is not None
    ]
    return (
        '<section id="details"><h2>Details of every run</h2>'
        '<p><button type="button" id="open">Open all</button></p>'
        f"{''.join(parts)}</section>"
    )


def _run_details(index: int, row: Row, figures: list[Figure], folder: Path) -> str:
    facts = [("verdict", verdict_of(row)), ("folder", None)]
    environment = row.run["environment"]
    facts += [
        (name, str(environment[name])) for name in ("date", "device", "threads", "commit", "python")
        if name in environment
    ]  # fmt: skip
    facts.append(
        ("versions", ", ".join(f"{k} {v}" for k, v in environment.get("versions", {}).items()))
    )
    lines = [
        f"<dt>{_e(name)}</dt><dd>{_link(row, folder) if name == 'folder' else _e(text or ABSENT)}</dd>"
        for name, text in facts
    ]
    recipe = yaml.safe_dump(row.run["recipe"], sort_keys=False, allow_unicode=True)
    plots = "".join(
        f'<figure class="plot" data-run="{index}" data-figure="{k}" role="img" '
        # A title is escaped for Plotly, which leaves quotes as they are.
        f'aria-label="{_e(html.unescape(figure["layout"]["title"]["text"]))}"></figure>'
        for k, figure in enumerate(figures)
    )
    return (
        f'<details class="run" id="run-{index}"><summary>{index}. {_e(row.label)}</summary>'
        f'<dl>{"".join(lines)}</dl><details class="recipe"><summary>Recipe</summary>'
        f'<pre>{_e(recipe)}</pre></details><div class="plots">{plots}</div></details>'
    )


def _link(row: Row, folder: Path) -> str:
    """To a run's folder, from where the page lies."""
    where = row.run.get("folder")
    if where is None:
        return ABSENT
    path = Path(os.path.relpath(where, folder)).as_posix()
    # Never a scheme: a folder may be called javascript:.
    return f'<a href="./{_e(quote(path))}/">{_e(path)}</a>'
