"""What GPTQ and AWQ share: packed columns, scales in float16 of bfloat16 models too, sizes by the config."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from compress.errors import UserError
from compress.model.folder import ModelFolder
from compress.quantize import record
from compress.quantize.scheme import Scheme

log = logging.getLogger(__name__)

CODES = ".qweight"
# The group size of one group a row.
WHOLE_ROW = -1


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
            f"{folder.place_of(name)}: {name} has shape {tuple(tensor.shape)}, its config asks for {shape}"
        )
