"""Exports of the language part of a model that sees images too: dressed as the whole model again."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

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
    config = {k: v for k, v in original.stated.items() if k != "quantization_config"}
    if "quantization_config" in part.config:
        config["quantization_config"] = _stated(part.config["quantization_config"], begins, outer)
    write_json(target / "config.json", config)


def _stated(config: dict[str, Any], begins: dict[str, str], outer: Outer) -> dict[str, Any]:
    """What a format says, with the names of the whole model; towers and projectors keep 16 bits."""
    found = dict(config)
    if "ignore" in found:
        apart = [f"re:.*{re.escape(piece.removesuffix('.'))}.*" for piece in outer.beside]
        found["ignore"] = [*_names(found["ignore"], begins), *apart]
    if "modules_to_not_convert" in found:
        apart = [piece.removesuffix(".") for piece in outer.beside]
        found["modules_to_not_convert"] = [*_names(found["modules_to_not_convert"], begins), *apart]
    if "config_groups" in found:
        found["config_groups"] = {
            key: {**group, "targets": _names(group["targets"], begins)}
            for key, group in found["config_groups"].items()
        }
    return found


def _names(names: list[str], begins: dict[str, str]) -> list[str]:
    return [stored_name(f"{name}.", begins).removesuffix(".") for name in names]
