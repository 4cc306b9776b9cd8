"""After an export: read the written files again and prove that they hold what was decided.

``audit`` compares with the record, bit for bit, and runs once at the end of the export.
``manifest`` notes the SHA-256 of every file; ``verify`` checks a folder against its manifest, any
time later.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.export import gguf
from compress.export.formats import FORMATS, Weights
from compress.kv_cache.folder import is_scale, scheme_of, stated_scheme
from compress.model.families import family_of, linears_among
from compress.model.folder import ModelFolder, file_sha256, read_json, reading, write_json
from compress.quantize.qtensor import QTensor
from compress.quantize.record import PARTS, schemes_of
from compress.quantize.record import scheme_of as scheme_of_linear

MANIFEST = "manifest.json"
# Of a run: the folder of its first format.
CHECKPOINT = "checkpoint"


class AuditError(RuntimeError):
    """The written files do not hold what was decided: a bug or a broken disk, not a user's mistake."""


def audit(record: ModelFolder, exported: ModelFolder, quantized: bool = True) -> dict[str, int]:
    """Compare an export with its record. Returns how many linears and other tensors were checked.

    quantized: it holds the codes; if not, the weights that they stand for, in the type of the model.
    Raises AuditError if a linear that should be quantized is not, a tensor differs in any bit, is
    missing or is too many, or a quantized linear takes more bytes than its scheme says.
    """
    decided, written = Weights(record), Weights(exported)
    if sorted(decided.names) != sorted(written.names):
        different = sorted(set(decided.names) ^ set(written.names))
        raise AuditError(f"{exported.path}: tensors differ from the record: {different[:3]}")
    unquantized = unquantized_linears(written)
    embedding = family_of(record.config).embedding
    if decided.format == "plain" or not quantized:
        unquantized = []
    elif schemes_of(record).head is not None and embedding not in written.linears:
        unquantized.append(f"{embedding}.weight")
    if unquantized:
        raise AuditError(f"{exported.path}: {unquantized[0]} should be quantized and is not")
    for name in decided.names:
        wanted, found = decided.get(name), written.get(name)
        if not quantized and isinstance(wanted, QTensor):
            wanted = wanted.dequantize(record.dtype)
        _same(name, gguf.held(exported, name, wanted), found)
        if isinstance(found, QTensor):
            linear = name.removesuffix(".weight")
            fixed = FORMATS[written.format].nbytes
            scheme = scheme_of_linear(record, linear)
            _size(exported, linear, found, None if fixed is None else fixed(found, scheme))
    _same_cache(record, exported)
    return {
        "linears": len(decided.linears),
        "other_tensors": len(decided.names) - len(decided.linears),
    }


def _same_cache(record: ModelFolder, exported: ModelFolder) -> None:
    scheme = scheme_of(record)
    if scheme_of(exported) != scheme:
        raise AuditError(f"{exported.path}: the scheme of the cache differs from the record")
    # What engines read, which is not our own file.
    stated = (exported.config.get("quantization_config") or {}).get("kv_cache_scheme")
    if stated != stated_scheme(scheme):
        raise AuditError(f"{exported.path}: its kv_cache_scheme is not that of the record")
    names = [[name for name in folder.names if is_scale(name)] for folder in (record, exported)]
    if sorted(names[0]) != sorted(names[1]):
        raise AuditError(f"{exported.path}: scales of the cache differ from the record")
    for name in names[0]:
        _same(name, record.tensor(name), exported.tensor(name))


def unquantized_linears(weights: Weights) -> list[str]:
    """Linears of the decoder blocks that a folder holds in 16 bits, and one of embedding and head if the
    other is quantized."""
    family = family_of(weights.folder.config)
    expected = [f"{name}.weight" for name in linears_among(weights.names, family)]
    heads = (family.embedding, family.head)
    if any(name in weights.linears for name in heads):
        expected += [f"{name}.weight" for name in heads if f"{name}.weight" in weights.names]
    return [name for name in expected if name.removesuffix(".weight") not in weights.linears]


def _same(name: str, decided: Tensor | QTensor, written: Tensor | QTensor) -> None:
    if isinstance(decided, QTensor) and isinstance(written, QTensor):
        parts = [(_part(decided, part), _part(written, part)) for part in PARTS]
        numbers = [
            (q.bits, q.type, q.block, q.inputs and q.inputs.running) for q in (decided, written)
        ]
        same = numbers[0] == numbers[1] and all(_equal(a, b) for a, b in parts)
    else:
        same = type(decided) is type(written) and _equal(decided, written)
    if not same:
        raise AuditError(f"{name} reads back different from what was decided")


def _part(q: QTensor, part: str) -> Tensor | None:
    """A tensor of it. No zero points are those in the middle: AWQ cannot tell one from the other."""
    found: Tensor | None = getattr(q, part)
    if part == "zero" and found is None:
        return torch.full_like(q.scale, 2 ** (q.bits - 1), dtype=torch.uint8)
    return found


def _equal(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    # Bit patterns, so that NaN equals itself and -0 differs from 0.
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    first, second = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(first, second)


def _size(exported: ModelFolder, linear: str, q: QTensor, fixed: int | None) -> None:
    """A linear may take its bits, padded to whole 32-bit words a row, its scales (bitsandbytes has them in
    32 bits), zero points (GPTQ and AWQ have those of symmetric weights too), in GPTQ the group of each
    column, and a shape or a few numbers of its own; or what its format says; nothing more."""
    rows, columns = q.shape
    groups = q.scale.shape[1]
    outliers = q.inputs is not None and q.inputs.outliers != "none"
    scales = 4 * rows if outliers else q.scale.nbytes
    allowed = 4 * rows * -(-columns * q.bits // 32) + scales + 16
    if q.zero is not None or f"{linear}.qzeros" in exported:
        allowed += 4 * groups * -(-rows * q.bits // 32)
    if f"{linear}.g_idx" in exported:
        allowed += 4 * columns
    if fixed is not None:
        allowed = fixed
    stored = sum(
        exported.nbytes(name)
        for name in exported.names
        if name.rpartition(".")[0] == linear and not name.endswith(".bias")
    )
    if stored > allowed:
        raise AuditError(f"{linear} takes {stored} bytes, its scheme says {allowed}")


def write_manifest(folder: Path, origin: dict[str, Any]) -> None:
    """Write manifest.json: ``origin`` (what the checkpoint was made from) and a hash for every file."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(folder.iterdir())
        if file.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"origin": origin, "files": files})


def add_text(folder: Path, name: str, text: str) -> None:
    """Write a text file into an exported folder, or replace it, and note it in the manifest.

    Both are written beside the folder and renamed into it, the file first: a process that is killed leaves
    each as it was or as it is to be, and between the two ``verify`` tells.
    """
    described = read_json(folder / MANIFEST)
    content = text.encode()
    described["files"][name] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    described["files"] = dict(sorted(described["files"].items()))
    for target in (name, MANIFEST):
        partial = folder.with_name(f"{folder.name}-{target}.{os.getpid()}.partial")
        if target == MANIFEST:
            write_json(partial, described)
        else:
            partial.write_bytes(content)
        partial.replace(folder / target)


def verify(path: Path) -> list[str]:
    """What is wrong with an exported folder, one sentence each; empty if nothing is.

    Checks every file against the manifest, then that each tensor reads back and, if the folder says it is
    quantized, that no linear is left out.
    Raises UserError if there is no manifest.
    """
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    if not (path / MANIFEST).exists() and (path / CHECKPOINT / MANIFEST).exists():
        raise UserError(f"{path} is a run's folder: verify {path / CHECKPOINT}")
    files = read_json(path / MANIFEST).get("files", {})
    with reading(path / MANIFEST):
        expected = {
            name: (described["bytes"], described["sha256"]) for name, described in files.items()
        }
    present = {file.name for file in path.iterdir()} - {MANIFEST}
    problems = [f"{name} is missing" for name in sorted(set(files) - present)]
    problems += [f"{name} is not in the manifest" for name in sorted(present - set(files))]
    for name in sorted(present & set(files)):
        if not os.path.isfile(path / name):
            problems.append(f"{name} is not a file")
            continue
        size, (nbytes, sha256) = (path / name).stat().st_size, expected[name]
        if size != nbytes:
            problems.append(f"{name} has {size} bytes, the manifest says {nbytes}")
        elif file_sha256(path / name) != sha256:
            problems.append(f"{name} has changed: its SHA-256 differs from the manifest")
    if problems:
        return problems
    weights = Weights(ModelFolder(path))
    # A plain folder is what it says; one with a cache alone says quantized and has no such linears.
    if weights.linears or (weights.format != "plain" and scheme_of(weights.folder) is None):
        problems += [f"{name} is not quantized" for name in unquantized_linears(weights)]
    for name in weights.names:
        weights.get(name)
    return problems
