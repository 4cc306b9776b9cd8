"""Measuring folders on disk: hands the ``eval`` package models opened from the files that will be served.

The original runs through the same code as its candidates everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from calibration.texts import load_texts
from calibration.tokens import TokenBlocks, evaluation_windows
from compress.config import ContextConfig, EvalConfig, SpeedConfig
from compress.environment import environment, version_of
from compress.errors import UserError
from compress.export.formats import FORMATS, Weights
from compress.model.families import Family, family_of
from compress.model.folder import DTYPES, ModelFolder, read_json, save_tensors, write_json
from compress.model.shapes import PREFIX, shape_config
from compress.model.skeleton import empty_model
from compress.model.sources import open_tokenizer
from compress.progress import track
from compress.run_folder import whole
from compress.runtime.cached import Caches, Reader, load_running, load_served
from compress.runtime.decoder import open_decoder, open_random
from compress.runtime.load import load_dense
from compress.runtime.probe import head_errors
from compress.runtime.random import RandomModel
from compress.user_cache import cache_dir
from eval.blocks import block_divergence
from eval.context import agreement, by_position
from eval.engines.transformers_decode import load_transformers, open_transformers
from eval.engines.vllm_decode import open_vllm
from eval.retrieval import Haystack, build_haystack, score, summarize
from eval.speed import Decoder, Limits, Load, Point, measure_speed
from eval.task_scores import (
    Samples,
    load_tasks,
    open_model,
    open_vllm_model,
    score_tasks,
    task_sources,
)
from eval.text import LogitsOf, read_text, summary

log = logging.getLogger(__name__)


def measure_size(folder: ModelFolder) -> dict[str, Any]:
    """Bytes on disk and bits per weight, from file headers.

    bits_linears: everything stored for the linears of the decoder blocks (codes, scales, zero
    points, shapes) over their weights; bits_file: all weight files over all parameters, a tied head
    counted once.
    """
    family = family_of(folder.config)
    model = empty_model(folder, folder.dtype)
    suffixes = tuple(f".{name}" for name in family.linears)
    linears = {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if name.startswith(f"{family.blocks}.") and name.endswith(suffixes)
    }
    stored = sum(
        folder.nbytes(name)
        for name in folder.names
        if name.rpartition(".")[0] in linears and not name.endswith(".bias")
    )
    # named_parameters() names a shared tensor once; on the meta device a tie is stated by the
    # config.
    model.tie_weights()
    parameters = sum(p.numel() for p in model.parameters())
    stored += sum(t.nbytes for file in _beside(folder) for t in load_file(file).values())
    file_bytes = _file_bytes(folder)
    return {
        "bytes": file_bytes,
        "parameters": parameters,
        "bits_linears": 8 * stored / sum(linears.values()),
        "bits_file": 8 * file_bytes / parameters,
        "kept": sorted(_kept(folder, family)),
    }


def _beside(folder: ModelFolder) -> list[Path]:
    """Files with weights that only our reader looks at."""
    beside = [folder.path / f.sidecar for f in FORMATS.values() if f.sidecar is not None]
    return [file for file in beside if file.exists()]


def _file_bytes(folder: ModelFolder) -> int:
    return sum(file.stat().st_size for file in (*folder.weight_files, *_beside(folder)))


def _kept(folder: ModelFolder, family: Family) -> Iterator[str]:
    """Weight matrices that stay as they were: embedding, head, and any linear left out."""
    weights = Weights(folder)
    if not weights.linears:
        yield "all weights"
        return
    for name in weights.names:
        module, _, part = name.rpartition(".")
        if part == "weight" and module not in weights.linears and len(folder.shape(name)) == 2:
            shared = folder.tied_head and module == family.embedding
            yield f"{module} (also the {family.head})" if shared else module


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


def check_tasks(config: EvalConfig, model: ModelFolder) -> None:
    """Raises UserError if the questions of a task cannot be had, the engine is not installed, or there is no
    chat template to put them in."""
    if not config.tasks:
        return
    if config.engine != "reference":
        _check_installed("eval.engine", config.engine)
    if config.chat_template and not open_tokenizer(model).chat_template:
        raise UserError(
            f"eval.chat_template=true needs a chat template, which {model.path} has not: leave it out"
        )
    with _quiet():
        load_tasks(config.tasks)


# A file of a run: figures by token, ``Accuracy.tokens``. Columns are those of eval.text.Tokens, and the
# original's own.
TOKENS = "accuracy.safetensors"
BASE_NLL = "base_nll"


@dataclass(frozen=True)
class Accuracy:
    """What a candidate and its base were found to do.

    rows: "candidate" and, if there is one, "base" -> sections of metrics.json; tokens: ``TEXT.COLUMN`` -> a
    figure for every predicted token (windows, window - 1)
    """

    rows: dict[str, dict[str, Any]]
    tokens: dict[str, Tensor]

    def write(self, out: Path) -> None:
        """Put what metrics.json has no room for into the folder of a run."""
        if self.tokens:
            with whole(out / TOKENS) as partial:
                save_tensors(partial, self.tokens)


def measure_accuracy(
    candidate: ModelFolder,
    base: ModelFolder | None,
    windows: Mapping[str, TokenBlocks],
    config: EvalConfig,
    tokenizer: Any,
    device: torch.device,
) -> Accuracy:
    """Texts and tasks of a candidate, and of its base with the same tokens and questions.

    Of the base also the noise of its own 16 bits; of a candidate with a base also for how many tokens greedy
    decoding agrees.
    """
    rows: dict[str, dict[str, Any]] = {"candidate": {"texts": {}, "tasks": {}}}
    if base is not None:
        rows["base"] = {"texts": {}, "tasks": {}}
    tokens: dict[str, Tensor] = {}
    if windows:
        tokens = _measure_texts(rows, candidate, base, windows, config, device)
    if config.tasks:
        log.info("scoring %s", ", ".join(config.tasks))
        rows["candidate"]["tasks"], _ = _score(candidate, config, tokenizer, device)
        if base is not None:
            rows["base"]["tasks"], _ = _score_cached(base, config, tokenizer, device)
    return Accuracy(rows, tokens)


def _measure_texts(
    rows: dict[str, dict[str, Any]],
    candidate: ModelFolder,
    base: ModelFolder | None,
    windows: Mapping[str, TokenBlocks],
    config: EvalConfig,
    device: torch.device,
) -> dict[str, Tensor]:
    """Fills ``texts`` of the rows, and ``agreement`` of the candidate's; returns figures by token."""
    dtype = DTYPES[config.dtype]
    models = {"candidate": load_served(candidate, device, dtype)}
    if base is not None:
        models["base"] = load_dense(base, device, dtype)
    noise = None if base is None else _Noise(base, config, device)
    columns = {}
    for text, blocks in windows.items():
        data = {"data_sha256": blocks.sha256, "window": config.window, "dtype": config.dtype}
        readers = {name: _logits_of(model, device) for name, model in models.items()}
        if noise is not None and noise.missing(blocks):
            readers["noise"] = noise.reader
        found = read_text(readers, _rows(blocks, text), None if base is None else "base")
        own = found["candidate"]
        rows["candidate"]["texts"][text] = data | summary(own, found.get("base"))
        columns[f"{text}.nll"] = torch.stack(own.nll)
        if noise is not None:
            beside = summary(found["base"])
            if "noise" in found:
                noise.keep(blocks, summary(found["noise"], found["base"]))
            rows["base"]["texts"][text] = data | beside | {"noise": noise.of(blocks)}
            parts = {"kl": own.kl, "top1": own.top1, BASE_NLL: found["base"].nll}
            columns |= {f"{text}.{column}": torch.stack(part) for column, part in parts.items()}
        log.info("%s: %s", text, _remark(rows["candidate"]["texts"][text]))
    if base is not None and config.generated:
        rows["candidate"]["agreement"] = _agreement(models, candidate, base, windows, config)
    return columns


def _logits_of(model: Any, device: torch.device) -> LogitsOf:
    return lambda tokens: model(tokens.to(device)).logits


class _Noise:
    """What rounding to 16 bits alone does to an original: the least divergence that means anything. The same
    for every candidate, so it is kept in the user cache."""

    def __init__(self, base: ModelFolder, config: EvalConfig, device: torch.device):
        self._base, self._config, self._device = base, config, device
        self.dtype = base.dtype if base.dtype.itemsize == 2 else torch.bfloat16
        self._known: dict[str, Any] = {}

    @functools.cached_property
    def reader(self) -> LogitsOf:
        return _logits_of(load_dense(self._base, self._device, self.dtype), self._device)

    def _file(self, blocks: TokenBlocks) -> Path:
        return _cache_file(
            "noise", [self._base.fingerprint, blocks.sha256, self._config.dtype], self._device
        )

    def missing(self, blocks: TokenBlocks) -> bool:
        if self.dtype == DTYPES[self._config.dtype]:
            return False
        file = self._file(blocks)
        if file.exists():
            self._known[blocks.sha256] = read_json(file)
        return blocks.sha256 not in self._known

    def keep(self, blocks: TokenBlocks, found: dict[str, Any]) -> None:
        kept = ("kl", "kl_stderr", "kl_p99", "kl_p999", "top1", "top1_stderr", "paired")
        noise = {"dtype": str(self.dtype).removeprefix("torch.")} | {
            key: found[key] for key in kept
        }
        self._known[blocks.sha256] = noise
        _keep(self._file(blocks), noise)

    def of(self, blocks: TokenBlocks) -> dict[str, Any] | None:
        """None where the texts are read in 16 bits themselves."""
        return self._known.get(blocks.sha256)


def _agreement(
    models: Mapping[str, Any],
    candidate: ModelFolder,
    base: ModelFolder,
    windows: Mapping[str, TokenBlocks],
    config: EvalConfig,
) -> dict[str, Any]:
    """Greedy agreement from the beginnings of windows, spread over all texts."""
    starts = torch.cat([blocks.tokens[:, : config.prompt_tokens] for blocks in windows.values()])
    chosen = torch.linspace(0, len(starts) - 1, min(config.prompts, len(starts))).round().long()
    readers = {
        name: functools.partial(Reader, models[name], Caches(folder, models[name]))
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
) -> dict[str, list[float]]:
    """KL of every block of the candidate alone in ``base``, for each text; see eval.blocks.

    base: the folder that was quantized, whose hidden states the candidate's blocks share
    """
    assert config.block_tokens is not None
    family, dtype = family_of(base.config), DTYPES[config.dtype]
    model, other = load_dense(base, device, dtype), load_dense(candidate, device, dtype)
    norm, head = model.get_submodule(family.final_norm), model.get_output_embeddings()
    found = {}
    for text, blocks in windows.items():
        rows = [row[: config.block_tokens] for row in blocks.tokens.to(device)]
        count = math.ceil(config.block_tokens / config.window)
        found[text] = block_divergence(
            model,
            list(model.get_submodule(family.blocks)),
            list(other.get_submodule(family.blocks)),
            lambda hidden: head(norm(hidden)),
            track(rows[:count], f"blocks alone, {text}"),
        )
    return found


def _remark(found: Mapping[str, float]) -> str:
    divergence = f", KL {found['kl']:.4f}" if "kl" in found else ""
    return f"perplexity {found['perplexity']:.2f}{divergence}"


def _rows(blocks: TokenBlocks, text: str) -> Iterator[Tensor]:
    yield from track(blocks.tokens, f"evaluate {text}")


def _score(
    folder: ModelFolder, config: EvalConfig, tokenizer: Any, device: torch.device
) -> tuple[dict[str, Any], dict[str, Samples]]:
    """Scores and samples by task, see eval.task_scores."""
    with _quiet(), _answering(folder, config, tokenizer, device) as lm:
        scores, samples = score_tasks(
            lm,
            config.tasks,
            limit=config.limit,
            fewshot=config.fewshot,
            chat_template=config.chat_template,
        )
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


def _score_cached(
    folder: ModelFolder, config: EvalConfig, tokenizer: Any, device: torch.device
) -> tuple[dict[str, Any], dict[str, Samples]]:
    """``_score`` of the original: the same for every candidate of a sweep, so it is kept in the user cache
    under everything it depends on."""
    asked = [folder.fingerprint, config.tasks, config.limit, config.batch_size, task_sources()]
    asked += [config.engine, version_of(config.engine), config.fewshot, config.chat_template]
    file = _cache_file("task-scores", asked, device)
    if file.exists():
        log.info("task scores of the original come from the cache: %s", file)
        kept = read_json(file)
        return {t: {**s, "cached": True} for t, s in kept["scores"].items()}, kept["samples"]
    scores, samples = _score(folder, config, tokenizer, device)
    _keep(file, {"scores": scores, "samples": samples})
    return scores, samples


def _cache_file(kind: str, asked: list[Any], device: torch.device) -> Path:
    """Where the user cache has a figure of an original, named by all that it depends on."""
    facts = environment(device)
    key = json.dumps([*asked, *(facts[k] for k in ("commit", "versions", "device", "threads"))])
    return cache_dir() / kind / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _keep(file: Path, found: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    write_json(partial, found)
    partial.replace(file)


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


def check_context(config: ContextConfig, model: ModelFolder) -> None:
    """Raises UserError if the text is missing or too short, or the model does not take such lengths."""
    limit = model.config.get("max_position_embeddings")
    asked = {
        "context.tokens": config.tokens,
        "context.prompt_tokens + context.generated": config.prompt_tokens + config.generated,
        "context.lengths": max(config.lengths, default=0),
    }
    for key, tokens in asked.items():
        if limit is not None and tokens > limit:
            raise UserError(f"{key} needs {tokens} tokens, {model.path} takes {limit}: choose less")
    _context_texts(config, open_tokenizer(model))


def _context_texts(
    config: ContextConfig, tokenizer: Any
) -> tuple[TokenBlocks, TokenBlocks, dict[int, list[Haystack]]]:
    """Long windows, prompts, and haystacks by length."""
    texts = list(load_texts(config.text, config.text_field, config.split))
    joined = " ".join(texts)
    windows, prompts = (
        evaluation_windows(texts, tokenizer, tokens=window * count, window=window)
        for window, count in (
            (config.tokens, config.windows),
            (config.prompt_tokens, config.prompts),
        )
    )
    haystacks = {
        length: [
            build_haystack(
                joined,
                tokenizer,
                length=length,
                facts=config.facts,
                start=i / config.haystacks,
                seed=config.seed + i,
            )
            for i in range(config.haystacks)
        ]
        for length in config.lengths
    }
    return windows, prompts, haystacks


def measure_context(
    candidate: ModelFolder,
    base: ModelFolder,
    config: ContextConfig,
    tokenizer: Any,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Accuracy at length, every token through the cache of its folder; see eval.context and eval.retrieval.

    Returns {"base", "candidate"}: ``positions``, ``retrieval`` by length and kind, ``agreement``
    and ``heads`` (the errors of a packed cache) of the candidate, and what was read.
    """
    dtype = DTYPES[config.dtype]
    long, prompts, haystacks = _context_texts(config, tokenizer)
    models = {
        "base": load_dense(base, device, dtype),
        "candidate": load_dense(candidate, device, dtype),
    }
    caches = {
        name: Caches(folder, models[name])
        for name, folder in (("base", base), ("candidate", candidate))
    }
    readers = {name: functools.partial(Reader, models[name], caches[name]) for name in models}
    ours = {"candidate": readers["candidate"]}
    positions = by_position(
        readers["base"], ours, track(long.tokens, "long windows"), config.buckets
    )
    log.info("%s at length: KL %.5f", config.text, positions["candidate"]["kl"])
    results: dict[str, dict[str, Any]] = {}
    for name, found in positions.items():
        results[name] = {
            "text": config.text,
            "data_sha256": long.sha256,
            "window": config.tokens,
            "dtype": config.dtype,
            "positions": found,
            "retrieval": {},
        }
    for length, stacks in haystacks.items():
        hits = score(readers, track(stacks, f"haystacks of {length}"))
        for name, kinds in hits.items():
            results[name]["retrieval"][str(length)] = {
                kind: summarize(found, None if name == "base" else hits["base"][kind])
                for kind, found in kinds.items()
            }
    results["candidate"]["agreement"] = agreement(
        readers["base"], ours, prompts.tokens, config.generated
    )["candidate"]
    if caches["candidate"].scheme is not None:
        results["candidate"]["heads"] = head_errors(
            models["candidate"], caches["candidate"], long.tokens[0]
        )
    return results


def measure_decode(
    folders: Mapping[str, ModelFolder | RandomModel], config: SpeedConfig, device: torch.device
) -> dict[str, dict[str, dict[str, Any]]]:
    """Decode speed of each folder, or model of a shape, by each engine, interleaved; see eval.speed.

    Returns folder -> engine -> {load, engine, version, checkpoint_bytes} and what eval.speed found.
    Raises RuntimeError if nothing could be measured.
    """
    check_lengths(folders, config)
    load = Load(
        points=points_of(config),
        warmup=config.warmup,
        repeats=config.repeats,
        seed=config.seed,
        threads=config.threads,
        together=config.together,
        tune=config.tune,
        device=str(device),
        limits=Limits(config.limits.ttft_ms, config.limits.itl_ms),
    )
    labels = {
        (name, engine): name if len(config.engines) == 1 else f"{name} ({engine})"
        for name in folders
        for engine in config.engines
    }
    decoders = {
        label: _opener(engine, folders[name], load) for (name, engine), label in labels.items()
    }
    found = measure_speed(decoders, load)
    results: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in folders}
    for (name, engine), label in labels.items():
        results[name][engine] = {
            "load": asdict(config),
            "engine": engine,
            "version": version_of(engine),
            "checkpoint_bytes": _bytes_on_disk(folders[name]),
            **found[label],
        }
    return results


def check_lengths(folders: Mapping[str, ModelFolder | RandomModel], config: SpeedConfig) -> None:
    """Raises UserError for a pattern that a model does not take."""
    longest = max(points_of(config), key=lambda point: point.input_length + point.output_length)
    tokens = longest.input_length + longest.output_length
    key = "patterns" if longest.least_input is None else "mix"
    for name, folder in folders.items():
        limit = token_limit(folder)
        if limit is not None and tokens > limit:
            raise UserError(f"speed.{key} needs {tokens} tokens, {name} takes {limit}: choose less")


def token_limit(folder: ModelFolder | RandomModel) -> int | None:
    """The tokens of a sequence that a model takes, as far as its config says."""
    config = folder.config if isinstance(folder, ModelFolder) else shape_config(folder.shape)
    return config.get("max_position_embeddings")


def points_of(config: SpeedConfig) -> tuple[Point, ...]:
    """Every pattern at every batch size, then the mix."""

    def scaled(tokens_in: int, tokens_out: int) -> tuple[int, int]:
        # Of one token out there is no gap to measure.
        return max(1, round(config.scale * tokens_in)), max(2, round(config.scale * tokens_out))

    sizes: list[tuple[int, ...]] = [scaled(*pattern) for pattern in config.patterns]
    if config.mix is not None:
        least, most = zip(config.mix.input, config.mix.output, strict=True)
        sizes.append((*scaled(*most), *scaled(*least)))
    return tuple(Point(batch, *size) for size in sizes for batch in config.batches)


def _bytes_on_disk(folder: ModelFolder | RandomModel) -> int | None:
    return _file_bytes(folder) if isinstance(folder, ModelFolder) else None


def check_engines(config: SpeedConfig) -> None:
    """Raises UserError for an engine that is not installed here."""
    for engine in config.engines:
        _check_installed("speed.engines", engine)


def _check_installed(key: str, engine: str) -> None:
    if importlib.util.find_spec(engine) is None:
        raise UserError(
            f"{key}={engine} needs the package {engine} in this environment: install it, or leave it out"
        )


def _opener(engine: str, folder: ModelFolder | RandomModel, load: Load) -> Callable[[], Decoder]:
    if isinstance(folder, RandomModel):
        if engine != "compress":
            raise UserError(
                f"{PREFIX}{folder.shape} has no files that speed.engines={engine} could open: choose compress"
            )
        return functools.partial(open_random, folder, load.device)
    if engine == "transformers":
        return functools.partial(open_transformers, folder.path, load.device)
    if engine == "vllm":
        longest = max(point.input_length + point.output_length for point in load.points)
        most = max(point.batch for point in load.points)
        return functools.partial(open_vllm, folder.path, load.device, longest=longest, most=most)
    return functools.partial(open_decoder, folder.path, load.device)
