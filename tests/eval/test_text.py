"""Perplexity, KL and agreement against sums written out in float64."""

from __future__ import annotations

import json
import math

import pytest
import torch

from compress.report.table import with_error
from eval.text import evaluate_text, token_kl

VOCABULARY, WINDOW = 11, 300


def test_kl_by_hand() -> None:
    base, candidate = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert float(token_kl(base.log(), candidate.log())) == pytest.approx(expected)
    # The direction counts: it is KL(original || candidate).
    peaked = torch.tensor([[0.9, 0.05, 0.05]])
    forward = float(token_kl(base.log(), peaked.log()))
    assert forward != pytest.approx(float(token_kl(peaked.log(), base.log())), rel=0.05)
    assert float(token_kl(base.log(), base.log())) == pytest.approx(0, abs=1e-7)


def test_against_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    noise = 0.3 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    windows = torch.randint(VOCABULARY, (4, WINDOW), generator=generator)
    # A model that predicts from the last token alone: logits are rows of a table.
    found = evaluate_text(lambda t: (table + noise)[t], windows, lambda t: table[t])
    base = table.double().log_softmax(-1)
    candidate = (table + noise).double().log_softmax(-1)
    before, after = windows[:, :-1].flatten(), windows[:, 1:].flatten()
    kl = (base[before].exp() * (base[before] - candidate[before])).sum(-1)
    nll = -candidate[before, after]
    got = found["candidate"]
    assert got["tokens"] == 4 * (WINDOW - 1)
    assert got["perplexity"] == pytest.approx(float(nll.mean().exp()), rel=1e-5)
    assert found["base"]["perplexity"] == pytest.approx(
        float((-base[before, after]).mean().exp()), rel=1e-5
    )
    assert got["kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert got["kl_p99"] == pytest.approx(float(kl.quantile(0.99)), rel=1e-4)
    agree = (base[before].argmax(-1) == candidate[before].argmax(-1)).double().mean()
    assert got["top1"] == pytest.approx(float(agree), rel=1e-6)
    per_window = kl.view(4, -1).mean(1)
    assert got["kl_stderr"] == pytest.approx(float(per_window.std() / 2), rel=1e-4)


def test_a_model_against_itself_shows_no_difference() -> None:
    table = torch.randn(VOCABULARY, VOCABULARY)
    windows = torch.randint(VOCABULARY, (2, 50))
    found = evaluate_text(lambda t: table[t], windows, lambda t: table[t])["candidate"]
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["top1"] == 1.0


def test_one_window_shows_no_spread() -> None:
    table = torch.randn(VOCABULARY, VOCABULARY)
    windows = torch.randint(VOCABULARY, (1, 50))
    found = evaluate_text(lambda t: table[t], windows, lambda t: -table[t])["candidate"]
    assert found["kl"] > 0
    assert found["kl_stderr"] is found["perplexity_stderr"] is found["top1_stderr"] is None
    # JSON has no NaN, and a table says nothing rather than "±nan".
    json.dumps(found, allow_nan=False)
    assert with_error(found["kl"], found["kl_stderr"], "{:.1f}") == f"{found['kl']:.1f}"
    assert with_error(0.5, 0.25, "{:.1%}") == "50.0% ±25.0"


def test_without_a_base_there_is_no_divergence() -> None:
    table = torch.zeros(VOCABULARY, VOCABULARY)
    found = evaluate_text(lambda t: table[t], torch.zeros(2, 20, dtype=torch.int64))
    assert set(found) == {"candidate"}
    assert found["candidate"]["perplexity"] == pytest.approx(VOCABULARY)
    assert "kl" not in found["candidate"]
