"""Limits on what a candidate may lose, by cases made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from compress.errors import UserError
from compress.report.gate import described, failures, read_limits
from tests.report_runs import run_of

BASE: dict[str, Any] = {
    "texts": {"a": {"perplexity": 10.0}, "b": {"perplexity": 20.0}},
    "tasks": {"piqa": {"acc": 0.7, "acc_stderr": 0.03}},
}
OURS: dict[str, Any] = {
    "texts": {
        "a": {"perplexity": 11.0, "kl": 0.05, "top1": 0.9},
        # Paired counts before the two perplexities: exp(0.2) = 1.2214.
        "b": {"perplexity": 20.0, "kl": 0.07, "top1": 0.8, "paired": {"nll": {"mean": 0.2}}},
    },
    "tasks": {"piqa": {"acc": 0.68, "acc_stderr": 0.03}},
}


@pytest.mark.parametrize(
    ("limits", "failed"),
    [
        ({"kl": 0.07}, []),
        ({"kl": 0.05}, ["KL 0.0700 on b is above 0.05"]),
        (
            {"kl": 0.01},
            ["KL 0.0500 on a is above 0.01", "KL 0.0700 on b is above 0.01"],
        ),
        ({"perplexity": 1.23}, []),
        ({"perplexity": 1.2}, ["the perplexity ratio 1.2214 on b is above 1.2"]),
        ({"top1": 0.8}, []),
        ({"top1": 0.85}, ["top-1 agreement 0.8000 on b is below 0.85"]),
        ({"accuracy": 2.5}, []),
        ({"accuracy": 1.5}, ["2.00 points lost on piqa are above 1.5"]),
        (
            {"kl": 0.06, "accuracy": 1},
            ["KL 0.0700 on b is above 0.06", "2.00 points lost on piqa are above 1"],
        ),
    ],
)
def test_limits(limits: dict[str, float], failed: list[str]) -> None:
    assert failures(OURS, BASE, limits) == failed


def test_what_was_not_measured_does_not_pass() -> None:
    limits = {"kl": 1.0, "perplexity": 9.0, "top1": 0.1, "accuracy": 50.0}
    assert failures({}, {}, limits) == [
        "KL was not measured",
        "the perplexity ratio was not measured",
        "top-1 agreement was not measured",
        "no task was measured",
    ]
    alone = {"texts": {"a": {"perplexity": 3.0}}, "tasks": OURS["tasks"]}
    assert failures(alone, {}, limits) == [
        "KL was not measured on a",
        "the perplexity ratio was not measured on a",
        "top-1 agreement was not measured on a",
        "the original was not measured on piqa",
    ]


def test_a_task_without_accuracy_does_not_pass() -> None:
    tasks = {"wikitext": {"word_perplexity": 3.0}}
    assert failures({"tasks": tasks}, {"tasks": tasks}, {"accuracy": 50.0}) == [
        "there is no accuracy of wikitext"
    ]


@pytest.mark.parametrize("name", ["kl", "perplexity"])
def test_what_is_not_a_number_does_not_pass(name: str) -> None:
    text = {"kl": math.nan, "paired": {"nll": {"mean": math.nan}}}
    (clause,) = failures({"texts": {"a": text}}, {}, {name: 9.0})
    assert clause.endswith(" on a is not a number")


def test_a_lost_task_that_is_not_a_number_does_not_pass() -> None:
    broken = {"tasks": {"piqa": {"acc": math.nan, "acc_stderr": math.nan}}}
    assert failures(broken, BASE, {"accuracy": 99}) == ["nan points lost on piqa are above 99"]


def test_differences_of_the_same_questions_count() -> None:
    """Exactly the limit passes, though 7 / 100 is no number of binary digits."""
    run = run_of("x", lost=0.07)
    assert failures(run["candidate"], run["base"], {"accuracy": 7}) == []
    assert failures(run["candidate"], run["base"], {"accuracy": 6.9}) == [
        "7.00 points lost on packaged_piqa are above 6.9"
    ]


def test_words() -> None:
    limits = read_limits(["gate.kl=0.05", "gate.accuracy=1"])
    assert limits == {"kl": 0.05, "accuracy": 1.0}
    assert described(limits) == "KL at most 0.05 on every text, points lost on every task at most 1"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("gate.kl=-1", "gate.kl=-1 is not allowed: choose 0 or more"),
        ("gate.kl=nan", "choose 0 or more"),
        ("gate.kl=inf", "choose 0 or more"),
        ("gate.kl", "choose a number"),
        ("gate.top1=1.5", "choose 0 to 1"),
        ("kl=0.1", "kl=0.1 is not allowed: choose KEY=VALUE of gate.kl, "),
    ],
)
def test_other_words_are_refused(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_limits([word])
