"""The record: a folder that holds what compressing decided, before any serving format.

It is a Hugging Face folder (config.json, safetensors, index, tokenizer) in which a quantized linear
``NAME.weight`` is stored as ``NAME.codes`` uint8, ``NAME.scale``, and where there are such ``NAME.zero``
uint8, ``NAME.divisor``, ``NAME.input_scale``, ``NAME.columns`` and ``NAME.kept`` (see ``QTensor``).
config.json carries ``compress_record`` with the schemes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.model.families import family_of
from compress.model.folder import INDEX, ModelFolder, reading, save_tensors, write_json
from compress.model.tensor_file import TensorFile
from compress.quantize.qtensor import QTensor
from compress.quantize.scheme import Scheme, Schemes

KEY = "compress_record"
VERSION = 3
# The tensors of a quantized linear; the first two are always there.
PARTS = ("codes", "scale", "zero", "divisor", "input_scale", "columns", "kept")
# Shape and type of a tensor, and its rows in parts.
Rows = tuple[tuple[int, ...], torch.dtype, Iterable[Tensor]]


class RecordWriter:
    """Writes a record file by file, so that no more than one block is held in memory.

    weight_map: which file holds a tensor, of what was written so far
    """

    def __init__(self, path: Path, source: ModelFolder, schemes: Schemes):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        source.copy_companions(path)
        self._config: dict[str, Any] = {
            **source.config,
            KEY: {"version": VERSION, "schemes": schemes.as_config()},
        }
        self.weight_map: dict[str, str] = {}

    def add(self, file: str, tensors: dict[str, Tensor | QTensor]) -> None:
        """Write one safetensors file. Keys are full tensor names ending in ``.weight`` for QTensors."""
        flat: dict[str, Tensor] = {}
        for name, value in tensors.items():
            if isinstance(value, Tensor):
                flat[name] = value
                continue
            base = name.removesuffix(".weight")
            parts = {part: getattr(value, part) for part in PARTS}
            flat |= {f"{base}.{part}": t for part, t in parts.items() if t is not None}
        flat = {name: tensor.cpu().contiguous() for name, tensor in flat.items()}
        save_tensors(self.path / file, flat)
        self.weight_map |= dict.fromkeys(flat, file)

    def add_rows(self, file: str, tensors: Mapping[str, Rows]) -> None:
        """Write one safetensors file of plain tensors, of which no more than a few rows are in memory."""
        written = TensorFile(self.path / file)
        for name, (shape, dtype, parts) in tensors.items():
            written.add_rows(name, shape, dtype, parts)
        written.close()
        self.weight_map |= dict.fromkeys(tensors, file)

    def close(self) -> None:
        """Write index and config: before that the folder does not open."""
        write_json(self.path / INDEX, {"metadata": {}, "weight_map": self.weight_map})
        write_json(self.path / "config.json", self._config)


def rewrite(source: ModelFolder, target: Path, changed: dict[str, Tensor]) -> None:
    """Write the record ``source`` to ``target`` with other tensors in place of some, file by file.

    changed: by full name, as it is stored (``NAME.codes``, ``NAME.scale``)
    """
    writer = RecordWriter(target, source, schemes_of(source))
    unused = set(changed) - set(source.names)
    assert not unused, unused
    for file in source.weight_files:
        names = [name for name in source.names if source.file_of(name) == file]
        writer.add(file.name, {n: changed.get(n, source.tensor(n)) for n in names})
    writer.close()


def linears(record: ModelFolder) -> list[str]:
    """Names of the quantized linears of a record, without suffix, in file order."""
    return [n.removesuffix(".codes") for n in record.names if n.endswith(".codes")]


def kept(record: ModelFolder) -> list[str]:
    """Names of the matrices of decoder blocks that keep 16 bits (routers, gates of shared experts), without
    suffix, in file order: readers that take every linear of a block for quantized must be told of them."""
    blocks, quantized = f"{family_of(record.config).blocks}.", set(linears(record))
    weights = [n for n in record.names if n.startswith(blocks) and n.endswith(".weight")]
    return [
        base
        for name in weights
        if (base := name.removesuffix(".weight")) not in quantized and len(record.shape(name)) == 2
    ]


def contents(
    folder: ModelFolder, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor | QTensor]]:
    """Everything a record holds under its original names, in file order; a plain folder: only tensors.

    names: these alone, in their order
    """
    quantized = set(linears(folder)) if KEY in folder.config else set()
    for name in _original_names(folder, quantized) if names is None else names:
        base, _, part = name.rpartition(".")
        whole = base in quantized and part == "weight"
        yield name, read_linear(folder, base) if whole else folder.tensor(name)


def _original_names(folder: ModelFolder, quantized: set[str]) -> Iterator[str]:
    for name in folder.names:
        base, _, part = name.rpartition(".")
        if base not in quantized or part == "bias":
            yield name
        elif part == "codes":
            yield f"{base}.weight"


def read_linear(record: ModelFolder, name: str) -> QTensor:
    """The QTensor of one linear of a record."""
    scheme = scheme_of(record, name)
    found = {part: record.tensor(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in record}
    codes, scale, zero = found.pop("codes"), found.pop("scale"), found.pop("zero", None)
    return QTensor(
        codes,
        scale,
        zero,
        scheme.bits,
        **found,
        type=scheme.type,
        block=scheme.block(codes.shape),
        inputs=scheme.inputs,
    )


def schemes_of(record: ModelFolder) -> Schemes:
    """The schemes of a record. Raises UserError if another version of this tool wrote it, or none."""
    found = record.config[KEY]
    with reading(f"{record.path}/config.json: {KEY}"):
        if found.get("version") != VERSION:
            raise UserError(
                f"{record.path} is a record of version {found.get('version')}, this one reads {VERSION}: "
                "compress the model again"
            )
        return Schemes.from_config(found["schemes"])


def scheme_of(record: ModelFolder, name: str) -> Scheme:
    """The scheme of one quantized linear, embedding or head of a record."""
    schemes = schemes_of(record)
    family = family_of(record.config)
    if name in (family.embedding, family.head):
        assert schemes.head is not None, name
        return schemes.head
    return schemes.of(name)
