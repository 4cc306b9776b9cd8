"""A Hugging Face model folder, opened lazily: config, tensor names, one tensor at a time.

Knows safetensors files and their index, and a GGUF file in place of them; knows nothing of quantization.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.disk import writing
from compress.errors import UserError
from compress.model.families import MOST_EXPERTS, Family, family_of, is_tied
from compress.model.gguf_file import SUFFIX, GGUFFile
from compress.model.language import Outer, outer_of, text_config
from compress.model.stored import Place, Spelling, Stored

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What the cache of keys and values is kept in; see compress.kv_cache.folder.
KV_CACHE = "kv_cache.json"
# What pruning left of the original; see compress.prune.cut.
PRUNED = "prune.json"
READABLE = 0o644
# Bytes of the largest JSON file that is read: safetensors takes headers of as many.
MOST_JSON = 100_000_000
# Levels of lists and objects in one: those of models have five.
DEEPEST_JSON = 64
# How the names of files of weights end: a companion has another ending, an index names no other.
WEIGHTS = (".safetensors", SUFFIX)
# Tables that follow from config.json; early Llama checkpoints stored them.
DERIVED = ("rotary_emb.inv_freq",)
# What a served folder needs beside the weights. config.json is written by whoever writes weights.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    KV_CACHE,
    PRUNED,
)
# Bytes of an element, by the name safetensors gives its type.
BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Shapes(Protocol):
    """What is known of a folder without its weights: of one on disk, or of one that will be."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def names(self) -> list[str]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def tied_head(self) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def __contains__(self, name: str) -> bool: ...


class ModelFolder:
    """Read access to a model folder.

    Raises UserError if the folder, its config.json or its safetensors files are missing or
    unreadable, or do not hold what the index says.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"model folder {self.path} does not exist")
        self.stated: dict[str, Any] = read_json(self.path / "config.json")
        if _is_in_library(self.stated):
            del self.stated[REMOTE]
        self.outer = outer_of(self.stated)
        self._places: dict[Path, dict[str, Place]] = {}
        self.config = self.stated if self.outer is None else self._text_config(self.outer)
        if not isinstance(self.config.get("quantization_config") or {}, dict):
            raise UserError(f"{self.path}/config.json: quantization_config is not an object")
        check_code(self.path / "config.json", self.stated)

    def _text_config(self, outer: Outer) -> dict[str, Any]:
        try:
            return text_config(self.stated, outer)
        except UserError as error:
            raise UserError(f"{self.path}/config.json: {error}") from None

    @cached_property
    def _file_of(self) -> dict[str, Path]:
        family = self._family
        derived = DERIVED if family is None else (*DERIVED, *family.derived)
        drafts = () if family is None else family.drafts_of(self.config)
        files = {
            name: file
            for stored, file in self.stored.items()
            for name in self._names_of(stored)
            if not name.endswith(derived) and not name.startswith(drafts)
        }
        if not files:
            raise UserError(f"{self.path} holds no tensors")
        return files

    @cached_property
    def stored(self) -> dict[str, Path]:
        """The file of every tensor that the folder holds, by the name that it has there."""
        index = self.path / INDEX
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{index} has no weight_map")
            files = {name: self._inside(index, file) for name, file in weight_map.items()}
            self._check_index(index, files)
        elif (self.path / SINGLE).is_file():
            single = self.path / SINGLE
            with open_tensors(single) as f:
                files = dict.fromkeys(f.keys(), single)
        elif len(found := sorted(self.path.glob(f"*{SUFFIX}"))) == 1:
            files = dict.fromkeys(self._open(found[0]).keys(), found[0])
        elif pickled := pickles(self.path):
            raise UserError(
                f"{self.path} holds {pickled[0].name} and no safetensors: it is a pickle, which may run "
                "code when it is read; save the model anew with save_pretrained where that does no harm, "
                "or set model.allow_pickle=true, which reads tensors alone from it"
            )
        else:
            raise UserError(
                f"{self.path} holds neither {SINGLE} nor {INDEX}, nor one {SUFFIX} file"
            )
        return files

    @cached_property
    def _family(self) -> Family | None:
        """None where none is known: whoever needs one says so."""
        try:
            return family_of(self.config)
        except UserError:
            return None

    @property
    def _experts(self) -> int:
        count = self.config.get("num_local_experts", 0)
        return count if type(count) is int and 0 <= count <= MOST_EXPERTS else 0

    def _names_of(self, stored: str) -> list[str]:
        """The names of what a file holds under one."""
        return [name for name, _ in self._spelling.places(stored)]

    @cached_property
    def _spelling(self) -> Spelling:
        return Spelling(self._family, self._experts, self.outer)

    def _inside(self, index: Path, file: Any) -> Path:
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise UserError(f"{index} points outside the folder: {file!r}")
        if not file.endswith(WEIGHTS):
            raise UserError(f"{index} names {file!r}, which is no file of weights by its name")
        return self.path / file

    def _check_index(self, index: Path, files: dict[str, Path]) -> None:
        """Raises UserError if a file of the index is missing, or lacks what the index says it holds."""
        for file in sorted(set(files.values())):
            # No exception for names that no file can have.
            if not os.path.isfile(file):
                raise UserError(f"{index} names {file.name}, which is missing")
            with open_tensors(file) as f:
                held = set(f.keys())
            for name, where in files.items():
                if where == file and name not in held:
                    raise UserError(
                        f"{index} says that {file.name} holds {name}, which it does not"
                    )

    @property
    def names(self) -> list[str]:
        """All tensor names but tables that follow from the config and layers that only draft, in the order of
        the files."""
        return list(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def tensor(self, name: str) -> Tensor:
        """One tensor, read from disk now. Raises UserError if the folder does not hold it."""
        with self._open(self.file_of(name)) as f:
            return self._checked(name, lambda: f.get_tensor(name))

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """The rows of a tensor, ``count`` at a time, each part read when its turn comes: of a tensor in a
        safetensors file no more is in memory."""
        file, shape = self.file_of(name), self.shape(name)
        if not shape:
            yield self.tensor(name)
            return
        if file.suffix == SUFFIX:
            yield from self.tensor(name).split(count)
            return
        for start in range(0, shape[0], count):
            # Opened anew: what was read stays in memory as long as the file is mapped.
            with self._open(file) as f:
                part = self._checked(name, lambda: f.get_slice(name))
                yield part[start : start + count]
            del part

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""
        with self._open(self.file_of(name)) as f:
            return tuple(self._checked(name, lambda: f.get_slice(name).get_shape()))

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor on disk, from the header alone."""
        with self._open(self.file_of(name)) as f:
            part = self._checked(name, lambda: f.get_slice(name))
            if part.get_dtype() not in BYTES:
                raise UserError(f"{self.file_of(name)}: {name} is of type {part.get_dtype()}")
            return math.prod(part.get_shape()) * BYTES[part.get_dtype()]

    def stored_type(self, name: str) -> str:
        """What safetensors calls the type of a tensor, from the header alone."""
        with self._open(self.file_of(name)) as f:
            return str(self._checked(name, lambda: f.get_slice(name).get_dtype()))

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor. Raises UserError if none does."""
        if name not in self._file_of:
            raise UserError(f"{self.path} holds no tensor {name}")
        return self._file_of[name]

    def place_of(self, name: str) -> Path:
        """For a sentence about a tensor, or a linear: its file, or that of a part of it; the folder if it has
        none."""
        modules = (name, name.rpartition(".")[0])
        parts = (file for held, file in self._file_of.items() if held.rpartition(".")[0] in modules)
        return self._file_of.get(name) or next(parts, self.path)

    def _open(self, file: Path) -> Any:
        if file.suffix != SUFFIX:
            found = open_tensors(file)
            if self._spelling.plain:
                return found
            if file not in self._places:
                # Once a file: models of many experts have many names.
                self._places[file] = self._spelling.places_in(found.keys())
            return Stored(found, self._places[file])
        return GGUFFile(file, DTYPES.get(self._stated_dtype or ""), self.config)

    def _checked(self, name: str, read: Any) -> Any:
        try:
            return read()
        except SafetensorError as error:
            raise UserError(f"{self._file_of[name]} cannot give {name}: {error}") from error

    @property
    def weight_files(self) -> list[Path]:
        return sorted(set(self._file_of.values()))

    @property
    def dtype(self) -> torch.dtype:
        """The 16- or 32-bit type of the weights: as config.json states, else of the first tensor."""
        name = self._stated_dtype
        if name is None:
            name = str(self.tensor(self.names[0]).dtype).removeprefix("torch.")
        return dtype_named(name, self.path)

    @property
    def _stated_dtype(self) -> str | None:
        """As config.json names it, in the key of today or the one of transformers 4."""
        name = self.config.get("dtype") or self.config.get("torch_dtype")
        return None if name is None else str(name)

    @property
    def tied_head(self) -> bool:
        return is_tied(self.config)

    def companions(self) -> Iterator[Path]:
        """Tokenizer, chat template, generation config, licence: files that travel along. Raises UserError for
        a link to something else than such a file."""
        for pattern in COMPANIONS:
            for file in sorted(p for p in self.path.glob(pattern) if p.is_file()):
                if file.suffix in WEIGHTS:
                    continue
                self._check_link(file)
                yield file

    def _check_link(self, file: Path) -> None:
        """Raises UserError for a link out of the folder to a file of another name: whoever gets the result
        would get that file. The hub's cache keeps files under their hashes beside its folders."""
        root, target = self.path.resolve(), file.resolve()
        blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
        if target.name != file.name and not any(map(target.is_relative_to, (root, blobs))):
            raise UserError(
                f"{file} is a link to {target}, outside the folder: copy that file if it belongs to the model"
            )

    def copy_companions(self, target: Path) -> None:
        for file in self.companions():
            shutil.copyfile(file, target / file.name)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config.json and the weight files: changes when the model does."""
        digest = hashlib.sha256()
        for file in [self.path / "config.json", *self.weight_files]:
            digest.update(file_sha256(file).encode())
        return digest.hexdigest()


def dtype_named(name: str | None, path: Path) -> torch.dtype:
    """The type that a config.json names. Raises UserError, with the path, for another one."""
    if not isinstance(name, str) or name not in DTYPES:
        raise UserError(f"{path}: dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def file_sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file that others may read: the library makes it private."""
    with writing(path):
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(READABLE)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with writing(path):
        path.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if it is missing, cannot be read, is larger or deeper than
    any such file is, or is no JSON object."""
    if not os.path.lexists(path):
        raise UserError(f"{path} is missing")
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a file")
    try:
        if (size := path.stat().st_size) > MOST_JSON:
            raise UserError(f"{path} has {size} bytes: JSON of more than {MOST_JSON} is not read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    if _deeper(value, DEEPEST_JSON):
        raise UserError(f"{path} is nested more than {DEEPEST_JSON} levels deep")
    return value


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects lie within each other at more than so many levels."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper(part, levels - 1) for part in inner)


# How a config names code that lies beside it or on the hub: classes, and how attention is computed.
REMOTE = "auto_map"
CODE = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


def _is_in_library(config: dict[str, Any]) -> bool:
    """Whether the code that a config names is of a model that has come into transformers under its name
    since: then it is left out, and the library's is run."""
    named = config.get(REMOTE)
    if not isinstance(named, dict):
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    ours = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))
    return ours is not None and str(named.get("AutoModelForCausalLM")).rpartition(".")[2] == ours


def check_code(file: Path, settings: dict[str, Any]) -> None:
    """Raises UserError for settings that name code: no model known here needs any, so none is ever run, and
    a checkpoint that named it would have engines ask for it."""
    named = [REMOTE] if settings.get(REMOTE) else []
    # Its other values, as sdpa, are names of what the library has.
    named += [key for key in CODE if "/" in str(settings.get(key) or "")]
    for key in named:
        raise UserError(
            f"{file} asks for code of its own ({key}: {str(settings[key])[:60]}), which is never run here: "
            f"take {key} out if the model works without it"
        )


# What code raises that is handed values of another type, size or shape than it asks for.
STUMBLES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    re.error,
)


@contextlib.contextmanager
def reading(place: Path | str) -> Iterator[None]:
    """For code that takes in what a file says: whatever it stumbles over is the file's fault, so it becomes a
    UserError that names the file, and one that does not name it is given its name.

    place: the path, and what in it after a colon
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except UserError as error:
        if str(place).partition(": ")[0] in str(error):
            raise
        raise UserError(f"{place}: {error}") from error
    except STUMBLES as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{place} does not fit together: {type(error).__name__}: {reason}"
        ) from error


# What torch.save writes, and people call weights.
PICKLES = ("*.bin", "*.pt", "*.pth")


def pickles(path: Path) -> list[Path]:
    """The files of weights in a folder that are pickles."""
    found = sorted(file for pattern in PICKLES for file in path.glob(pattern) if file.is_file())
    # What trainers leave beside a model.
    beside = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
    return [file for file in found if not file.name.startswith(beside)]


def open_tensors(path: Path) -> Any:
    """A safetensors file, opened. Raises UserError if it is none."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error
