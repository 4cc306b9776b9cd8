"""The packaged tasks hold real questions, lm-eval scores a model that knows the answers, and a folder has
through us the scores and log-likelihoods that ``lm_eval --model hf`` finds in it."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from compress.compose import compose_settings
from compress.config import TASK_ENGINES, EvalConfig
from compress.errors import UserError
from compress.measure.tasks import check_tasks, score_folder, score_original
from compress.model.folder import ModelFolder
from compress.model.sources import open_tokenizer, resolve_model
from compress.quantize.scheme import Scheme
from compress.runtime.load import load_dense
from eval import task_scores
from eval.faults.tiny import byte_tokenizer
from eval.task_scores import (
    TASKS,
    compare_answers,
    headline,
    load_tasks,
    open_model,
    packaged_tasks,
    score_tasks,
    stderr_of,
)
from tests.exported import exported

CPU = torch.device("cpu")
ASKED = EvalConfig(tasks=["packaged_openbookqa", "packaged_mmlu"], limit=20)


@pytest.fixture(autouse=True)
def nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval adds a list of all installed packages to every result, which takes seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


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
        "packaged_all",
        "packaged_boolq",
        "packaged_commonsense_qa",
        "packaged_mmlu",
        "packaged_openbookqa",
        "packaged_piqa",
    ]
    assert list(load_tasks(packaged_tasks()[1:]).rows) == packaged_tasks()[1:]


@pytest.fixture
def own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of eval/tasks, with tasks of other kinds; nothing else is known."""
    (tmp_path / "own.py").write_text(
        "import datasets\n"
        "def rows(**_):\n"
        "    rows = [{'q': f'{n} and', 'a': ' more'} for n in ('one', 'two', 'three')]\n"
        "    return {'test': datasets.Dataset.from_list(rows)}\n"
    )
    head = (
        "custom_dataset: !function own.rows\ntest_split: test\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
    )
    mean = "aggregation: mean\n    higher_is_better: true\n"
    (tmp_path / "cloze.yaml").write_text(
        f"task: own_cloze\ntag: own_tag\noutput_type: loglikelihood\n{head}"
        f"metric_list:\n  - metric: acc\n    {mean}"
    )
    (tmp_path / "written.yaml").write_text(
        f"task: own_written\ntag: own_tag\noutput_type: generate_until\n{head}generation_kwargs:\n"
        f"  until: ['.']\n  max_gen_toks: 5\nmetric_list:\n  - metric: exact_match\n    {mean}"
        "filter_list:\n  - name: first\n    filter:\n      - function: take_first\n"
        "  - name: low\n    filter:\n      - function: lowercase\n      - function: take_first\n"
    )
    (tmp_path / "absent.yaml").write_text(
        "task: own_absent\ndataset_path: nobody/nothing\noutput_type: generate_until\ntest_split: test\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
    )
    manager = task_scores._task_manager
    monkeypatch.setattr(task_scores, "TASKS", tmp_path)
    # Without the thousands of files of lm-eval's own.
    monkeypatch.setattr(
        task_scores, "_task_manager", lambda folder, everything: manager(folder, everything=False)
    )
    return tmp_path


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["no_such_task"],
            "no_such_task is not known to lm-eval; packaged with .* are packaged_all",
        ),
        (
            ["packaged_all", "packaged_piqa"],
            "packaged_piqa asks packaged_piqa again, which is in packaged_all",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(
    names: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = functools.partial(task_scores._task_manager, everything=False)
    monkeypatch.setattr(task_scores, "_task_manager", lambda folder, everything: manager(folder))
    with pytest.raises(UserError, match=message):
        load_tasks(names)


def test_a_task_of_the_hub_without_a_network_is_refused(own_tasks: Path, tiny: ModelFolder) -> None:
    with pytest.raises(UserError, match="own_absent is not on this machine, and the hub cannot"):
        check_tasks(EvalConfig(tasks=["own_absent"]), tiny)


def test_engine_and_template_are_checked(
    tiny: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"eval.engine=tgi is not known: known are reference, comp"):
        compose_settings(["eval.engine=tgi"])
    assert compose_settings(["eval.fewshot=0", "eval.engine=compress"]).eval is not None
    with pytest.raises(UserError, match=r"eval.fewshot=-1 is not allowed: choose 0 or more"):
        compose_settings(["eval.fewshot=-1"])
    with pytest.raises(UserError, match=r"chat template, which .* has not"):
        check_tasks(EvalConfig(tasks=["packaged_piqa"], chat_template=True), tiny)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"eval.engine=vllm needs the package vllm"):
        check_tasks(EvalConfig(tasks=["packaged_piqa"], engine="vllm"), tiny)


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


@pytest.fixture
def says_b(tiny: ModelFolder) -> Any:
    """A model that always says B, for lm-eval."""
    tokenizer = byte_tokenizer()
    model = load_dense(tiny, CPU, torch.float32)
    model.forward = Oracle(model, tokenizer("B").input_ids[0]).forward
    return open_model(model, tokenizer, 8)


def test_scores_are_lm_evals(says_b: Any, packaged: ModuleType) -> None:
    """It is right exactly where B is the answer."""
    scores, samples = score_tasks(says_b, ["packaged_mmlu"], limit=40)
    rows = packaged.mmlu()["test"]
    right = [row["answer"] == 1 for row in rows][:40]
    share = sum(right) / 40
    assert 0 < share < 1
    assert scores["packaged_mmlu"] == {
        "questions": 40,
        "of": len(rows),
        "limit": 40,
        "fewshot": 0,
        "chat_template": False,
        "acc": pytest.approx(share),
        "acc_stderr": pytest.approx((share * (1 - share) / 39) ** 0.5),
    }
    found = samples["packaged_mmlu"]
    assert [s["doc_id"] for s in found] == list(range(40))
    assert [s["chosen"] for s in found] == [1] * 40
    assert [s["target"] for s in found] == [row["answer"] for row in rows][:40]
    assert [s["correct"] for s in found] == [{"acc": float(r)} for r in right]
    # All bytes but B are equally likely.
    assert all(len(s["loglikelihoods"]) == 4 for s in found)
    assert len({x for s in found for x in s["loglikelihoods"]}) == 2
    assert len({s["question"] for s in found}) == 40
    assert json.loads(json.dumps(samples)) == samples


def test_a_group_has_its_score_and_its_tasks(says_b: Any) -> None:
    scores, samples = score_tasks(says_b, ["packaged_all"], limit=6)
    (score,) = scores.values()
    assert score["questions"] == 30
    assert sorted(score["tasks"]) == packaged_tasks()[1:]
    assert score["acc"] == pytest.approx(sum(t["acc"] for t in score["tasks"].values()) / 5)
    found = samples["packaged_all"]
    assert len({s["doc_id"] for s in found}) == 30
    assert score["acc"] == pytest.approx(sum(s["correct"]["acc"] for s in found) / 30)


def test_other_kinds_of_tasks_by_their_tag(tiny: ModelFolder, own_tasks: Path) -> None:
    """A text that is written, one whose likelihood is asked, and a task with two filters."""
    model, tokenizer = load_dense(tiny, CPU, torch.float32), byte_tokenizer()
    scores, samples = score_tasks(open_model(model, tokenizer, 2), ["own_tag"], limit=None)
    assert scores["own_cloze"].items() >= {"questions": 3, "of": 3, "limit": None, "acc": 0}.items()
    assert scores["own_written"].keys() >= {"exact_match,first", "exact_match,low"}
    prompt, more = (tokenizer(text, return_tensors="pt").input_ids for text in ("one and", " more"))
    with torch.no_grad():
        logits = model(torch.cat([prompt, more], 1)).logits[0, prompt.shape[1] - 1 : -1]
    loglikelihood = float(logits.log_softmax(-1).gather(1, more.T).sum())
    cloze, written = samples["own_cloze"][0], samples["own_written"][0]
    assert cloze["loglikelihoods"] == [pytest.approx(loglikelihood, abs=1e-4)]
    assert cloze.items() >= {"doc_id": 0, "target": " more", "chosen": False}.items()
    text = tokenizer.decode(model.generate(prompt, do_sample=False, max_new_tokens=5)[0, -5:])
    assert written["chosen"] == text.partition(".")[0]
    assert written["correct"] == {"exact_match,first": 0, "exact_match,low": 0}
    assert [s["doc_id"] for s in samples["own_written"]] == [0, 1, 2]


def test_examples_and_template_reach_the_prompt(tiny: ModelFolder) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    prompts: dict[str, str] = {}

    def ask(name: str, **settings: Any) -> dict[str, Any]:
        lm = open_model(load_dense(tiny, CPU, torch.float32), tokenizer, 8)
        plain = lm.loglikelihood

        def watched(requests: list[Any]) -> Any:
            prompts[name] = requests[0].args[0]
            return plain(requests)

        lm.loglikelihood = watched
        return score_tasks(lm, ["packaged_openbookqa"], limit=1, **settings)[0][
            "packaged_openbookqa"
        ]

    assert ask("plain")["fewshot"] == 0
    assert ask("shots", fewshot=2).items() >= {"fewshot": 2, "questions": 1}.items()
    assert ask("template", chat_template=True)["chat_template"] is True
    assert prompts["shots"].endswith("\n\n" + prompts["plain"])
    assert prompts["shots"].count("\n\n") == 2
    assert prompts["template"] == f"<{prompts['plain']}>"


def test_scores_of_the_original_are_kept(
    tiny: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokenizer = byte_tokenizer()
    ask = functools.partial(score_original, tiny, tokenizer=tokenizer, device=CPU)
    config = EvalConfig(tasks=["packaged_openbookqa"], limit=2)
    scores, samples = ask(config=config)
    again, same = ask(config=config)
    assert same == samples
    assert again == {task: score | {"cached": True} for task, score in scores.items()}
    assert scores["packaged_openbookqa"]["engine"] == "reference"
    for change in ({"fewshot": 1}, {"engine": "transformers"}, {"limit": 3}):
        found, _ = ask(config=EvalConfig(**{"tasks": config.tasks, "limit": 2} | change))
        assert "cached" not in found["packaged_openbookqa"]
    # With another template the same folder is asked otherwise.
    other = ModelFolder(shutil.copytree(tiny.path, tmp_path / "other"))
    (other.path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    found, _ = score_original(other, config, tokenizer, CPU)
    assert "cached" not in found["packaged_openbookqa"]


def lm_eval_command(folder: Path, out: Path, tasks: list[str], limit: int) -> dict[str, Any]:
    """``lm_eval --model hf`` on a folder: task -> (scores by metric, log-likelihoods of each question)."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = [
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={folder},dtype=auto",
    ]
    sys.argv += ["--tasks", ",".join(tasks), "--include_path", str(TASKS), "--limit", str(limit)]
    sys.argv += [
        "--batch_size",
        "16",
        "--device",
        "cpu",
        "--log_samples",
        "--output_path",
        str(out),
    ]
    cli_evaluate()
    (file,) = out.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    found = {}
    for task in tasks:
        (file,) = out.rglob(f"samples_{task}_*.jsonl")
        lines = sorted(map(json.loads, file.open()), key=lambda line: line["doc_id"])
        loglikelihoods = [[float(x[0]) for x in line["filtered_resps"]] for line in lines]
        scores = {
            k.removesuffix(",none"): v for k, v in results[task].items() if k.endswith(",none")
        }
        found[task] = scores, loglikelihoods
    return found


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``lm_eval_command`` in this process, which has lm-eval imported already."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    # It would read its own 13,000 files first.
    everything = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", everything)
    return lambda folder, tasks, limit: lm_eval_command(folder, tmp_path / "lm_eval", tasks, limit)


def check_equal(
    folder: ModelFolder, expected: dict[str, Any], config: EvalConfig, tolerance: float = 0
) -> None:
    """Same scores, and log-likelihoods within ``tolerance`` nats."""
    scores, samples = score_folder(folder, config, open_tokenizer(folder), CPU)
    for task, (theirs, loglikelihoods) in expected.items():
        assert theirs.keys() >= {"acc", "acc_stderr"}
        if tolerance == 0:
            assert {key: scores[task][key] for key in theirs} == theirs
        assert scores[task]["engine"] == config.engine
        ours = [sample["loglikelihoods"] for sample in samples[task]]
        assert len(ours) == config.limit
        for row, wanted in zip(ours, loglikelihoods, strict=True):
            assert row == pytest.approx(wanted, rel=0, abs=tolerance)
        # What was chosen is what was judged.
        metric = "acc_norm" if "acc_norm" in theirs else "acc"
        assert all((s["chosen"] == s["target"]) == s["correct"][metric] for s in samples[task])


@pytest.mark.parametrize("kind", ["original", "int4"])
def test_a_folder_has_the_scores_of_the_lm_eval_command(
    kind: str, tiny: ModelFolder, tmp_path: Path, command: Callable[..., dict[str, Any]]
) -> None:
    folder = tiny if kind == "original" else exported(tiny, Scheme(4), tmp_path)
    if kind == "int4":
        open_tokenizer(tiny).save_pretrained(folder.path)
    expected = command(folder.path, ASKED.tasks, ASKED.limit)
    for engine in TASK_ENGINES[:-1]:
        config = EvalConfig(tasks=ASKED.tasks, limit=ASKED.limit, engine=engine)
        # A kernel adds up in another order, and 16 bits tell 200 from 201.
        packed = kind == "int4" and engine == "compress"
        check_equal(folder, expected, config, tolerance=4 if packed else 0)


@pytest.mark.demo
@pytest.mark.parametrize("kind", ["original", "int4"])
def test_the_demo_model_has_the_scores_of_the_lm_eval_command(
    kind: str, tmp_path: Path, command: Callable[..., dict[str, Any]]
) -> None:
    model = ModelFolder(resolve_model(compose_settings(["model=smollm2"]).model.source, None))
    folder = model if kind == "original" else exported(model, Scheme(4), tmp_path)
    tasks = ["packaged_openbookqa"]
    expected = command(folder.path, tasks, 20)
    check_equal(folder, expected, EvalConfig(tasks=tasks, limit=20))


def _answers(*rows: tuple[int, float]) -> list[dict[str, Any]]:
    return [
        {"question": f"q{i}", "chosen": chosen, "correct": {"acc": right}}
        for i, (chosen, right) in enumerate(rows)
    ]


def test_answers_are_compared_question_by_question() -> None:
    """One gained, two lost, and one wrong answer replaced by another wrong one."""
    base = _answers((0, 1), (1, 1), (2, 0), (3, 0), (0, 1))
    candidate = _answers((0, 1), (2, 0), (0, 1), (1, 0), (1, 0))
    found = compare_answers(base, candidate, "acc")
    assert (found["metric"], found["gained"], found["lost"]) == ("acc", 1, 2)
    assert found["difference"] == pytest.approx(-0.2)
    assert found["changed"] == pytest.approx(0.8)
    assert compare_answers(base, candidate, None) is None
    assert compare_answers(base, _answers(*[(0, 0.5)] * 5), "acc") is None
    with pytest.raises(ValueError, match="not to the same questions"):
        compare_answers(base, [*candidate[1:], candidate[0]], "acc")


def test_the_headline_keeps_its_filter() -> None:
    strict = {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.1}
    assert headline(strict) == "exact_match,strict-match"
    assert stderr_of(headline(strict)) in strict
    assert headline({"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.6, "acc_norm_stderr": 0.1}) == (
        "acc_norm"
    )
    assert headline({"word_perplexity": 3.0}) is None
