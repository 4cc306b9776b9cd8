"""Families that a person added: JSON files in a folder of the user's settings, one a family.

A file holds the fields of ``families.Family`` that are not as by default: texts, lists of texts, tables of
texts, ``inputs`` and ``experts`` as objects of their own fields. ``compress families --probe`` writes one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from torch import nn

from compress.errors import UserError
from compress.model.families import FAMILIES, Experts, Family, Input, family_of
from compress.model.folder import read_json, write_json

# Fields that a file does not set.
OURS = ("when", "twins", "file")


def families_dir() -> Path:
    """``$XDG_CONFIG_HOME/compress/families``, or ``~/.config/compress/families``."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "compress" / "families"


# Known without a file, while they are tried.
_tried: list[Family] = []


@contextmanager
def trying(family: Family) -> Iterator[None]:
    """Within it a family is known as if there were a file of it."""
    _tried.append(family)
    try:
        yield
    finally:
        _tried.pop()


def added() -> list[Family]:
    """Those of the folder, by the names of their files. Raises UserError for one that holds none."""
    return [*_tried, *(read_family(file) for file in sorted(families_dir().glob("*.json")))]


def digest_of(config: Mapping[str, Any]) -> str | None:
    """SHA-256 of the family of a config.json, if a person added it: another file may make another model of
    the same folder."""
    family = family_of(dict(config))
    if family in FAMILIES:
        return None
    return hashlib.sha256(json.dumps(_told(family), sort_keys=True).encode()).hexdigest()


def read_family(path: Path) -> Family:
    """Raises UserError, with the key, for a file that holds no family."""
    found = read_json(path)
    try:
        family = _made(Family, found)
        _check_itself(family)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return replace(family, file=str(path))


def _check_itself(family: Family) -> None:
    """Raises ValueError, with the key, for what makes no family whatever the model."""
    if not family.inputs:
        raise ValueError("inputs is empty: it holds what the linears of a block read")
    for shared in family.inputs:
        _check_input(shared)
    if family.attention_output and family.attention_output not in family.linears:
        raise ValueError(
            f"attention_output={family.attention_output!r} is not among the linears of inputs"
        )
    names = family.experts
    for name in () if names is None else (names.gate, names.up, names.down):
        if not name or "." in name:
            raise ValueError(f"experts: {name!r} is no name of a linear of an expert")
    if family.head != family.head_module and "." in family.head + family.head_module:
        raise ValueError("head is another name than head_module: neither may have a dot then")


def _check_input(shared: Input) -> None:
    if not shared.linears:
        raise ValueError("inputs: linears is empty")
    for name in (*shared.linears, shared.source or "", *shared.others):
        if set("{}") & set(name.replace("{}", "", 1)):
            raise ValueError(f"inputs: {name!r} has other braces than one {{}}, for an expert")
    if len({"{}" in name for name in shared.linears}) > 1:
        raise ValueError(f"inputs: of linears={list(shared.linears)} some are of experts")


def check_modules(model: nn.Module, family: Family) -> None:
    """Raises UserError, with the file and the key, for a family that a person added and that names parts of a
    model, or kinds of parts, that this one as transformers builds it has not."""
    for key in ("blocks", "embedding", "final_norm", "head_module", "rotary"):
        name = getattr(family, key)
        if not _has(model, name) and (name or key != "rotary"):
            raise _no_part(family, key, name)
    blocks: Any = model.get_submodule(family.blocks)
    if not isinstance(blocks, nn.ModuleList):
        raise _no_part(family, "blocks", family.blocks, "no list of blocks")
    for name in family.transposed:
        # As transformers' Conv1D is.
        if not all(
            _has(layer, name) and hasattr(layer.get_submodule(name), "nx") for layer in blocks
        ):
            raise _no_part(
                family, "transposed", name, "no linear of every block that is turned over"
            )
    if (names := family.experts) is not None:
        # A block's own part alone can have another name.
        inner = names.module == names.mlp or "." not in names.module + names.mlp
        if not inner or not any(_has(layer, f"{names.module}.experts") for layer in blocks):
            raise _no_part(family, "experts", names.module, "no part of a block that has experts")


def check_blocks(model: nn.Module, family: Family) -> None:
    """The same for parts of blocks, which have the names of checkpoints by now. Every linear is one of some
    block, and what makes its input is in the same."""
    blocks: Any = model.get_submodule(family.blocks)
    parts, linears = set[str](), set[str]()
    for layer in blocks:
        inner = {name: module for name, module in layer.named_modules() if name}
        own = {name for name, module in inner.items() if isinstance(module, nn.Linear)}
        parts |= inner.keys()
        linears |= own
        for shared in family.inputs_in(own):
            source = shared.source
            if source is not None and not hasattr(inner.get(source), "weight"):
                raise _no_part(family, "source", source, "no norm or linear beside its linears")
    for name in family.linears:
        if name.format(0) not in linears:
            raise _no_part(family, "linears", name, "no linear of a block")
    for key, names in _named(family).items():
        for name in names:
            if name and name.format(0) not in parts:
                raise _no_part(family, key, name, "no part of a block")


def _named(family: Family) -> dict[str, tuple[str, ...]]:
    """What a family names of blocks beside linears and what makes their inputs, by its keys."""
    return {
        "others": tuple(name for shared in family.inputs for name in shared.others),
        "attention": (family.attention,) if family.attention_output else (),
        "queries": (family.queries,),
        "keys": (family.keys,),
        "values": (family.values,),
        "writers": family.writers,
        "neurons": family.neurons,
        "mlp_output": (family.mlp_output,),
        "head_norms": family.head_norms,
    }


def _has(module: nn.Module, name: str) -> bool:
    return bool(name) and name in dict(module.named_modules())


def _no_part(family: Family, key: str, name: str, what: str = "no part") -> UserError:
    return UserError(f"{family.file or family.name}: {key} {name!r} is {what} of this model")


def write_family(path: Path, family: Family) -> None:
    """What of it is not as by default."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, _told(family))


def _told(value: Any) -> dict[str, Any]:
    found = {}
    for part in fields(value):
        own = getattr(value, part.name)
        default = part.default if part.default_factory is MISSING else part.default_factory()
        if own == default or part.name in OURS:
            continue
        if part.name == "inputs":
            own = [_told(shared) for shared in own]
        elif isinstance(own, Experts):
            own = asdict(own)
        found[part.name] = own
    return found


def _made(kind: Any, found: Any) -> Any:
    """An object of this dataclass. Raises ValueError for keys and values that it does not have."""
    if not isinstance(found, dict):
        raise ValueError(f"{found!r} is no object")
    hints = get_type_hints(kind)
    known = [part.name for part in fields(kind) if part.name not in OURS]
    for key in found:
        if key not in known:
            raise ValueError(f"{key} is not known: known are {', '.join(known)}")
    values = {key: _value(key, hints[key], value) for key, value in found.items()}
    needed = [p.name for p in fields(kind) if p.default is p.default_factory is MISSING]
    if missing := [key for key in needed if key not in values]:
        raise ValueError(f"{missing[0]} is missing")
    return kind(**values)


def _value(key: str, hint: Any, value: Any) -> Any:
    if hint == tuple[Input, ...] and isinstance(value, list):
        return tuple(_made(Input, inner) for inner in value)
    if hint == (Experts | None):
        return None if value is None else _made(Experts, value)
    if hint == tuple[str, ...] and isinstance(value, list) and all(map(_is_text, value)):
        return tuple(value)
    if hint == Mapping[str, str] and isinstance(value, dict) and all(map(_is_text, value.values())):
        return value
    if hint == (str | None) and (value is None or _is_text(value)):
        return value
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if hint in (str, bool) and type(value) is hint:
        return value
    raise ValueError(f"{key}={value!r} is not of its kind")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
