"""Batches are a function of seed and step; rates and budgets worked by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from calibration.tokens import held_out
from compress.distill.knobs import Distill
from compress.distill.plan import (
    Costs,
    affordable,
    batch_rows,
    enough,
    rate_at,
    seen,
    share_of,
    steps_of,
)

KNOBS = Distill(steps=100, batch=4, rate=1.0, warmup=0.1, final_rate=0.2)
ROWS = torch.tensor([2, 3, 5, 7, 11, 13, 17, 19, 23, 29])


def test_an_epoch_sees_every_sequence_once() -> None:
    """Five batches are two epochs of ten sequences, the third batch of both."""
    stream = torch.cat([batch_rows(step, KNOBS, ROWS) for step in range(5)])
    first, second = stream[:10], stream[10:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == ROWS.tolist()
    assert first.tolist() != second.tolist()
    # Any batch by itself, in any order.
    assert torch.equal(batch_rows(2, KNOBS, ROWS), stream[8:12])
    assert torch.equal(batch_rows(0, KNOBS, ROWS), stream[:4])


def test_the_seed_decides_the_order() -> None:
    orders = [
        batch_rows(0, replace(KNOBS, seed=seed, batch=20), ROWS).tolist() for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    # The second epoch of one seed is not the first of the next.
    assert orders[0][10:] != orders[2][:10]


def test_a_batch_longer_than_an_epoch() -> None:
    rows = batch_rows(0, replace(KNOBS, batch=25), ROWS)
    assert rows.bincount()[ROWS].tolist() != [2] * 10
    assert set(rows.bincount()[ROWS].tolist()) == {2, 3}


def test_what_a_budget_sees() -> None:
    assert torch.equal(seen(3, KNOBS, ROWS), ROWS)
    two = torch.cat([batch_rows(step, KNOBS, ROWS) for step in range(2)])
    assert torch.equal(seen(2, KNOBS, ROWS), two)


def test_processes_share_a_batch() -> None:
    rows = torch.arange(6)
    pieces = [[p.tolist() for p in share_of(rows, process, 2, 2)] for process in range(2)]
    assert pieces == [[[0, 2], [4]], [[1, 3], [5]]]


def test_the_rate_rises_and_falls() -> None:
    rates = [rate_at(step, 100, KNOBS) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.6)
    assert rates[99] == pytest.approx(0.2, abs=1e-3)
    assert all(a > b for a, b in pairwise(rates[10:]))
    # However few there are.
    assert rate_at(0, 1, KNOBS) == 1.0


def test_steps_of_a_budget() -> None:
    assert steps_of(Distill(steps=7), 512) == 7
    assert steps_of(Distill(tokens=8 * 512 * 3, batch=8), 512) == 3
    assert steps_of(Distill(tokens=8 * 512 * 3 + 1, batch=8), 512) == 4
    assert steps_of(Distill(minutes=1.0), 512) is None


@pytest.mark.parametrize("steps", [1, 60, 61, 1000, 1001])
def test_text_that_is_enough(steps: int) -> None:
    """Every step sees text of its own, and as much is held out as is looked at; hardly more."""
    found = enough(Distill(steps=steps, batch=5, length=8))
    assert found is not None
    trained, held = held_out(found)
    assert len(trained) >= 5 * steps
    assert len(held) >= 16
    assert found <= max(256, 5 * steps * 16 / 15 + 1)
    assert enough(Distill(tokens=steps * 5 * 8, batch=5, length=8)) == found
    assert enough(Distill(minutes=1.0)) is None


def test_what_minutes_afford() -> None:
    costs = Costs(step=2.0, held_out=5.0, saving=20.0)
    # Of 100 seconds 5 are a margin, 15 for three looks; a save a ten steps makes a step 4 s.
    assert affordable(100.0, costs, 10, 3) == 20
    assert affordable(10.0, costs, 10, 3) == 0
    assert affordable(-10.0, costs, 10, 3) == 0
