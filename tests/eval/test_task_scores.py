"""The packaged tasks hold real questions, and lm-eval scores a model that knows the answers."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from compress.model.folder import ModelFolder
from compress.runtime.load import load_dense
from eval.task_scores import TASKS, packaged_tasks, score_tasks, unknown_tasks
from tests.conftest import byte_tokenizer


@pytest.fixture(scope="module")
def packaged() -> ModuleType:
    """eval/tasks/packaged.py, imported by path as lm-eval does."""
    spec = importlib.util.spec_from_file_location("packaged", TASKS / "packaged.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["packaged"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "questions", "choices"),
    [
        ("piqa", 1500, {2}),
        ("openbookqa", 500, {4}),
        ("commonsense_qa", 1221, {5}),
        ("mmlu", 2850, {4}),
        ("boolq", 3270, {2}),
    ],
)
def test_every_question_has_its_choices(
    packaged: ModuleType, name: str, questions: int, choices: set[int]
) -> None:
    rows = getattr(packaged, name)()["test"]
    assert abs(len(rows) - questions) <= 2
    assert {len(row["choices"]) for row in rows} == choices
    assert {row["answer"] for row in rows} == set(range(max(choices)))
    assert all(choice for row in rows for choice in row["choices"])


def test_names() -> None:
    assert packaged_tasks() == [
        "packaged_boolq",
        "packaged_commonsense_qa",
        "packaged_mmlu",
        "packaged_openbookqa",
        "packaged_piqa",
    ]
    assert unknown_tasks(["packaged_piqa", "no_such_task"]) == ["no_such_task"]


class Oracle(torch.nn.Module):
    """Prefers one byte over all others, whatever came before."""

    def __init__(self, model: torch.nn.Module, favourite: int):
        super().__init__()
        self.model, self.config, self.favourite = model, model.config, favourite
        self.device = torch.device("cpu")

    def forward(self, tokens: torch.Tensor, **_: object) -> object:
        logits = torch.zeros(*tokens.shape, self.config.vocab_size)
        logits[..., self.favourite] = 5.0
        return type("Output", (), {"logits": logits})

    def tie_weights(self) -> None: ...


def test_scores_are_lm_evals(tiny: ModelFolder, packaged: ModuleType) -> None:
    """A model that always says B is right exactly where B is the answer."""
    tokenizer = byte_tokenizer()
    model = load_dense(tiny, torch.device("cpu"), torch.float32)
    letter = tokenizer("B").input_ids[0]
    model.forward = Oracle(model, letter).forward
    found = score_tasks(model, tokenizer, ["packaged_mmlu"], limit=40, batch_size=8)
    right = [row["answer"] == 1 for row in packaged.mmlu()["test"]][:40]
    share = sum(right) / 40
    assert 0 < share < 1
    assert found["packaged_mmlu"]["questions"] == 40
    assert found["packaged_mmlu"]["acc"] == pytest.approx(share)
    assert found["packaged_mmlu"]["acc_stderr"] == pytest.approx((share * (1 - share) / 39) ** 0.5)
