"""What the GPTQ and AWQ formats share: scales in float16, of models in bfloat16 too; shapes by the config."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from compress.errors import UserError
from compress.model.folder import ModelFolder
from compress.quantize import record

log = logging.getLogger(__name__)


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
