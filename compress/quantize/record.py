"""The record: a folder that holds what compressing decided, before any serving format.

It is a Hugging Face folder (config.json, safetensors, index, tokenizer) in which a quantized linear
``NAME.weight`` is stored as ``NAME.codes`` uint8, ``NAME.scale``, and ``NAME.zero`` uint8 unless
symmetric. config.json carries ``compress_record`` with the scheme.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from compress.model.folder import INDEX, ModelFolder, save_tensors, write_json
from compress.quantize.qtensor import QTensor

KEY = "compress_record"


class RecordWriter:
    """Writes a record file by file, so that no more than one block is held in memory."""

    def __init__(self, path: Path, source: ModelFolder, scheme: dict[str, Any]):
        self.path = path
        path.mkdir(parents=True)
        source.copy_companions(path)
        self._config = {**source.config, KEY: {"version": 1, "scheme": scheme}}
        self._weight_map: dict[str, str] = {}

    def add(self, file: str, tensors: dict[str, Tensor | QTensor]) -> None:
        """Write one safetensors file. Keys are full tensor names ending in ``.weight`` for QTensors."""
        flat: dict[str, Tensor] = {}
        for name, value in tensors.items():
            if isinstance(value, Tensor):
                flat[name] = value
                continue
            base = name.removesuffix(".weight")
            flat |= {f"{base}.codes": value.codes, f"{base}.scale": value.scale}
            if value.zero is not None:
                flat[f"{base}.zero"] = value.zero
        flat = {name: tensor.cpu().contiguous() for name, tensor in flat.items()}
        save_tensors(self.path / file, flat)
        self._weight_map |= dict.fromkeys(flat, file)

    def close(self) -> None:
        """Write index and config: before that the folder does not open."""
        write_json(self.path / INDEX, {"metadata": {}, "weight_map": self._weight_map})
        write_json(self.path / "config.json", self._config)


def linears(record: ModelFolder) -> list[str]:
    """Names of the quantized linears of a record, without suffix, in file order."""
    return [n.removesuffix(".codes") for n in record.names if n.endswith(".codes")]


def read_linear(record: ModelFolder, name: str) -> QTensor:
    """The QTensor of one linear of a record."""
    zero = record.tensor(f"{name}.zero") if f"{name}.zero" in record else None
    bits = int(record.config[KEY]["scheme"]["bits"])
    return QTensor(record.tensor(f"{name}.codes"), record.tensor(f"{name}.scale"), zero, bits)
