"""Scores of folders on lm-eval's tasks, by whichever engine answers."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch

from compress.config import EvalConfig
from compress.environment import version_of
from compress.errors import UserError
from compress.measure.kept import cache_file, keep, kept
from compress.measure.speed import check_installed
from compress.model.folder import ModelFolder, file_sha256
from compress.model.sources import open_tokenizer
from compress.runtime.cached import load_running, load_served
from eval.engines.transformers_decode import load_transformers
from eval.memory import give_back
from eval.parts import Once, always
from eval.task_scores import (
    Samples,
    load_tasks,
    open_model,
    open_vllm_model,
    score_tasks,
    task_sources,
)

log = logging.getLogger(__name__)


def check_tasks(config: EvalConfig, model: ModelFolder) -> None:
    """Raises UserError if the questions of a task cannot be had, the engine is not installed, or there is no
    chat template to put them in."""
    if not config.tasks:
        return
    if config.engine != "reference":
        check_installed("eval.engine", config.engine)
    if config.chat_template and not open_tokenizer(model).chat_template:
        raise UserError(
            f"eval.chat_template=true needs a chat template, which {model.path} has not: leave it out"
        )
    with _quiet():
        load_tasks(config.tasks)


def score_folder(
    folder: ModelFolder,
    config: EvalConfig,
    tokenizer: Any,
    device: torch.device,
    once: Once = always,
) -> tuple[dict[str, Any], dict[str, Samples]]:
    """Scores and samples by task, see eval.task_scores."""
    with _quiet(), _answering(folder, config, tokenizer, device) as lm:
        scores, samples = score_tasks(
            lm,
            config.tasks,
            limit=config.limit,
            fewshot=config.fewshot,
            chat_template=config.chat_template,
            once=once,
        )
    # A model that reads through a cache refers to itself, so it is still there.
    give_back()
    return {task: score | {"engine": config.engine} for task, score in scores.items()}, samples


@contextlib.contextmanager
def _answering(
    folder: ModelFolder, config: EvalConfig, tokenizer: Any, device: torch.device
) -> Iterator[Any]:
    """The folder as the model of lm-eval that eval.engine names."""
    if config.engine == "vllm":
        lm = open_vllm_model(folder.path, device)
        try:
            yield lm
        finally:
            lm.model.llm_engine.engine_core.shutdown()
        return
    if config.engine == "compress":
        model = load_running(folder, device)
    elif config.engine == "transformers":
        model = load_transformers(folder.path, device)
    else:
        model = load_served(folder, device, folder.dtype)
    yield open_model(model, tokenizer, config.batch_size)


def score_original(
    folder: ModelFolder,
    config: EvalConfig,
    tokenizer: Any,
    device: torch.device,
    once: Once = always,
) -> tuple[dict[str, Any], dict[str, Samples]]:
    """``score_folder`` of the original, by its own tokenizer: the same for every candidate of a sweep, so it
    is kept in the user cache under everything it depends on."""
    asked = [folder.fingerprint, config.tasks, config.limit, config.batch_size, task_sources()]
    asked += [config.engine, version_of(config.engine), config.fewshot, config.chat_template]
    # Tokenizer, chat template, and what generation asks for.
    asked += [file_sha256(file) for file in folder.companions()]
    file = cache_file("task-scores", asked, device)
    if (found := kept(file)) is not None:
        log.info("task scores of the original come from the cache: %s", file)
        return {t: {**s, "cached": True} for t, s in found["scores"].items()}, found["samples"]
    scores, samples = score_folder(folder, config, tokenizer, device, once)
    keep(file, {"scores": scores, "samples": samples})
    return scores, samples


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the bars and remarks of lm-eval, and of the hub it reads from, off a log; on a terminal they show
    how far it is."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    stderr = sys.stderr if sys.stderr.isatty() else io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
