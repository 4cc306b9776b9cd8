"""Accuracy of folders on disk: hands the ``eval`` package models opened from the files that will be served.

The original runs through the same code as its candidates everywhere.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibration.texts import load_texts
from calibration.tokens import TokenBlocks, evaluation_windows
from compress.config import EvalConfig
from compress.errors import UserError
from compress.measure.kept import cache_file, keep, kept
from compress.measure.tasks import score_folder, score_original
from compress.model.families import family_of, limit_of
from compress.model.folder import DTYPES, ModelFolder, save_tensors
from compress.progress import track
from compress.report.table import TOKENS
from compress.run_folder import whole
from compress.runtime.cached import Caches, Reader, load_served
from compress.runtime.load import load_dense
from eval.blocks import block_divergence
from eval.context import agreement
from eval.memory import give_back
from eval.parts import Once, always, within
from eval.task_scores import Samples, compare_answers, headline
from eval.text import LogitsOf, read_text, summary

log = logging.getLogger(__name__)


def check_texts(config: EvalConfig, model: ModelFolder) -> None:
    """Raises UserError if a text does not exist, or the model does not take such lengths."""
    for text in config.texts:
        load_texts(text, config.text_field, config.split)
    if not config.texts:
        return
    limit = limit_of(model.config)
    asked = {"eval.window": config.window}
    if config.generated:
        prompt = min(config.prompt_tokens, config.window)
        asked["eval.prompt_tokens + eval.generated"] = prompt + config.generated
    for key, tokens in asked.items():
        if limit is not None and tokens > limit:
            raise UserError(f"{key} needs {tokens} tokens, {model.path} takes {limit}: choose less")


def open_windows(config: EvalConfig, tokenizer: Any) -> dict[str, TokenBlocks]:
    """The evaluation windows of each text. Raises UserError for a missing or short text."""
    return {
        text: evaluation_windows(
            load_texts(text, config.text_field, config.split),
            tokenizer,
            tokens=config.tokens,
            window=config.window,
        )
        for text in config.texts
    }


# Of a run: a folder of answers, a file a task and a line a question.
SAMPLES = "samples"
# Figures by token have the columns of eval.text.Tokens, and the original's own.
BASE_NLL = "base_nll"


@dataclass(frozen=True)
class Accuracy:
    """What a candidate and its base were found to do.

    rows: "candidate" and, if there is one, "base" -> sections of metrics.json; tokens: ``TEXT.COLUMN`` -> a
    figure for every predicted token (windows, window - 1); samples: row -> task -> answers (eval.task_scores)
    """

    rows: dict[str, dict[str, Any]]
    tokens: dict[str, Tensor]
    samples: dict[str, dict[str, Samples]]

    def write(self, out: Path) -> None:
        """Put what metrics.json has no room for into the folder of a run."""
        if self.tokens:
            with whole(out / TOKENS) as partial:
                save_tensors(partial, self.tokens)
        if self.samples.get("candidate"):
            # Of an earlier measuring of the same run.
            shutil.rmtree(out / SAMPLES, ignore_errors=True)
            with whole(out / SAMPLES) as folder:
                folder.mkdir()
                for task in self.samples["candidate"]:
                    lines = map(json.dumps, self._beside(task))
                    (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _beside(self, task: str) -> Iterator[dict[str, Any]]:
        """A question with the answers of all rows."""
        answers = {row: found[task] for row, found in self.samples.items()}
        for entries in zip(*answers.values(), strict=True):
            question = {key: entries[0][key] for key in ("doc_id", "question", "target")}
            own = {
                row: {key: value for key, value in entry.items() if key not in question}
                for row, entry in zip(answers, entries, strict=True)
            }
            yield question | own


def measure_accuracy(
    candidate: ModelFolder,
    base: ModelFolder | None,
    windows: Mapping[str, TokenBlocks],
    config: EvalConfig,
    tokenizer: Any,
    device: torch.device,
    once: Once = always,
) -> Accuracy:
    """Texts and tasks of a candidate, and of its base with the same tokens and questions.

    Of the base also the noise of its own 16 bits; of a candidate with a base also for how many tokens greedy
    decoding agrees. once: windows, answers to some batches of questions, and agreement are its parts; with
    those of an earlier start it must have been asked the same
    """
    rows: dict[str, dict[str, Any]] = {"candidate": {"texts": {}, "tasks": {}}}
    if base is not None:
        rows["base"] = {"texts": {}, "tasks": {}}
    tokens: dict[str, Tensor] = {}
    samples: dict[str, dict[str, Samples]] = {}
    if windows:
        tokens = _measure_texts(rows, candidate, base, windows, config, device, once)
        # A model that reads through a cache refers to itself, so it is still there.
        give_back()
    if config.tasks:
        log.info("scoring %s", ", ".join(config.tasks))
        scores, samples["candidate"] = once(
            "candidate",
            lambda: score_folder(candidate, config, tokenizer, device, within(once, "candidate")),
        )
        rows["candidate"]["tasks"] = scores
        if base is not None:
            rows["base"]["tasks"], samples["base"] = once(
                "base",
                lambda: score_original(base, config, tokenizer, device, within(once, "base")),
            )
            for task, score in scores.items():
                theirs, ours = samples["base"][task], samples["candidate"][task]
                if (beside := compare_answers(theirs, ours, headline(score))) is not None:
                    score["paired"] = beside
    return Accuracy(rows, tokens, samples)


def _measure_texts(
    rows: dict[str, dict[str, Any]],
    candidate: ModelFolder,
    base: ModelFolder | None,
    windows: Mapping[str, TokenBlocks],
    config: EvalConfig,
    device: torch.device,
    once: Once,
) -> dict[str, Tensor]:
    """Fills ``texts`` of the rows, and ``agreement`` of the candidate's; returns figures by token."""
    dtype = DTYPES[config.dtype]
    # Opened when they are first asked for: of a measuring that goes on all parts may be there.
    models = {"candidate": functools.cache(lambda: load_served(candidate, device, dtype))}
    if base is not None:
        models["base"] = functools.cache(lambda: load_dense(base, device, dtype))
    noise = None if base is None else _Noise(base, config, device)
    columns = {}
    for text, blocks in windows.items():
        data = {"data_sha256": blocks.sha256, "window": config.window, "dtype": config.dtype}
        readers = {name: _logits_of(model, device) for name, model in models.items()}
        of_text = within(once, text)
        known = None
        if noise is not None:
            known = of_text("noise", functools.partial(noise.known, blocks))
            if known is None and noise.dtype != dtype:
                readers["noise"] = noise.reader
        found = read_text(readers, _rows(blocks, text), None if base is None else "base", of_text)
        own = found["candidate"]
        rows["candidate"]["texts"][text] = data | summary(own, found.get("base"))
        columns[f"{text}.nll"] = torch.stack(own.nll)
        if noise is not None:
            beside = summary(found["base"])
            if "noise" in found:
                known = noise.keep(blocks, summary(found["noise"], found["base"]))
            rows["base"]["texts"][text] = data | beside | {"noise": known}
            parts = {"kl": own.kl, "top1": own.top1, BASE_NLL: found["base"].nll}
            columns |= {f"{text}.{column}": torch.stack(part) for column, part in parts.items()}
        log.info("%s: %s", text, _remark(rows["candidate"]["texts"][text]))
    if base is not None and config.generated:
        rows["candidate"]["agreement"] = once(
            "agreement", lambda: _agreement(models, candidate, base, windows, config)
        )
    return columns


def _logits_of(opened: Callable[[], Any], device: torch.device) -> LogitsOf:
    return lambda tokens: opened()(tokens.to(device)).logits


class _Noise:
    """What rounding to 16 bits alone does to an original: the least divergence that means anything. The same
    for every candidate, so it is kept in the user cache."""

    def __init__(self, base: ModelFolder, config: EvalConfig, device: torch.device):
        self._base, self._config, self._device = base, config, device
        self.dtype = base.dtype if base.dtype.itemsize == 2 else torch.bfloat16

    @functools.cached_property
    def reader(self) -> LogitsOf:
        opened = functools.cache(lambda: load_dense(self._base, self._device, self.dtype))
        return _logits_of(opened, self._device)

    def _file(self, blocks: TokenBlocks) -> Path:
        # The same tokens in other windows have the same hash.
        asked = [self._base.fingerprint, blocks.sha256, list(blocks.tokens.shape)]
        return cache_file("noise", [*asked, self._config.dtype], self._device)

    def known(self, blocks: TokenBlocks) -> dict[str, Any] | None:
        """What is kept; None also where the texts are read in 16 bits themselves."""
        if self.dtype == DTYPES[self._config.dtype]:
            return None
        return kept(self._file(blocks))

    def keep(self, blocks: TokenBlocks, found: dict[str, Any]) -> dict[str, Any]:
        figures = ("kl", "kl_stderr", "kl_p99", "kl_p999", "top1", "top1_stderr", "paired")
        noise = {"dtype": str(self.dtype).removeprefix("torch.")} | {
            key: found[key] for key in figures
        }
        keep(self._file(blocks), noise)
        return noise


def _agreement(
    models: Mapping[str, Callable[[], Any]],
    candidate: ModelFolder,
    base: ModelFolder,
    windows: Mapping[str, TokenBlocks],
    config: EvalConfig,
) -> dict[str, Any]:
    """Greedy agreement from the beginnings of windows, spread over all texts."""
    starts = torch.cat([blocks.tokens[:, : config.prompt_tokens] for blocks in windows.values()])
    chosen = torch.linspace(0, len(starts) - 1, min(config.prompts, len(starts))).round().long()
    readers = {
        name: functools.partial(Reader, models[name](), Caches(folder, models[name]()))
        for name, folder in (("base", base), ("candidate", candidate))
    }
    found = agreement(
        readers["base"], {"it": readers["candidate"]}, starts[chosen], config.generated
    )["it"]
    return found | {"prompts": len(chosen), "prompt_tokens": starts.shape[1]}


def measure_blocks(
    candidate: ModelFolder,
    base: ModelFolder,
    windows: Mapping[str, TokenBlocks],
    config: EvalConfig,
    device: torch.device,
    once: Once = always,
) -> dict[str, list[float]]:
    """KL of every block of the candidate alone in ``base``, for each text; see eval.blocks. A text is a part
    of ``once``, and so is a block on a window.

    base: the folder that was quantized, whose hidden states the candidate's blocks share
    """
    assert config.block_tokens is not None
    family, dtype = family_of(base.config), DTYPES[config.dtype]
    opened = functools.cache(lambda folder: load_dense(folder, device, dtype))
    count = math.ceil(config.block_tokens / config.window)

    def measured(text: str) -> list[float]:
        model, other = opened(base), opened(candidate)
        norm, head = model.get_submodule(family.final_norm), model.get_output_embeddings()
        rows = [row[: config.block_tokens] for row in windows[text].tokens.to(device)]
        return block_divergence(
            model,
            list(model.get_submodule(family.blocks)),
            list(other.get_submodule(family.blocks)),
            lambda hidden: head(norm(hidden)),
            track(rows[:count], f"blocks alone, {text}"),
            within(once, text),
        )

    return {text: once(text, functools.partial(measured, text)) for text in windows}


def _remark(found: Mapping[str, float]) -> str:
    divergence = f", KL {found['kl']:.4f}" if "kl" in found else ""
    return f"perplexity {found['perplexity']:.2f}{divergence}"


def _rows(blocks: TokenBlocks, text: str) -> Iterator[Tensor]:
    yield from track(blocks.tokens, f"evaluate {text}")
