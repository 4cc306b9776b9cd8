"""The comparison as files: a page, and the wide table in three forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.report.best import answers
from compress.report.html.page import report_page
from compress.report.latex import latex_table
from compress.report.serving import Section
from compress.report.spreadsheet import csv_table
from compress.report.table import plain_markdown, rows_of, table


def write_report(
    runs: list[dict[str, Any]],
    limits: Mapping[str, float] | None,
    folder: Path,
    extra: Sequence[Section] = (),
) -> list[Path]:
    """Write report.html, table.csv, table.md and table.tex; what an earlier one left is replaced.

    extra: more for the page and for table.md
    """
    texts = report_texts(runs, limits, folder, extra)
    try:
        folder.mkdir(exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror}") from None
    return [folder / name for name in texts]


def report_texts(
    runs: list[dict[str, Any]],
    limits: Mapping[str, float] | None,
    folder: Path,
    extra: Sequence[Section] = (),
) -> dict[str, str]:
    """What ``write_report`` writes, by the names of the files."""
    rows = rows_of(runs)
    return {
        "report.html": report_page(runs, limits, folder, extra),
        "table.csv": csv_table(rows),
        "table.md": "\n".join(
            [table(runs), _answers_markdown(answers(rows, limits))]
            + [f"## {section.title}\n\n{section.text}" for section in extra]
        ),
        "table.tex": latex_table(rows),
    }


def _answers_markdown(found: Mapping[str, list[str]]) -> str:
    parts = []
    for model, sentences in found.items():
        lines = "\n".join(f"- {plain_markdown(sentence)}" for sentence in sentences)
        parts.append(f"**{plain_markdown(model)}**\n\n{lines}\n")
    return "\n".join(parts)
