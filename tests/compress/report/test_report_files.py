"""The files of a comparison: figures are those of metrics.json, names stay names."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from compress.errors import UserError
from compress.report.files import write_report
from compress.report.html.data import page_data, recipe_lines, script_json
from compress.report.html.figures import figures_of
from compress.report.html.page import report_page
from compress.report.latex import escaped
from compress.report.measures import accuracy_measures, points_of, speed_measures
from compress.report.serving import Section
from compress.report.table import find_runs, legend_lines, rows_of
from compress.report.terminal import comparison
from tests.report_runs import TEXTS, odd_runs, run_of, speed_of, sweep, write_runs

EVIL = "<script>alert(1)</script></script>\"'&|_#$%{x}~^\\ [red]a[/red]"


@pytest.fixture
def runs(tmp_path: Path) -> list[dict[str, Any]]:
    made = [
        run_of("rtn-int4", kl=0.3123, seed=1),
        run_of("awq-int4", kl=0.1115, seed=2),
        run_of("fp8", bits=8, kl=0.0004, factor=1.5, seed=3, model="qwen"),
    ]
    return find_runs([write_runs(tmp_path / "outputs", made)])


def written(runs: list[dict[str, Any]], folder: Path) -> dict[str, str]:
    return {
        file.name: file.read_text(encoding="utf-8") for file in write_report(runs, None, folder)
    }


class Page(HTMLParser):
    """What a browser would make of the page: its elements, the text of its cells, its links."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.cells: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [str(value) for name, value in attrs if name in ("href", "src")]
        if tag == "td":
            self.cells.append("")
        self._in_cell = tag == "td"

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_csv_has_every_figure(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(written(runs, tmp_path / "r")["table.csv"])))
    assert [row["name"] for row in rows] == [
        "smollm2 (original)", "rtn-int4", "awq-int4", "qwen (original)", "fp8",
    ]  # fmt: skip
    for row, run in ((rows[1], runs[0]), (rows[4], runs[2])):
        ours = run["candidate"]
        for text, found in ours["texts"].items():
            for key in ("perplexity", "kl", "kl_p999", "top1"):
                assert float(row[f"texts.{text}.{key}"]) == found[key]
            assert float(row[f"texts.{text}.paired.nll.high"]) == found["paired"]["nll"]["high"]
        assert int(row["size.bytes"]) == ours["size"]["bytes"]
        assert row["verdict.text"] == ours["verdict"]["text"]
        assert float(row["tasks.packaged_piqa.paired.p"]) == 0.27
        for point in ours["speed"]["points"]:
            key = (
                f"speed.batch {point['batch']}, {point['input_length']}/32 tokens in/out, compress on "
                "2 x AMD EPYC"
            )
            assert float(row[f"{key}.tokens_per_s"]) == point["tokens_per_s"]
            assert float(row[f"{key}.e2e_ms"]) == point["e2e_ms"]
        assert row["folder"] == run["folder"]
    noise = runs[0]["base"]["texts"][TEXTS[0]]["noise"]
    assert float(rows[0][f"texts.{TEXTS[0]}.noise.kl"]) == noise["kl"]
    assert rows[1][f"texts.{TEXTS[0]}.noise.kl"] == ""


def test_tables_have_the_same_figures(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    texts = written(runs, tmp_path / "r")
    for run in runs:
        ours, base = run["candidate"], run["base"]
        found = ours["texts"][TEXTS[1]]
        cells = [
            run["name"],
            f"{ours['size']['bytes'] / 1e6:.1f}",
            f"{found['perplexity']:.2f} ±{found['perplexity_stderr']:.2f}",
            f"{found['kl']:.4f} ±{found['kl_stderr']:.4f}",
            ours["verdict"]["text"],
        ]
        (line,) = (x for x in texts["table.md"].splitlines() if x.startswith(f"| {run['name']} "))
        assert set(cells) <= {cell.strip() for cell in line.split("|")}
        (line,) = (x for x in texts["table.tex"].splitlines() if x.startswith(f"{run['name']} &"))
        assert line.endswith(r"\\")
        set_cells = {cell.strip(" \\") for cell in line.split(" & ")}
        assert {cell.replace("±", r"$\pm$") for cell in cells} <= set_cells
        assert set(cells) <= set(Page(texts["report.html"]).cells)
        ratio = (
            ours["speed"]["points"][0]["tokens_per_s"] / base["speed"]["points"][0]["tokens_per_s"]
        )
        (line,) = (x for x in comparison(runs).splitlines() if x.startswith(f"{run['name']} "))
        assert float(re.findall(r"\(([\d.]+)x\)", line)[0]) == pytest.approx(ratio, rel=0.05)
        assert f"{max(t['kl'] for t in ours['texts'].values()):.4f}" in line
    assert "**qwen**\n\n- 1 of 1 passes the gate" in texts["table.md"]
    assert texts["table.tex"].count(r"\midrule") == 2


def test_the_data_of_the_page_are_those_of_the_runs(
    runs: list[dict[str, Any]], tmp_path: Path
) -> None:
    page = written(runs, tmp_path / "r")["report.html"]
    data = data_of(page)
    by_title = {m["title"]: m for m in data["accuracy"]}
    kl = by_title[f"KL of {TEXTS[0]}, nats per token"]
    assert kl["values"] == [0.00012, 0.3123, 0.1115, 0.00012, 0.0004]
    paired = [run["candidate"]["texts"][TEXTS[0]]["paired"] for run in runs]
    assert kl["low"][1] == pytest.approx(paired[0]["kl"]["low"], rel=1e-4)
    ratio = by_title[f"perplexity over the original's, {TEXTS[0]}"]
    assert ratio["values"][2] == pytest.approx(math.exp(paired[1]["nll"]["mean"]), rel=1e-4)
    assert ratio["high"][2] == pytest.approx(math.exp(paired[1]["nll"]["high"]), rel=1e-4)
    assert by_title["piqa, points over the original"]["values"] == [0.0, -1.0, -1.0, 0.0, -1.0]
    assert data["size"][0]["values"][0] == pytest.approx(269.06, rel=1e-4)
    key = "batch 8, 512/32 tokens in/out, compress on 2 x AMD EPYC"
    point = runs[1]["candidate"]["speed"]["points"][3]
    drawn = data["points"][key][2]
    assert drawn["tokens_per_s"] == pytest.approx(point["tokens_per_s"], rel=1e-4)
    assert drawn["e2e_ms"] == pytest.approx(point["rounds"]["e2e_ms"], rel=1e-4)
    assert drawn["itl_by_position"]["positions"] == point["itl_by_position"]["positions"]
    assert data["blocks"][1][TEXTS[0]] == pytest.approx(
        runs[0]["compression"]["block_kl"][TEXTS[0]], rel=1e-4
    )
    assert data["predicted"][1]["said"]["itl_ms"] == pytest.approx(5.05)
    assert "awq-int4" in data["rows"][2]["hover"]
    assert "transforms: {awq_scale: {grid: 20}}" in data["rows"][2]["hover"]


def test_the_page_is_whole_and_asks_nothing(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    page = written(runs, tmp_path / "r")["report.html"]
    parsed = Page(page)
    outside = [link for link in parsed.links if not link.startswith(("#", "./"))]
    assert outside == []
    assert "./../outputs/run%200/" in parsed.links
    assert (tmp_path / "r" / "./../outputs/run 0/").is_dir()
    assert page.count("plotly.js v") == 1
    assert "default-src 'none'" in page
    assert html.escape("stages:\n- quantize\n") in page


def test_names_stay_names(tmp_path: Path) -> None:
    evil = run_of(EVIL, model=EVIL)
    for row in ("base", "candidate"):
        evil[row]["texts"] = {EVIL: evil[row]["texts"][TEXTS[0]]}
        evil[row]["tasks"] = {EVIL: evil[row]["tasks"]["packaged_piqa"]}
    evil["recipe"]["model"]["source"] = EVIL
    evil["candidate"]["verdict"]["text"] = EVIL
    evil["environment"]["device"] = EVIL
    evil["candidate"]["context"] = {
        "text": '" onmouseover="alert(1)',
        "window": 64,
        "dtype": "float32",
        "positions": {"bucket_kl": [0.1], "bucket_kl_stderr": [0.1], "windows": 1, "cache_bytes": 1}
        | {"kl": 0.1, "kl_stderr": 0.1},
        "retrieval": {},
    }
    evil["folder"] = str(tmp_path / "javascript:alert(1)")
    plain_runs = [run_of("x", model="y") | {"folder": "z"}]
    texts, plain = written([evil], tmp_path), written(plain_runs, tmp_path / "plain")
    page = texts["report.html"]
    # The same elements as of a page with harmless names, but for columns that do not differ here.
    tags, harmless = Page(page).tags, Page(plain["report.html"]).tags
    for tag in ("script", "body", "section", "style", "main", "a"):
        assert tags.count(tag) == harmless.count(tag), tag
    assert "onmouseover" not in Page(page).attributes
    assert "<script>alert" not in page
    assert "./javascript%3Aalert%281%29/" in Page(page).links
    data = data_of(page)
    assert data["rows"][1]["label"] == EVIL
    assert "<script" not in data["rows"][1]["hover"]
    assert "<script" not in data["accuracy"][0]["title"]
    assert "<script" not in texts["table.md"]
    table_lines = [line for line in texts["table.md"].splitlines() if line.startswith("|")]
    counts = {len(re.findall(r"(?<!\\)\|", line)) for line in table_lines}
    assert len(counts) == 1
    assert EVIL not in texts["table.tex"]
    assert EVIL in comparison([evil])
    (row,) = (r for r in csv.DictReader(io.StringIO(texts["table.csv"])) if r["row"] == "candidate")
    assert row["name"] == EVIL


def test_latex_letter_by_letter() -> None:
    assert escaped(r"a_b & 5% \x {~^} #$ <|>") == (
        r"a\_b \& 5\% \textbackslash{}x \{\textasciitilde{}\textasciicircum{}\} \#\$ "
        r"\textless{}\textbar{}\textgreater{}"
    )


def test_json_between_script_tags() -> None:
    text = script_json({"a": "</script><!--&\u2028", "b": None})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": "</script><!--&\u2028", "b": None}
    with pytest.raises(ValueError, match="JSON"):
        script_json(math.nan)


def test_runs_of_before(tmp_path: Path) -> None:
    """Without intervals, verdict, prediction, figures of blocks; one without anything but sizes; a text of
    one window, whose error is no number; a speed of before there were points."""
    old = [run_of("rtn", kl=0.3, old=True, seed=1), run_of("awq", kl=0.1, old=True, seed=2)]
    old[1]["candidate"]["texts"][TEXTS[0]]["kl_stderr"] = math.nan
    bare = run_of("bare", old=True, seed=3)
    for row in ("base", "candidate"):
        bare[row] = {"size": bare[row]["size"]}
    oldest = run_of("oldest", old=True, seed=4)
    for row in ("base", "candidate"):
        speed = speed_of(2.0, old=True)
        point = speed.pop("points")[0]
        oldest[row]["speed"] = (
            speed | point | {"load": speed["load"] | {"batch": 1, "output_length": 32}}
        )
    del oldest["compression"]
    runs = find_runs([write_runs(tmp_path / "o", [*old, bare, oldest])])
    data = data_of(written(runs, tmp_path / "r")["report.html"])
    kl = data["accuracy"][0]
    assert kl["values"] == [None, 0.3, 0.1, None, 0.1]
    assert kl["low"][1] == pytest.approx(0.3 - 1.96 * 0.3 / 40)
    assert kl["low"][2] is None
    assert data["figures"] == {}
    assert "verdict" not in comparison(runs)
    assert "oldest" in comparison(runs)


def test_odd_runs(tmp_path: Path) -> None:
    runs = find_runs([write_runs(tmp_path / "o", odd_runs())])
    texts = written(runs, tmp_path / "r")
    data = data_of(texts["report.html"])
    labels = [row["label"] for row in data["rows"]]
    assert labels[1:] == ["engines", "quiet", "fast", "short", "broken", "closed"]
    kl = data["accuracy"][0]
    assert kl["values"] == [0.00012, 0.01, 0.02, None, 0.04, None, 0.06]
    assert (kl["low"][4], kl["high"][4]) == (None, None)
    assert all("group" not in measure["title"] for measure in data["accuracy"])
    # Each engine by itself; what it refused is not there.
    vllm = [key for key in data["points"] if ", vllm on " in key]
    assert len(vllm) == 3
    assert data["points"][vllm[0]][1]["of"] == "vllm on 2 x AMD EPYC"
    (mix,) = (key for key in data["points"] if "16-512/2-32" in key)
    assert data["points"][mix][1]["mix"]
    assert data["points"][mix][1]["pattern"] == "16-512/2-32"
    rows = list(csv.DictReader(io.StringIO(texts["table.csv"])))
    assert float(rows[1]["speed.vllm.load_s"]) == 1.25
    assert float(rows[1]["tasks.packaged_piqa.paired.p"]) == 0.27
    assert float(rows[4]["tasks.group.tasks.inner.paired.p"]) == 0.27
    shown = comparison(runs, {"kl": 0.05})
    (line,) = (line for line in shown.splitlines() if line.startswith("broken "))
    assert "nan" in line
    assert "gate FAILED: kl" in line
    assert "3 of 6 pass the gate" in shown
    gate = " ".join(Page(report_page(runs, {"kl": 0.05}, Path())).cells)
    assert "KL on boolq-passages is not a number" in gate
    # The newest run refused every batch.
    assert len([key for key, points in data["points"].items() if points[0]]) == 4


def test_an_original_is_what_all_its_runs_measured() -> None:
    """Each text of the newest run that has it; the device is that of the speed."""
    first, second = run_of("first", seed=1), run_of("second", seed=2)
    del second["base"]["texts"][TEXTS[0]]
    second["base"]["texts"][TEXTS[1]]["perplexity"] = 7.0
    second["base"]["speed"] = None
    second["environment"]["device"] = "GPU"
    original = rows_of([first, second])[0]
    found = {text: values["perplexity"] for text, values in original.values["texts"].items()}
    assert found == {TEXTS[0]: 20.4, TEXTS[1]: 7.0}
    assert set(points_of(original)) == set(points_of(rows_of([first])[0]))
    # What the runs hold is left as it is.
    assert first["base"]["texts"][TEXTS[1]]["perplexity"] == 20.4


@pytest.mark.parametrize("text", ["{", "[]", '{"loss": 3}', "\xff"])
def test_another_file_of_that_name_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        UserError, match=r"metrics.json (is not valid JSON|does not hold|is not of a run)"
    ):
        find_runs([tmp_path])


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", "\t=1"])
def test_a_name_is_no_formula(name: str, tmp_path: Path) -> None:
    text = written([run_of(name)], tmp_path / "r")["table.csv"]
    rows = list(csv.DictReader(io.StringIO(text)))
    assert rows[1]["name"] == f"'{name}"
    # Figures are figures, below zero too.
    assert float(rows[1]["tasks.packaged_piqa.paired.difference"]) == -0.01


def test_a_model_without_any_measure(tmp_path: Path) -> None:
    bare = run_of("bare", old=True)
    for row in ("base", "candidate"):
        bare[row] = {"size": bare[row]["size"]}
    data = data_of(written([bare], tmp_path / "r")["report.html"])
    assert (data["accuracy"], data["points"], data["speed"]) == ([], {}, {})
    assert "No accuracy was measured." in comparison([bare])


def test_the_gate_is_in_the_page_and_on_the_terminal(runs: list[dict[str, Any]]) -> None:
    page = report_page(runs, {"kl": 0.2}, Path())
    cells = Page(page).cells
    assert cells.count("passed") == 2
    assert any(cell.startswith("KL 0.3123 on sotu-since-2009 is above 0.2") for cell in cells)
    assert "FAILED: kl" in comparison(runs, {"kl": 0.2})


def test_lines_fit_the_terminal() -> None:
    runs = sweep(5)
    assert max(map(len, comparison(runs, None, 90).splitlines())) <= 90
    wide = comparison(runs).splitlines()
    assert sum(line.startswith("recipe-") for line in wide) == 5


def test_rows_of_other_machines_are_told() -> None:
    one, other, same = run_of("x", seed=1), run_of("y", seed=2), run_of("z", seed=3)
    other["environment"] |= {"threads": 1, "device": "4 x EPYC"}
    said = "2 and 1 (threads); 2 x AMD EPYC and 4 x EPYC (devices): sums are taken in another order"
    for told in (comparison([one, other]), "\n".join(legend_lines([one, other]))):
        assert said in told
    # Runs of before may not say on how many threads they were.
    del same["environment"]["threads"]
    assert "another order" not in comparison([one, same])


def test_runs_of_one_name_are_told_apart() -> None:
    labels = [row.label for row in rows_of([run_of("x", seed=1), run_of("x", seed=2)])]
    assert len(set(labels)) == 3
    assert all(label.startswith("x of 2026") for label in labels[1:])


def test_a_folder_named_twice_counts_once(tmp_path: Path) -> None:
    outputs = write_runs(tmp_path / "o", [run_of("x")])
    assert len(find_runs([outputs, outputs / "run 0"])) == 1


def test_a_hundred_runs(tmp_path: Path) -> None:
    runs = find_runs([write_runs(tmp_path / "o", sweep(100))])
    texts = written(runs, tmp_path / "r")
    assert len(texts["table.csv"].splitlines()) == 102
    data = data_of(texts["report.html"])
    assert len(data["rows"]) == 101
    assert len(data["figures"]) == 100
    assert len(comparison(runs).splitlines()) > 102


def test_more_sections(runs: list[dict[str, Any]]) -> None:
    figure = {
        "data": [{"type": "heatmap", "z": [[1, math.nan]]}],
        "layout": {"title": {"text": "t"}},
    }
    page = report_page(runs, None, Path(), [Section("Who reads <what>", "By block.", figure)])
    assert "<h2>Who reads &lt;what&gt;</h2><pre>By block.</pre><figure" in page
    assert data_of(page)["extra"] == [figure | {"data": [{"type": "heatmap", "z": [[1, None]]}]}]


def test_figures_of_a_run() -> None:
    run = run_of("x", kl=0.1)
    found = {f["layout"]["title"]["text"]: f["data"] for f in figures_of(run)}
    errors = found["Relative output error of every linear"][0]
    assert errors["customdata"][0] == [
        b["linears"]["self_attn.q_proj"]["relative_error"] for b in run["compression"]["blocks"]
    ]
    assert errors["z"][0][0] == pytest.approx(math.log10(errors["customdata"][0][0]))
    assert errors["y"] == ["q", "k", "gate", "down"]
    bits = found["Bits of the linears: 3.50 on average, 60.0 MB"][0]
    groups = run["compression"]["search"]["groups"]
    assert bits["z"][1] == [groups[f"model.layers.{i}.mlp.gate_proj"]["bits"] for i in range(6)]
    outliers = found["Input columns with |x| of 6 or more"][0]
    # None where there is none: it has no logarithm.
    assert outliers["z"][0][0] is None
    assert outliers["customdata"][0][1] == pytest.approx(100 / 576)
    stays, gone = found["What every block changes: those that stay, and those that are gone"]
    assert (stays["x"], gone["x"]) == ([0, 1, 2, 4, 5], [3])
    heads = found["Outputs of the attention heads, over the block's largest (crosses: gone)"]
    assert heads[1]["x"] == [0, 1, 2, 4, 5]
    assert set(heads[1]["y"]) == {"2"}
    channels = found["Channels of the residual stream, sorted: 24 of 32 stay"][0]["y"]
    assert channels == sorted(channels, reverse=True)


def test_figures_of_a_distillation_and_of_length() -> None:
    run = run_of("x", old=True)
    run["compression"]["distill"] = {
        "curve": [{"tokens": 80, "kl": 0.5}, {"tokens": 160, "kl": 0.3}],
        "held_out": [{"step": 20, "kl": 0.4}],
        "held_out_top_k": 64,
        "tokens": 160,
        "steps": 20,
    }
    run["candidate"]["context"] = {
        "text": "long",
        "window": 4096,
        "positions": {"bucket_kl": [0.1, 0.2], "bucket_kl_stderr": [0.01, 0.02]},
        "heads": {"keys": [[0.1, 0.2, 0.3], [0.4, 0.5, 0.0]]},
    }
    distilled, positions, heads = figures_of(run)
    held, training = distilled["data"]
    assert (held["x"], held["y"]) == ([160.0], [0.4])
    assert "lower bound" in held["name"]
    assert training["y"] == [0.5, 0.3]
    assert positions["data"][0]["x"] == [1024.0, 3072.0]
    assert heads["data"][0]["customdata"] == [[0.1, 0.4], [0.2, 0.5], [0.3, 0.0]]
    assert heads["data"][0]["z"][2][1] is None


def test_recipe_lines_say_what_is_made() -> None:
    recipe = {
        "stages": ["quantize"], "scheme": {"bits": 4, "inputs": None}, "repair": {}, "eval": {"tokens": 9},
        "data": {"source": "+".join(["a-very-long-text"] * 9)},
    }  # fmt: skip
    lines = recipe_lines(recipe)
    assert lines[:2] == ["stages: [quantize]", "scheme: {bits: 4}"]
    assert "tokens" not in " ".join(lines)
    assert max(map(len, lines)) <= 100


def test_every_measure_has_a_value_a_row() -> None:
    rows = rows_of(sweep(4))
    measures = accuracy_measures(rows) + [
        m for found in speed_measures(rows).values() for m in found
    ]
    assert {len(measure.values) for measure in measures} == {5}
    assert len(speed_measures(rows)) == 4
    assert len(page_data(rows)["speed"]) == 4


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "r" / "table.csv").mkdir(parents=True)
    with pytest.raises(UserError, match=r"r cannot be written: Is a directory"):
        write_report([run_of("x")], None, tmp_path / "r")
