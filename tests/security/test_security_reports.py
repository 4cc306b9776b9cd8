"""Runs of strangers: whatever text stands in a metrics.json, pages, cards and tables show it as text."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from compress.commands import compare, export
from compress.errors import UserError
from compress.model.folder import write_json
from compress.report.card import Base, Serving, model_card
from compress.report.files import report_texts
from compress.report.table import find_runs, plain_markdown
from compress.report.terminal import comparison
from tests.report_runs import run_of

EVIL = (
    "\"'><script>evil()</script><img src=x onerror=evil()></style></title><!-- ${7*7} "
    "[a](javascript:evil()) ![b](http://evil/t.png) `evil` \u2028"
)
# Read as times, or chosen from by name.
KEPT = {"date", "fingerprint", "kind"}


class Elements(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.values: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.values += [value or "" for name, value in attrs if name in ("href", "src")]


def texts_in(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all text, and of all keys of tables, in nested JSON."""
    if isinstance(value, str) and where[-1] not in KEPT:
        yield where
    for key, inner in (
        value.items()
        if isinstance(value, dict)
        else (enumerate(value) if isinstance(value, list) else ())
    ):
        yield from texts_in(inner, (*where, key))


def spoiled(run: dict[str, Any]) -> dict[str, Any]:
    """Every text of a run with markup behind it, and the names of its texts and tasks."""
    for where in list(texts_in(run)):
        holder: Any = run
        for key in where[:-1]:
            holder = holder[key]
        holder[where[-1]] += EVIL
    for row in ("base", "candidate"):
        for section in ("texts", "tasks"):
            run[row][section] = {f"{name}{EVIL}": v for name, v in run[row][section].items()}
    run["environment"]["versions"][EVIL] = "1"
    return run


@pytest.fixture
def evil(tmp_path: Path) -> list[dict[str, Any]]:
    for name in ("awq-int4", "rtn-int4"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        write_json(tmp_path / "runs" / name / "metrics.json", spoiled(run_of(name)))
    return find_runs([tmp_path / "runs"])


def test_a_page_has_no_element_that_a_run_brought(
    evil: list[dict[str, Any]], tmp_path: Path
) -> None:
    plain = [run_of(name) | {"folder": name} for name in ("awq-int4", "rtn-int4")]
    page, harmless = (
        Elements(report_texts(runs, {"kl": 0.05}, tmp_path)["report.html"])
        for runs in (evil, plain)
    )
    for tag in (
        "script",
        "style",
        "title",
        "section",
        "main",
        "body",
        "a",
        "meta",
        "iframe",
        "link",
    ):
        assert page.tags.count(tag) == harmless.tags.count(tag), tag
    assert "img" not in page.tags
    assert page.attributes == harmless.attributes
    assert all(value.startswith(("#", "./")) for value in page.values)
    text = report_texts(evil, None, tmp_path)["report.html"]
    assert "<script>evil" not in text
    assert "<img src=x" not in text
    # There it stands, as text.
    assert "&lt;script&gt;evil()" in text


def test_tables_and_terminals(evil: list[dict[str, Any]], tmp_path: Path) -> None:
    texts = report_texts(evil, None, tmp_path)
    assert "<script" not in texts["table.md"]
    assert not re.search(r"\]\(", texts["table.md"])
    rows = list(csv.DictReader(io.StringIO(texts["table.csv"])))
    assert not [v for row in rows for v in row.values() if v.startswith(("=", "+", "@"))]
    evil[0]["name"] = "a\x1b]0;owned\x07\u202eb"
    shown = comparison(evil)
    assert all(line.isprintable() for line in shown.split("\n"))
    assert r"a\x1b]0;owned" in shown


def test_a_card_is_the_card(tmp_path: Path) -> None:
    run = run_of("awq-int4")
    run["name"] = "awq-int4\n# Own title\n```\n<b>`code`"
    run["recipe"]["data"] = {"source": EVIL, "seed": "a\n\n```\n\n[x](y)\n", "field": "~~~\n````\n"}
    run["compression"]["calibration_tokens"] = [4, 64]
    licence = {"license": f"mit\n---\n# Own title {EVIL}", "license_link": "a: b\n---\nx: y"}
    card = model_card(
        run,
        Base(f"name{EVIL}", None, licence),
        [Serving("vllm 1", "vllm serve FOLDER", (EVIL,))],
        title=f"title{EVIL}",
        format_name="gptq",
        measured=True,
    )
    top, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "# Own title" in top
    outside, fence = [], ""
    for line in body.splitlines():
        mark = re.match(r" {0,3}(`{3,})", line)
        if not fence and mark:
            fence = mark[1]
        elif fence and mark and len(mark[1]) >= len(fence):
            fence = ""
        elif not fence and not line.startswith("    "):
            outside.append(line)
    assert fence == ""
    # Without what is code in a line.
    told = re.sub(r"`[^`\n]*`", "", "\n".join(outside))
    assert "<" not in told
    assert not re.search(r"\]\(", told)
    titles = [line for line in outside if line.startswith("#")]
    assert sum(line.startswith("# ") for line in titles) == 1
    assert "# Own title" not in titles


def test_plain_markdown() -> None:
    assert plain_markdown("a<b\r\nc\u2028d [x](y) [z]") == "a&lt;b c d [x]&#40;y) [z]"


@pytest.mark.parametrize(
    "change",
    [
        {"candidate": 5},
        {"candidate": {"size": {"bytes": "<b>"}}},
        {"environment": {"date": 5}},
        {"model": {"name": ["x"], "fingerprint": {}}},
        {"recipe": None},
        {"name": None},
    ],
)
def test_a_run_that_is_none_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    for i, more in enumerate(({}, change)):
        (tmp_path / str(i)).mkdir()
        write_json(tmp_path / str(i) / "metrics.json", run_of("awq-int4") | more)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "1" / "metrics.json"))):
        compare.main([str(tmp_path), "--out", str(tmp_path / "report")])
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "recipe", [5, {}, {"stages": []}, {"stages": ["../../model"]}, {"stages": "quantize"}]
)
def test_metrics_of_others_lead_an_export_nowhere(tmp_path: Path, recipe: Any) -> None:
    """The last stage is the folder that is read."""
    write_json(tmp_path / "run.json", {})
    metrics = run_of("awq-int4") | {"recipe": recipe, "compression": {"origin": {}}}
    write_json(tmp_path / "metrics.json", metrics)
    with pytest.raises(UserError, match=rf"{tmp_path / 'metrics.json'}"):
        export.main([str(tmp_path), "export=dense"])
