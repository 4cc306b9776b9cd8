"""What a folder is predicted to do on a device: a row beside the measured one."""

from __future__ import annotations

from typing import Any

import torch

from compress.model.folder import ModelFolder
from compress.plan.checkpoint import on_disk
from compress.plan.hardware import CPU, Hardware
from compress.plan.roofline import Request, predicted


def predict(folder: ModelFolder, hardware: Hardware, point: Request) -> dict[str, Any]:
    """{hardware, bytes, memory_bytes, itl_ms, ttft_ms, tokens_per_s, limit} by the roofline.

    Counted from its headers. On the CPU what this project's runtime has no kernel for counts in 16 bits, as
    it is held.
    """
    device = torch.device(CPU) if hardware.name == CPU else None
    return predicted(on_disk(folder, device), hardware, point)
