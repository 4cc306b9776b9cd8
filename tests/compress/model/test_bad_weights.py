"""Weights that are no numbers or of another shape are named, with their file, by whatever reads them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.errors import UserError
from compress.export.formats import Weights
from compress.kv_cache.scheme import CacheScheme, StateScheme
from compress.kv_cache.stage import SCALE_FILE, quantize_cache
from compress.measure.size import measure_size
from compress.model.folder import INDEX, SINGLE, ModelFolder, write_json
from compress.prune.knobs import Prune
from compress.prune.stage import prune
from compress.quantize.rounding import Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize
from compress.rotate import rotate
from compress.runtime.build import build
from compress.runtime.load import load_dense, load_packed
from tests.exported import exported

CPU = torch.device("cpu")
Read = Callable[[ModelFolder, Path, Tensor], Any]

READERS: dict[str, Read] = {
    "quantize": lambda folder, target, _: quantize(
        folder,
        target,
        tokens=None,
        schemes=Schemes(Scheme(4, 32), head=Scheme(8, 32)),
        transforms=[],
        roundings=[Nearest()],
        device=CPU,
    ),
    "rotate": lambda folder, target, _: rotate(folder, target),
    "prune": lambda folder, target, tokens: prune(
        folder, target, Prune(layers=2), tokens=tokens, device=CPU
    ),
    "kv_cache": lambda folder, target, _: quantize_cache(
        folder, target, CacheScheme(StateScheme(), StateScheme()), tokens=None, device=CPU
    ),
    "load_dense": lambda folder, *_: load_dense(folder, CPU, torch.float32),
    "engine": lambda folder, *_: build(Weights(folder), CPU),
}


def changed(folder: ModelFolder, path: Path, name: str, change: Callable[[Tensor], Any]) -> Path:
    """A copy of a folder with one tensor changed, in place or by what is returned."""
    shutil.copytree(folder.path, path)
    (file,) = (path / file.name for file in folder.weight_files)
    tensors = {n: t.clone() for n, t in load_file(file).items()}
    tensors[name] = found if (found := change(tensors[name])) is not None else tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.down_proj.weight"],
)
def test_numbers_that_are_none_are_named(
    tiny: ModelFolder, tokens: Tensor, tmp_path: Path, reader: str, name: str
) -> None:
    """In the last row, which no token of the text asks for."""

    def spoil(tensor: Tensor) -> None:
        tensor.view(-1)[-1] = torch.nan

    folder = ModelFolder(changed(tiny, tmp_path / "model", name, spoil))
    said = f"{folder.path / SINGLE}: tensor {name} holds NaN or Inf"
    with pytest.raises(UserError, match=said):
        READERS[reader](folder, tmp_path / "out", tokens)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("reader", [load_dense, load_packed, build])
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.norm.weight", "model.norm.weight"),
        ("model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.o_proj.weight_packed"),
    ],
)
def test_shapes_of_an_export_are_named(
    tiny: ModelFolder, tmp_path: Path, reader: Any, name: str, part: str
) -> None:
    """Fewer rows than the config asks for, though the file by itself is whole."""
    folder = exported(tiny, Scheme(4, 32, True), tmp_path)
    base = part.removesuffix("_packed")
    path = changed(folder, tmp_path / "odd", part, lambda t: t[:64].clone())
    if part != name:
        tensors = load_file(path / SINGLE)
        kept = {k: t[:64] for k, t in tensors.items() if k.startswith(base) and k != part}
        kept[f"{base}_shape"] = torch.tensor([64, 128])
        save_file(tensors | {k: t.clone() for k, t in kept.items()}, path / SINGLE)
    odd = ModelFolder(path)
    arguments = {
        load_dense: (odd, CPU, torch.float32),
        load_packed: (odd, CPU),
        build: (Weights(odd), CPU),
    }
    shape = r"\(64,\)" if part == name else r"\(64, 128\)"
    with pytest.raises(UserError, match=f"{path / SINGLE}: {name} has shape {shape}.*asks for"):
        reader(*arguments[reader])


def test_scales_that_are_no_numbers_are_named(tiny: ModelFolder, tmp_path: Path) -> None:
    folder = exported(tiny, Scheme(4, 32), tmp_path)
    name = "model.layers.2.mlp.up_proj"
    odd = changed(folder, tmp_path / "odd", f"{name}.weight_scale", lambda t: t.fill_(torch.inf))
    with pytest.raises(UserError, match=f"{odd / SINGLE}: tensor {name}.weight holds NaN or Inf"):
        Weights(ModelFolder(odd)).get(f"{name}.weight")


def renamed(folder: ModelFolder, path: Path, file: str) -> ModelFolder:
    """A copy of a folder whose weights are in a file of this name."""
    shutil.copytree(folder.path, path)
    (path / SINGLE).rename(path / file)
    write_json(path / INDEX, {"weight_map": dict.fromkeys(folder.names, file)})
    return ModelFolder(path)


def test_weights_are_not_overwritten_by_scales_of_the_cache(
    tiny: ModelFolder, tokens: Tensor, tmp_path: Path
) -> None:
    """The stage links the files of its source: one of that name would be written through the link."""
    folder = renamed(tiny, tmp_path / "model", SCALE_FILE)
    before = (folder.path / SCALE_FILE).read_bytes()
    state = StateScheme("float", 8, "tensor")
    with pytest.raises(UserError, match=f"{SCALE_FILE} holds weights"):
        quantize_cache(
            folder, tmp_path / "out", CacheScheme(state, state), tokens=tokens, device=CPU
        )
    assert (folder.path / SCALE_FILE).read_bytes() == before


@pytest.mark.parametrize("file", ["tokenizer.json", "LICENSE", "weights"])
def test_an_index_names_files_of_weights_alone(
    tiny: ModelFolder, tmp_path: Path, file: str
) -> None:
    """Under the name of a companion they would travel along twice."""
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=f"names '{file}', which is no file of weights"):
        _ = renamed(tiny, tmp_path / "model" / "copy", file).names


def test_weights_are_no_companions(tiny: ModelFolder, tmp_path: Path) -> None:
    folder = renamed(tiny, tmp_path / "model", "vocab-of-weights.safetensors")
    assert set(folder.names) == set(tiny.names)
    assert {f.name for f in folder.companions()} == {f.name for f in tiny.companions()}


def test_a_damaged_file_beside_the_weights_is_named(tiny: ModelFolder, tmp_path: Path) -> None:
    """A sidecar that a format may have, looked at for its size."""
    from compress.export.bitsandbytes import SIDECAR

    shutil.copytree(tiny.path, tmp_path / "model")
    (tmp_path / "model" / SIDECAR).write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=f"{SIDECAR} is not a readable safetensors file"):
        measure_size(ModelFolder(tmp_path / "model"))
