"""Finding facts in long text: a pass key, and many like facts of which one is asked for.

A haystack is real text with facts between its sentences, at even depths in random order: one pass
key (Mohtashami and Jaggi, arXiv 2305.16300, section 4.2), and numbers of several places
(multi-needle). A reader sees all of it once; each question is put to a copy of what it then holds.
An answer counts if greedy decoding would write every digit of it.

tokens int64 (n,)
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calibration.tokens import bos_prefix
from compress.errors import UserError
from eval.context import Reader
from eval.parts import Once, always

PLACES = (
    "Lisbon", "Oslo", "Cairo", "Lima", "Dublin", "Kyoto", "Vienna", "Nairobi", "Havana", "Prague", "Seoul",
    "Athens", "Quito", "Riga", "Tunis", "Zagreb",
)  # fmt: skip
MOST_FACTS = len(PLACES) + 1
PASS_KEY, NUMBERS = "pass key", "numbers"
DIGITS = 5
# Tokens of a length that are left for a question and its answer.
QUESTION = 32


@dataclass(frozen=True)
class Question:
    """What follows the haystack, and the answer's tokens."""

    kind: str
    asked: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Haystack:
    """A text with facts in it, and a question for each."""

    tokens: Tensor
    questions: tuple[Question, ...]


def build_haystack(
    text: str, tokenizer: Any, *, length: int, facts: int, start: float, seed: int
) -> Haystack:
    """``length`` tokens: the text from the share ``start`` of it on with ``facts`` in it, and room for a
    question. The text is repeated where it ends.

    Raises UserError for more facts than there are names, and for questions that are too long.
    """
    if facts > MOST_FACTS:
        raise UserError(f"there are names for {MOST_FACTS} facts, not for {facts}: choose less")
    choose = random.Random(seed)
    names = choose.sample(PLACES, facts - 1)
    needles = [(PASS_KEY, "The pass key is")]
    needles += [(NUMBERS, f"The secret number of {name} is") for name in names]
    choose.shuffle(needles)
    answers = [f" {choose.randrange(10 ** (DIGITS - 1), 10**DIGITS)}" for _ in needles]
    ids = [
        tokenizer(f"\n{said}{answer}. Remember it.\n", add_special_tokens=False).input_ids
        for (_, said), answer in zip(needles, answers, strict=True)
    ]
    row = bos_prefix(tokenizer)
    room = length - QUESTION - len(row) - sum(map(len, ids))
    if room < length // 2:
        raise UserError(f"{facts} facts leave {room} of {length} tokens for the text: choose less")
    sentences = _sentences(text, tokenizer, start, room)
    total, used = sum(map(len, sentences)), 0
    for sentence in sentences:
        # The next fact goes in once the share of the text before it has passed.
        while len(ids) > used and len(row) - sum(map(len, ids[:used])) >= total * (
            used + 0.5
        ) / len(ids):
            row += ids[used]
            used += 1
        row += sentence
    for fact in ids[used:]:
        row += fact
    questions = tuple(
        Question(
            kind,
            torch.tensor(tokenizer(f"\n\n{said}", add_special_tokens=False).input_ids),
            torch.tensor(tokenizer(answer, add_special_tokens=False).input_ids),
        )
        for (kind, said), answer in zip(needles, answers, strict=True)
    )
    longest = max(len(question.asked) + len(question.answer) for question in questions)
    if longest > QUESTION:
        raise UserError(
            f"a question and its answer have {longest} tokens with this tokenizer, more than {QUESTION}: "
            "choose context.lengths=[]"
        )
    return Haystack(torch.tensor(row), questions)


def _sentences(text: str, tokenizer: Any, start: float, room: int) -> list[list[int]]:
    """Tokens of the sentences behind the share ``start`` of the text, ``room`` tokens of them."""
    parts = text.split(". ")
    first, found, count = int(start * len(parts)), [], 0
    while count < room:
        ids = tokenizer(parts[first % len(parts)] + ". ", add_special_tokens=False).input_ids
        found.append(ids[: room - count])
        count += len(found[-1])
        first += 1
    return found


@torch.no_grad()
def score(
    readers: Mapping[str, Callable[[], Reader]],
    haystacks: Iterable[Haystack],
    done: Callable[[], None] = lambda: None,
    once: Once = always,
) -> dict[str, dict[str, list[int]]]:
    """For each reader and kind of fact, 1 for every answer found and 0 for every other, in order. What a
    reader answers of a haystack is a part of ``once``."""
    found: dict[str, dict[str, list[int]]] = {name: {} for name in readers}
    for i, haystack in enumerate(haystacks):
        for name, new in readers.items():
            right = once(f"haystack {i}, {name}", functools.partial(_answers, new, haystack))
            for question, hit in zip(haystack.questions, right, strict=True):
                found[name].setdefault(question.kind, []).append(hit)
        done()
    return found


def _answers(new: Callable[[], Reader], haystack: Haystack) -> list[int]:
    reader = new()
    reader(haystack.tokens.unsqueeze(0))
    return [int(_answered(reader.fork(), question)) for question in haystack.questions]


def _answered(reader: Reader, question: Question) -> bool:
    row = torch.cat([question.asked, question.answer[:-1]])
    logits = reader(row.unsqueeze(0))[0, len(question.asked) - 1 :]
    return bool((logits.argmax(-1).cpu() == question.answer).all())


def summarize(hits: Sequence[int], base: Sequence[int] | None = None) -> dict[str, Any]:
    """Share of answers found with its standard error; with a base, the share that both found or both missed,
    and the standard error of the difference over paired questions."""
    values = torch.tensor(hits, dtype=torch.float64)
    n = len(values)
    share = float(values.mean())
    result = {"accuracy": share, "stderr": (share * (1 - share) / n) ** 0.5, "questions": n}
    if base is not None:
        change = values - torch.tensor(base, dtype=torch.float64)
        result["same"] = float((change == 0).double().mean())
        result["difference"] = float(change.mean())
        result["difference_stderr"] = float(change.std(unbiased=True) / n**0.5) if n > 1 else 0.0
    return result
