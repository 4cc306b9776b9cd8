"""Haystacks are what they say, and answers are counted right."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from compress.errors import UserError
from eval.faults.tiny import byte_tokenizer
from eval.retrieval import MOST_FACTS, NUMBERS, PASS_KEY, QUESTION, build_haystack, score, summarize

TEXT = "The house stood by the river. Birds sang in the morning. Nobody was at home. " * 40


class Letters:
    """One token a character, so that questions fit."""

    bos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = False) -> Letters:
        self.input_ids = [ord(c) for c in text]
        return self

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def haystack(monkeypatch: pytest.MonkeyPatch, **changes: object):  # type: ignore[no-untyped-def]
    monkeypatch.setattr("eval.retrieval.QUESTION", 64)
    settings = {"length": 2000, "facts": 6, "start": 0.3, "seed": 5} | changes
    return build_haystack(TEXT, Letters(), **settings)  # type: ignore[arg-type]


def test_a_haystack_holds_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    built = haystack(monkeypatch)
    text = Letters().decode(built.tokens.tolist())
    assert len(built.tokens) == 2000 - 64
    assert [q.kind for q in built.questions].count(PASS_KEY) == 1
    assert [q.kind for q in built.questions].count(NUMBERS) == 5
    places = []
    for question in built.questions:
        said = Letters().decode(question.asked.tolist()).strip()
        answer = Letters().decode(question.answer.tolist())
        assert re.fullmatch(r" \d{5}", answer)
        assert text.count(f"{said}{answer}. Remember it.") == 1
        places.append(text.index(said) / len(text))
    # Even depths: one fact in every sixth of the text.
    assert sorted(int(6 * place) for place in places) == [0, 1, 2, 3, 4, 5]
    assert "Birds sang" in text
    assert len({Letters().decode(q.answer.tolist()) for q in built.questions}) == 6


def test_seeds_and_starts_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    first = haystack(monkeypatch)
    assert torch.equal(first.tokens, haystack(monkeypatch).tokens)
    for change in ({"seed": 6}, {"start": 0.61}):
        assert not torch.equal(first.tokens, haystack(monkeypatch, **change).tokens)
    with pytest.raises(UserError, match=f"names for {MOST_FACTS} facts, not for 40"):
        haystack(monkeypatch, facts=40)


def test_a_question_must_fit() -> None:
    with pytest.raises(UserError, match=f"more than {QUESTION}"):
        build_haystack(TEXT, byte_tokenizer(), length=2000, facts=4, start=0, seed=0)


class Remembers:
    """Answers right for what it read, but for the pass key if it ``forgets``."""

    nbytes = 0

    def __init__(self, forgets: bool = False):
        self.text, self.forgets = "", forgets

    def fork(self) -> Remembers:
        other = Remembers(self.forgets)
        other.text = self.text
        return other

    def __call__(self, tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 256)
        read = Letters().decode(tokens[0].tolist())
        for i in range(len(read)):
            said = read[: i + 1].strip("\n")
            at = self.text.find(said) if "is" in said else -1
            if at >= 0:
                logits[0, i, ord(self.text[at + len(said)])] = 1
        if self.forgets and "pass key" in read:
            logits[0, -1] = torch.arange(256)
        self.text += read
        return logits


def test_answers_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    stacks = [haystack(monkeypatch, seed=seed) for seed in (1, 2)]
    found = score({"good": Remembers, "forgets": lambda: Remembers(True), "blind": Blind}, stacks)
    assert found["good"] == {PASS_KEY: [1, 1], NUMBERS: [1] * 10}
    assert found["forgets"] == {PASS_KEY: [0, 0], NUMBERS: [1] * 10}
    assert found["blind"] == {PASS_KEY: [0, 0], NUMBERS: [0] * 10}


class Blind(Remembers):
    def fork(self) -> Remembers:
        return Remembers()


def test_shares_and_paired_errors() -> None:
    found = summarize([1, 1, 0, 1], base=[1, 0, 0, 1])
    assert found["accuracy"] == 0.75
    assert found["stderr"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert found["same"] == 0.75
    assert found["difference"] == 0.25
    # Differences 0, 1, 0, 0: variance 1/4 over 4 questions.
    assert found["difference_stderr"] == pytest.approx(0.25)
    assert "same" not in summarize([1, 0])
