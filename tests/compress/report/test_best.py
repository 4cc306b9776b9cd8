"""Which run to take, by cases made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compress.errors import UserError
from compress.report import best
from compress.report.best import alike, answers, dominated
from compress.report.measures import common_points, speed_ratio
from compress.report.table import TOKENS, rows_of
from tests.report_runs import point, run_of

POINT = "batch 1, 128/32 tokens in/out, compress on 2 x AMD EPYC"


def run(name: str, size: int, kl: float, rounds: list[float] | None, **more: Any) -> dict[str, Any]:
    """A run with one point of speed, or none; the original decodes 10 tokens/s in every round."""
    found = run_of(name, kl=kl, **more)
    found["candidate"]["size"] = found["candidate"]["size"] | {"bytes": size}
    for row, speeds in (("base", [10.0] * 3), ("candidate", rounds)):
        points = [] if speeds is None else [point(1, speeds)]
        found[row]["speed"] = found[row]["speed"] | {"points": points}
    return found


def beaten(runs: list[dict[str, Any]]) -> dict[str, list[str]]:
    rows = [row for row in rows_of(runs) if row.base is not None]
    return {row.label: [other.label for other in by] for row, by in dominated(rows)}


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        # Better in all, in one, in none.
        ((100, 0.1, [20.0] * 3), (200, 0.2, [15.0] * 3), {"second": ["first"]}),
        ((100, 0.1, [20.0] * 3), (100, 0.2, [20.0] * 3), {"second": ["first"]}),
        ((100, 0.1, [20.0] * 3), (100, 0.1, [20.0] * 3), {}),
        # Each better in something.
        ((100, 0.2, [20.0] * 3), (200, 0.1, [20.0] * 3), {}),
        ((100, 0.1, [15.0] * 3), (100, 0.2, [20.0] * 3), {}),
        # Slower within the noise of the rounds: as fast. Beyond it: not.
        ((100, 0.1, [18.0, 19.0, 21.0]), (100, 0.2, [19.0, 20.0, 21.0]), {"second": ["first"]}),
        ((100, 0.1, [18.0, 18.1, 18.2]), (100, 0.2, [19.0, 20.0, 21.0]), {}),
        # A name longer in the header is no difference in size.
        ((100_050, 0.1, [20.0] * 3), (100_000, 0.2, [20.0] * 3), {"second": ["first"]}),
        ((100_500, 0.1, [20.0] * 3), (100_000, 0.2, [20.0] * 3), {}),
        # Without speeds the rest counts; of one that was measured and one that was not nothing is said.
        ((100, 0.1, None), (200, 0.2, None), {"second": ["first"]}),
        ((100, 0.1, None), (200, 0.2, [20.0] * 3), {}),
    ],
)
def test_who_beats_whom(first: Any, second: Any, found: dict[str, list[str]]) -> None:
    assert beaten([run("first", *first), run("second", *second, seed=1)]) == found


def test_other_texts_are_not_compared() -> None:
    runs = [run("first", 100, 0.1, [20.0] * 3), run("second", 200, 0.2, [15.0] * 3, seed=1)]
    runs[1]["candidate"]["texts"]["boolq-passages"]["window"] = 512
    assert beaten(runs) == {}


def test_another_device_is_another_point() -> None:
    runs = [run("cpu", 100, 0.1, [20.0] * 3), run("gpu", 200, 0.2, [15.0] * 3, seed=1)]
    runs[1]["environment"]["device"] = "GPU"
    assert beaten(runs) == {}
    assert len(common_points(rows_of(runs))) == 2


def test_sentences() -> None:
    runs = [
        run("small", 100_000_000, 0.02, [20.0, 20.5, 21.0]),
        run("fast", 120_000_000, 0.01, [29.0, 30.0, 31.0], seed=1),
        run("also", 130_000_000, 0.005, [28.0, 29.5, 31.0], seed=2),
        run("bad", 125_000_000, 0.2, [18.0, 18.0, 18.0], seed=3),
        run("exact", 200_000_000, 0.0001, None, seed=4),
        run("qwen", 200_000_000, 0.3, None, model="qwen", seed=5),
    ]
    assert answers(rows_of(runs), None) == {
        "smollm2": [
            "4 of 5 pass the gate (KL at most 0.05 on every text; no gate was given).",
            "Smallest within it: small, 100.0 MB (37% of the original, 6.75 bits per weight).",
            f"Fastest within it: fast, 3.00 times the original ({POINT}); as fast within the noise: also "
            "(2.95); 1 not measured there.",
            "No measurable loss: exact.",
            "Not worth taking: bad, for small is at least as good in size, KL and speed within the noise, "
            "and better in one.",
        ],
        "qwen": ["None of 1 passes the gate (KL at most 0.05 on every text; no gate was given)."],
    }  # fmt: skip
    strict = answers(rows_of(runs), {"kl": 0.0055})["smollm2"]
    # 0.005 on one text, 0.006 on the other.
    assert strict[0] == "1 of 5 passes the gate (KL at most 0.0055 on every text)."
    assert strict[1].startswith("Smallest within it: exact, 200.0 MB")


def test_without_accuracy_nothing_is_said_of_a_gate() -> None:
    runs = [run("one", 100, 0.1, None)]
    for row in ("base", "candidate"):
        runs[0][row] |= {"texts": {}, "tasks": {}}
    assert answers(rows_of(runs), None) == {"smollm2": ["No accuracy was measured."]}
    # One that was asked for is not passed.
    assert answers(rows_of(runs), {"kl": 0.1})["smollm2"][0].startswith("None of 1 passes")


def test_of_one_size_the_most_exact_is_the_smallest() -> None:
    """A header longer by a name decides nothing."""
    runs = [run("rough", 100_000_000, 0.04, None), run("exact", 100_000_050, 0.01, None, seed=1)]
    assert answers(rows_of(runs), None)["smollm2"][1:] == [
        "Smallest within it: exact, 100.0 MB (37% of the original, 6.75 bits per weight); of the same size: "
        "rough.",
        "Not worth taking: rough, for exact is at least as good in size and KL within the noise, and better "
        "in one.",
    ]  # fmt: skip


def test_a_ratio_is_of_the_rounds_where_both_ran() -> None:
    found = run("x", 100, 0.1, [20.0, 30.0, 90.0])
    found["base"]["speed"]["points"] = [point(1, [10.0, 20.0, 30.0])]
    (_, row) = rows_of([found])
    ratio = speed_ratio(row, POINT)
    assert ratio is not None
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 1.75, 2.5)
    for side in ("base", "candidate"):
        found[side]["speed"]["load"] = {"together": False}
    apart = speed_ratio(rows_of([found])[1], POINT)
    assert apart is not None
    assert apart.value == 1.5


def test_candidates_that_no_text_tells_apart(tmp_path: Path) -> None:
    """Two with noise of one size, a third with more of it; one whose run kept nothing by token."""
    runs = []
    for i, (kl, scale) in enumerate([(0.04, 0.3), (0.041, 0.3), (0.048, 0.4), (0.049, 0.3)]):
        found = run(f"r{i}", 100, kl, None)
        noise = torch.randn(6, 500, generator=torch.Generator().manual_seed(i))
        figures = {
            f"{text}.{key}": values
            for text in found["candidate"]["texts"]
            for key, values in (("nll", 3 + scale * noise), ("kl", (scale * noise) ** 2 / 2))
        }
        folder = tmp_path / f"r{i}"
        folder.mkdir()
        if i < 3:
            save_file(figures, folder / TOKENS)
        runs.append(found | {"folder": str(folder)})
    rows = [row for row in rows_of(runs) if row.base is not None]
    assert alike(rows) == ["Not told apart by any text, each from the next: r0, r1."]
    # What others put in its place.
    best._kept.cache_clear()
    (tmp_path / "r1" / TOKENS).write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=f"r1/{TOKENS} is not a readable safetensors file"):
        alike(rows)
    best._kept.cache_clear()
    save_file({"other": torch.ones(2)}, tmp_path / "r0" / TOKENS)
    with pytest.raises(UserError, match=f"r0/{TOKENS} does not fit together: KeyError"):
        alike(rows)
