"""Exports of the language part of a model that sees images too: dressed as the whole model again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.export import gguf, gptq
from compress.export.shards import ShardWriter
from compress.model.folder import INDEX, ModelFolder, open_tensors, write_json
from compress.model.language import Outer, spelling, stored_name, text_name

# What prepares images.
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def dress(target: Path, original: ModelFolder) -> None:
    """Give the export of a language model the names, the config and the other tensors of ``original``, which
    it was the language part of; nothing, if that is a language model itself."""
    outer = original.outer
    if outer is None:
        return
    part = ModelFolder(target)
    begins = spelling(original.stored, outer)
    inner = target / "dressed"
    inner.mkdir()
    shards = ShardWriter(inner)
    for name in part.names:
        shards.add(stored_name(name, begins), part.tensor(name))
    for name, file in original.stored.items():
        if text_name(name, outer) is None:
            with open_tensors(file) as held:
                shards.add(name, held.get_tensor(name))
    shards.close()
    for file in (*part.weight_files, target / INDEX):
        file.unlink(missing_ok=True)
    for file in inner.iterdir():
        file.rename(target / file.name)
    inner.rmdir()
    for pattern in PROCESSORS:
        for file in original.path.glob(pattern):
            shutil.copyfile(file, target / file.name)
    _write_config(target, part.config.get("quantization_config"), original, begins)


def _write_config(
    target: Path, quantization: Any, original: ModelFolder, begins: dict[str, str]
) -> None:
    config = {k: v for k, v in original.stated.items() if k != "quantization_config"}
    if quantization is not None:
        assert original.outer is not None
        config["quantization_config"] = _stated(quantization, begins, original.outer)
        if (target / gptq.CONFIG).exists():
            write_json(target / gptq.CONFIG, config["quantization_config"])
    write_json(target / "config.json", config)


# Stages that change what towers and projectors are made for, and what it is.
REFUSED = {
    "rotate": "what its projector writes into the residual stream would not be rotated",
    "prune": "the whole model states and uses the sizes of its language part",
}


def check(stages: Iterable[str], exports: Iterable[str], original: ModelFolder) -> None:
    """Raises UserError for a stage or a format that leaves no place for what a model has beside its language
    part."""
    if original.outer is None:
        return
    kind = original.stated["model_type"]
    for stage in stages:
        if stage in REFUSED:
            raise UserError(f"{stage} does not apply to models of type {kind}: {REFUSED[stage]}")
    if gguf.NAME in exports:
        raise UserError(
            f"export={gguf.NAME} holds language models alone, models of type {kind} see images too: choose "
            "export=compressed-tensors, whose files hold the rest as it is"
        )


# Where formats list what keeps 16 bits, by the names of modules or parts of them.
LEFT_OUT = ("modules_to_not_convert", "llm_int8_skip_modules")


def _stated(config: dict[str, Any], begins: dict[str, str], outer: Outer) -> dict[str, Any]:
    """What a format says, with the names of the whole model; towers and projectors keep 16 bits."""
    found, apart = dict(config), [piece.removesuffix(".") for piece in outer.beside]
    if "ignore" in found:
        patterns = [f"re:.*{re.escape(piece)}.*" for piece in apart]
        # The head of checkpoints and that of transformers are called otherwise.
        names = [*_names(found["ignore"], begins), *found["ignore"], *patterns]
        found["ignore"] = list(dict.fromkeys(names))
    for key in LEFT_OUT:
        if key in found:
            # By the names of checkpoints and those of transformers, which begin otherwise.
            names = [
                *_names(found[key], begins),
                *found[key],
                *apart,
                *(f"model.{p}" for p in apart),
            ]
            found[key] = list(dict.fromkeys(names))
    if found.get("quant_method") == gptq.NAME:
        dynamic = {_pattern(key, begins): own for key, own in found.get("dynamic", {}).items()}
        found["dynamic"] = {f"-:.*{re.escape(piece)}.*": {} for piece in apart} | dynamic
    if "config_groups" in found:
        found["config_groups"] = {
            key: {**group, "targets": _names(group["targets"], begins)}
            for key, group in found["config_groups"].items()
        }
    return found


def _names(names: list[str], begins: dict[str, str]) -> list[str]:
    return [stored_name(f"{name}.", begins).removesuffix(".") for name in names]


def _pattern(key: str, begins: dict[str, str]) -> str:
    """The pattern of GPTQ for one linear (``+:^NAME$``) with its name in the whole model."""
    sign, name = key[:3], re.sub(r"\\(.)", r"\1", key[3:-1])
    return f"{sign}{re.escape(stored_name(name, begins))}$"
