"""The int8 format of bitsandbytes (LLM.int8, arXiv 2208.07339), as transformers writes and loads it.

A quantized linear NAME (out, in) is stored as
    NAME.weight         int8 (out, in)      w = weight * SCB / 127
    NAME.SCB            float32 (out,)      127 * the scale of the row
    NAME.weight_format  uint8 ()            0, rows as they are
and ``quantization_config`` in config.json holds the outlier threshold; which columns stay in 16 bits is
decided while it runs, from the inputs.

Outlier columns that calibration fixed are in a file beside it, ``outliers.sidecar``, in safetensors' format,
but not under its name, by which vLLM would take it for a part of the model:
    NAME.columns        int64 (k,)          input columns that stay in 16 bits
    NAME.kept           model dtype (out, k) their weights
This file is private to this project: with it our reader runs the fixed columns; transformers does not look
at it and runs the checkpoint as any other of bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.export.shards import write_tensors
from compress.model.families import family_of
from compress.model.folder import ModelFolder, open_tensors, save_tensors, write_json
from compress.quantize import record
from compress.quantize.inputs import InputScheme
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Scheme, Schemes

NAME = "bitsandbytes"
SCB = ".SCB"
SIDECAR = "outliers.sidecar"


def write(source: ModelFolder, target: Path) -> None:
    """Write a record as a bitsandbytes folder. Raises UserError for schemes that ``check`` refuses."""
    schemes, family = record.schemes_of(source), family_of(source.config)
    check(schemes)
    inputs = schemes.linears.inputs
    assert inputs is not None
    fixed = dict[str, Tensor]()

    def stored(name: str, q: QTensor) -> Iterator[tuple[str, Tensor]]:
        if q.columns is not None and q.kept is not None:
            fixed.update({f"{name}.columns": q.columns, f"{name}.kept": q.kept.contiguous()})
        return compress_linear(q)

    config = write_tensors(source, target, stored)
    if fixed:
        save_tensors(target / SIDECAR, fixed)
    quantization = {
        "quant_method": NAME,
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": inputs.threshold,
        "llm_int8_skip_modules": [*record.kept(source), *family.head_names],
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }
    write_json(target / "config.json", {**config, "quantization_config": quantization})


def compress_linear(q: QTensor) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of one linear, by local name, but for fixed outlier columns."""
    yield "weight", (q.codes ^ 128).view(torch.int8)
    yield "SCB", 127 * q.scale.squeeze(1).float()
    yield "weight_format", torch.zeros((), dtype=torch.uint8)


def check(schemes: Schemes) -> None:
    """Raises UserError for anything but 8-bit rows with outlier columns in every linear."""
    own = schemes.linears
    fits = (own.type, own.bits, own.group_size, own.symmetric) == ("int", 8, "channel", True)
    outliers = own.inputs is not None and own.inputs.outliers != "none"
    if schemes.exceptions or not fits or not outliers:
        raise UserError(
            f"export={NAME} holds scheme=llm-int8 alone, not {schemes.name}: choose it, or "
            "export=compressed-tensors"
        )
    if schemes.head is not None:
        raise UserError(f"export={NAME} keeps the head in 16 bits: leave head out")


def linears(folder: ModelFolder) -> list[str]:
    """Names of the quantized linears, without suffix, in file order."""
    return [name.removesuffix(SCB) for name in folder.names if name.endswith(SCB)]


def scheme_of(folder: ModelFolder, name: str) -> Scheme:
    """The scheme of a linear: all have the same."""
    return Scheme(8, "channel", True, inputs=InputScheme(outliers="dynamic"))


def read_linear(folder: ModelFolder, name: str) -> QTensor:
    """The QTensor of one linear. Raises UserError if the file contradicts its config, or is in 4 bits."""
    config: dict[str, Any] = folder.config["quantization_config"]
    if not config.get("load_in_8bit"):
        raise UserError(f"{folder.path}: of bitsandbytes only load_in_8bit is read here")
    # bitsandbytes takes a threshold of 0 for none at all.
    threshold = float(config.get("llm_int8_threshold", 6.0))
    inputs = InputScheme()
    if threshold > 0:
        inputs = InputScheme(outliers="dynamic", threshold=threshold)
    stored, scb = folder.tensor(f"{name}.weight"), folder.tensor(f"{name}{SCB}")
    if stored.dtype != torch.int8 or scb.shape != stored.shape[:1]:
        raise UserError(
            f"{folder.place_of(name)}: {name} is not stored as int8 rows, which is read here"
        )
    layout = f"{name}.weight_format"
    if layout in folder and int(folder.tensor(layout)) != 0:
        raise UserError(f"{folder.path}: {layout} is not 0, the only one read here")
    # Ours are 127 times a number of the model's dtype; what others wrote need not be.
    exact = scb / 127
    rounded = exact.to(folder.dtype)
    scale = rounded if torch.equal(127 * rounded.float(), scb) else exact
    q = QTensor(stored.view(torch.uint8) ^ 128, scale.unsqueeze(1), None, 8, inputs=inputs)
    return _with_fixed(folder.path / SIDECAR, name, q) if (folder.path / SIDECAR).exists() else q


def _with_fixed(sidecar: Path, name: str, q: QTensor) -> QTensor:
    """A linear with its columns and weights in the file beside."""
    with open_tensors(sidecar) as file:
        return replace(
            q,
            inputs=InputScheme(outliers="static"),
            columns=file.get_tensor(f"{name}.columns"),
            kept=file.get_tensor(f"{name}.kept"),
        )
