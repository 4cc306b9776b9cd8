"""What a folder, or a model of shapes, is predicted to do on a device: a row beside the measured one."""

from __future__ import annotations

from typing import Any

import torch

from compress.kv_cache.scheme import CacheScheme
from compress.model.folder import ModelFolder, Shapes
from compress.plan.checkpoint import as_planned, on_disk
from compress.plan.hardware import CPU, Hardware
from compress.plan.roofline import Request, predicted
from compress.quantize.scheme import Schemes


def predict(
    model: ModelFolder | Shapes,
    schemes: Schemes | None,
    cache: CacheScheme | None,
    hardware: Hardware,
    point: Request,
) -> dict[str, Any]:
    """{hardware, bytes, memory_bytes, itl_ms, ttft_ms, tokens_per_s, limit} by the roofline.

    model: a folder, whose own numbers and cache count, read from its headers; or shapes, which get
    ``schemes`` (settled on them) and ``cache``. On the CPU what this project's runtime has no kernel for
    counts in 16 bits, as it is held.
    """
    device = torch.device(CPU) if hardware.name == CPU else None
    if isinstance(model, ModelFolder):
        return predicted(on_disk(model, device), hardware, point)
    return predicted(as_planned(model, schemes, cache, device=device), hardware, point)
