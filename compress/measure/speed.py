"""Decode speed of folders, or models of a shape, by whichever engine decodes."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from compress.config import AUTO, SpeedConfig
from compress.environment import version_of
from compress.errors import UserError
from compress.measure.size import file_bytes
from compress.model.families import check_applies, limit_of
from compress.model.folder import ModelFolder
from compress.model.shapes import PREFIX, shape_config
from compress.runtime.decoder import open_decoder, open_random
from compress.runtime.random import RandomModel
from eval.engines.transformers_decode import open_transformers
from eval.engines.vllm_decode import open_vllm
from eval.parts import Once, always
from eval.speed import Decoder, Limits, Load, Point, measure_speed


def measure_decode(
    folders: Mapping[str, ModelFolder | RandomModel],
    config: SpeedConfig,
    device: torch.device,
    once: Once = always,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Decode speed of each folder, or model of a shape, by each engine, interleaved; see eval.speed.

    Returns folder -> engine -> {load, engine, version, checkpoint_bytes} and what eval.speed found, of whose
    parts ``once`` is asked. Raises RuntimeError if nothing could be measured.
    """
    check_lengths(folders, config)
    asked = engines_of(config, folders)
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
        (name, engine): name if len(asked) == 1 else f"{name} ({engine})"
        for name in folders
        for engine in asked
    }
    decoders = {
        label: _opener(engine, folders[name], load) for (name, engine), label in labels.items()
    }
    found = measure_speed(decoders, load, once)
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
    return limit_of(config)


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
    return file_bytes(folder) if isinstance(folder, ModelFolder) else None


def engines_of(config: SpeedConfig, folders: Mapping[str, ModelFolder | RandomModel]) -> list[str]:
    """Those that measure. Raises UserError if ``compress`` is asked for and runs not all of them."""
    if config.engines == [AUTO]:
        return ["compress" if all(map(_is_run, folders.values())) else "transformers"]
    for folder in folders.values():
        if "compress" in config.engines and isinstance(folder, ModelFolder):
            check_applies("decoder", folder.config)
    return config.engines


def _is_run(folder: ModelFolder | RandomModel) -> bool:
    """Whether this project's runtime runs the blocks of a model."""
    try:
        return isinstance(folder, RandomModel) or bool(check_applies("decoder", folder.config))
    except UserError:
        return False


def check_engines(config: SpeedConfig) -> None:
    """Raises UserError for an engine that is not installed here."""
    for engine in config.engines:
        if engine != AUTO:
            check_installed("speed.engines", engine)


def check_installed(key: str, engine: str) -> None:
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
