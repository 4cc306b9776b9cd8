"""What formats of one folder of safetensors share, and GPTQ and AWQ: scales in float16, of models in bfloat16
too; shapes by the config."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.export.shards import ShardWriter
from compress.model.folder import ModelFolder
from compress.quantize import record
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Scheme

log = logging.getLogger(__name__)

CODES = ".qweight"
# The group size of one group a row.
WHOLE_ROW = -1


def write_tensors(
    source: ModelFolder,
    target: Path,
    compress_linear: Callable[[QTensor], Iterable[tuple[str, Tensor]]],
) -> dict[str, Any]:
    """Write the tensors of a record, or plain folder, and what travels along, to the new folder ``target``.

    compress_linear: the stored tensors of a linear, by local name. Returns the config.json of the original.
    """
    target.mkdir(parents=True)
    source.copy_companions(target)
    shards = ShardWriter(target)
    for name, value in record.contents(source):
        if isinstance(value, Tensor):
            shards.add(name, value)
            continue
        base = name.removesuffix(".weight")
        for suffix, tensor in compress_linear(value):
            shards.add(f"{base}.{suffix}", tensor)
    shards.close()
    return {k: v for k, v in source.config.items() if k != record.KEY}


def linears(folder: ModelFolder) -> list[str]:
    """Names of the quantized linears, without suffix, in file order."""
    return [name.removesuffix(CODES) for name in folder.names if name.endswith(CODES)]


def stated_size(scheme: Scheme) -> int | str:
    """The group size as a config has it."""
    return WHOLE_ROW if scheme.group_size == "channel" else scheme.group_size


def check_groups(export: str, scheme: Scheme, sizes: tuple[int, ...]) -> None:
    """Raises UserError for groups of another size than its readers take."""
    if isinstance(scheme.group_size, int) and scheme.group_size not in sizes:
        raise UserError(
            f"export={export} has groups of {', '.join(map(str, sizes))} columns, or rows, which is what its "
            f"readers take, not {scheme.name}: choose another scheme.group_size, or "
            "export=compressed-tensors"
        )


def scale_dtype(source: ModelFolder, export: str) -> torch.dtype:
    """float16 if all scales of a record are numbers of it, else their own type.

    bfloat16 has 8 significant bits and float16 has 11, 8 of them down to 2^-17: what does not fit is smaller,
    or 65536 and larger.
    """
    for name in record.linears(source):
        scale = source.tensor(f"{name}.scale")
        if not torch.equal(scale.half().to(scale.dtype), scale):
            kept = str(scale.dtype).removeprefix("torch.")
            log.warning(
                "scales of %s do not fit float16: export=%s has them all in %s, and engines that keep "
                "float16 compute with others",
                name,
                export,
                kept,
            )
            return scale.dtype
    return torch.float16


def read_scale(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored scales in the model's type if they are numbers of it, as ours are; else as they are."""
    own = stored.to(dtype)
    return own if torch.equal(own.to(stored.dtype), stored) else stored


def expect(folder: ModelFolder, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises UserError for a tensor of another shape than the config of its folder asks for."""
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"{folder.path}: {name} has shape {tuple(tensor.shape)}, its config asks for {shape}"
        )
