"""From what a person calls a device to the device."""

from __future__ import annotations

import torch

from compress.errors import UserError

ALLOWED = "choose auto, cpu, or cuda"


def device_named(name: str) -> torch.device:
    """auto is a GPU if there is one; ``cuda:1`` becomes the one in use, which kernels and graphs take. Raises
    UserError for an unknown or absent device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name} is not known: {ALLOWED}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name} is not known: {ALLOWED}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device={name} was asked for, but no CUDA device is usable here")
        if device.index is not None:
            torch.cuda.set_device(device)
    return device
