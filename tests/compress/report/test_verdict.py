"""The verdict's line and the gate, from rows written by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from compress.report.gate import failures
from compress.report.verdict import passed, verdict


def _text(
    nll: float, half: float, p: float | None, kl: float = 0.02, top1: float = 0.9
) -> dict[str, Any]:
    change = {"mean": nll, "low": nll - half, "high": nll + half, "p": p}
    return {"kl": kl, "top1": top1, "paired": {"nll": change}}


def _task(gained: int, lost: int, p: float) -> dict[str, Any]:
    return {"paired": {"difference": (gained - lost) / 200, "gained": gained, "lost": lost, "p": p}}


BASE = {"texts": {"far": {"noise": {"dtype": "bfloat16", "kl": 0.001}}}}


def test_no_measurable_loss() -> None:
    row = {
        "texts": {"near": _text(0.001, 0.002, 0.4, 0.003), "far": _text(-0.01, 0.02, 0.3, 0.004)}
    }
    found = verdict(row, BASE, {})
    assert found == {
        "text": "no measurable loss (at most 0.0100 nats per token); KL 0.0040 on far (noise of "
        "bfloat16: 0.0010)",
        "measurable": False,
        "gate": None,
    }
    assert passed(found)


def test_a_loss_names_its_place_and_size() -> None:
    row = {
        "texts": {"near": _text(0.05, 0.01, 0.001), "far": _text(0.09, 0.02, 0.001, 0.12)},
        "tasks": {"quiz": _task(3, 20, 0.001), "other": _task(5, 9, 0.4)},
    }
    found = verdict(row, BASE, {})
    assert found["measurable"]
    assert found["text"] == (
        "loss of 0.0900 ±0.0200 nats per token on far (perplexity +9.4%); "
        "8.5 points on quiz (20 answers lost, 3 gained)"
    )


def test_a_lopsided_interval_tells_its_ends() -> None:
    change = {"mean": 0.0975, "low": 0.018, "high": 0.2259, "p": 0.002}
    row = {"texts": {"near": {"kl": 0.4, "top1": 0.5, "paired": {"nll": change}}}}
    assert verdict(row, {}, {})["text"].startswith(
        "loss of 0.0975 (0.0180 to 0.2259) nats per token"
    )


def test_a_gain_is_no_loss() -> None:
    row = {"texts": {"near": _text(-0.05, 0.01, 0.001)}, "tasks": {"quiz": _task(20, 3, 0.001)}}
    assert verdict(row, {}, {})["text"] == (
        "no measurable loss (at most -0.0400 nats per token); KL 0.0200 on near"
    )


def test_many_comparisons_need_more() -> None:
    """One p of .03 counts alone, and not as the smallest of four."""
    alone = {"texts": {"near": _text(0.05, 0.04, 0.03)}}
    assert verdict(alone, {}, {})["measurable"]
    among = {
        "texts": {"near": _text(0.05, 0.04, 0.03)} | {f"{i}": _text(0, 1, 0.9) for i in range(3)}
    }
    assert not verdict(among, {}, {})["measurable"]


def test_nothing_compared_is_no_verdict() -> None:
    assert verdict({"texts": {"near": {"perplexity": 3.0}}, "tasks": {}}, {}, {}) is None
    assert passed(None)


def test_too_little_text_finds_nothing() -> None:
    change = {"mean": 0.5, "low": None, "high": None, "p": None}
    row = {"texts": {"near": {"kl": 0.4, "top1": 0.5, "paired": {"nll": change}}}}
    found = verdict(row, {}, {})
    assert found["measurable"] is None
    assert found["text"] == "too few tokens of near to tell a loss; KL 0.4000 on near"


def test_a_broken_candidate_has_lost() -> None:
    change = {"mean": math.nan, "low": None, "high": None, "p": None}
    broken = {"kl": math.nan, "top1": 0.0, "paired": {"nll": change}}
    found = verdict({"texts": {"near": _text(0, 1, 0.9), "far": broken}}, BASE, {"kl": 1.0})
    assert found["measurable"]
    assert found["text"] == "loss without bound: log-probabilities on far are not finite"
    assert found["gate"]["failed"] == ["KL on far is not a number"]
    assert not passed(found)


def test_a_text_and_a_task_of_one_name_are_two() -> None:
    row = {"texts": {"boolq": _text(0.09, 0.02, 0.001)}, "tasks": {"boolq": _task(5, 9, 0.4)}}
    assert verdict(row, {}, {})["text"].startswith("loss of 0.0900 ±0.0200 nats per token on boolq")


@pytest.mark.parametrize("limit", [0.03, 0.01])
def test_gate(limit: float) -> None:
    row = {"texts": {"near": _text(0.05, 0.01, 0.001)}}
    found = verdict(row, {}, {"kl": limit})
    failed = failures(row, {}, {"kl": limit})
    assert bool(failed) == (limit < 0.02)
    assert found["gate"] == {"limits": {"kl": limit}, "passed": not failed, "failed": failed}
    assert passed(found) == (not failed)
