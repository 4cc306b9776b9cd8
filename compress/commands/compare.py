"""``compress compare DIR ...``: all finished runs below the folders side by side, on the terminal and, with
--out, as a page, CSV, Markdown and LaTeX."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from compress.commands.traffic import traffic_words
from compress.commands.words import plain
from compress.errors import UserError
from compress.model.folder import STUMBLES, reading
from compress.report.files import report_texts, write_report
from compress.report.gate import failures, read_limits
from compress.report.served import served_sections
from compress.report.serving import traffic_sections
from compress.report.table import METRICS, find_runs
from compress.report.terminal import comparison, terminal_width


def main(words: list[str]) -> int:
    """Prints the comparison; 1 if a gate was named and no candidate passes it."""
    parser = argparse.ArgumentParser("compress compare", description=plain(__doc__))
    parser.add_argument(
        "words",
        nargs="+",
        metavar="DIR|KEY=VALUE",
        help="folders such as outputs/; gate.kl, gate.perplexity, gate.top1, gate.accuracy: who passes; "
        "traffic=LOG (see compress traffic): speed weighed by the lengths of your requests",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="write report.html, table.csv, table.md and table.tex into it",
    )
    asked = parser.parse_intermixed_args(words)
    folders = [Path(word) for word in asked.words if "=" not in word or Path(word).is_dir()]
    told, rest = traffic_words([word for word in asked.words if Path(word) not in folders])
    limits = read_limits(rest) or None
    if not folders:
        raise UserError("compare needs at least one DIR")
    if asked.out is not None:
        _check_out(asked.out)
    runs = find_runs(folders)
    try:
        sections = [] if told is None else traffic_sections(told.open(), runs)
        shown = comparison(runs, limits, terminal_width(sys.stdout.isatty()))
        files = []
        if asked.out is not None:
            files = write_report(runs, limits, asked.out, [*served_sections(runs), *sections])
    except UserError:
        raise
    except STUMBLES:
        _check_runs(runs, limits)
        raise
    print(shown, end="")
    for section in sections:
        print(f"\n{section.title}\n\n{section.text}", end="")
    if asked.out is not None:
        print(f"\nWritten: {', '.join(map(str, files))}")
    failed = [failures(run["candidate"], run["base"], limits or {}) for run in runs]
    return int(all(failed))


def _check_runs(runs: list[dict[str, Any]], limits: dict[str, float] | None) -> None:
    """Raises UserError for a metrics.json that is not as a run writes it; called where one was stumbled
    over."""
    for run in runs:
        with reading(Path(run["folder"]) / METRICS):
            comparison([run], limits, terminal_width(False))
            report_texts([run], limits, Path(run["folder"]))


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is not allowed: choose a folder")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out} cannot be written: there is no folder {out.parent}")
