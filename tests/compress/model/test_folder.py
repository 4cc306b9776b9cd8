"""Opening folders: lazily, and with one clear sentence for what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from compress.errors import UserError
from compress.model.families import family_of
from compress.model.folder import INDEX, ModelFolder, reading, save_tensors


@pytest.fixture
def copy(tiny: ModelFolder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.path, tmp_path / "copy"))


def test_reads_shapes_bytes_and_tensors(tiny: ModelFolder) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    assert tiny.shape(name) == (256, 128)
    assert tiny.nbytes(name) == 256 * 128 * 2
    assert tiny.tensor(name).dtype == torch.bfloat16 == tiny.dtype
    assert tiny.tied_head


def test_missing_things_are_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        ModelFolder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no tensor nothing"):
        ModelFolder(copy).tensor("nothing")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds neither"):
        _ = ModelFolder(copy).names
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        ModelFolder(copy)


def test_broken_weights_are_named(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model.safetensors is not a readable safetensors file"):
        _ = ModelFolder(copy).names


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../outside.safetensors"}, "points outside"),
        ({"a": "/etc/passwd"}, "points outside"),
        ({"a": "missing.safetensors"}, "names missing.safetensors, which is missing"),
        ("text", "has no weight_map"),
    ],
)
def test_bad_indexes_are_refused(copy: Path, weight_map: object, message: str) -> None:
    (copy / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
        _ = ModelFolder(copy).names


def test_fingerprint_changes_with_the_weights(copy: Path, tiny: ModelFolder) -> None:
    assert ModelFolder(copy).fingerprint == tiny.fingerprint
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert ModelFolder(copy).fingerprint != tiny.fingerprint


def test_unknown_family_is_refused_with_the_known() -> None:
    with pytest.raises(
        UserError, match="'mamba' is not known here: known are llama, mistral, qwen2"
    ):
        family_of({"model_type": "mamba"})


def test_what_is_read_names_where_it_stands() -> None:
    """A file may say what a recipe may not: the sentence of the recipe alone would not tell which file."""
    with (
        pytest.raises(
            UserError, match=r"^a/config.json: its record: scheme.bits=99 is not allowed$"
        ),
        reading("a/config.json: its record"),
    ):
        raise UserError("scheme.bits=99 is not allowed")
    with (
        pytest.raises(UserError, match=r"^a/config.json has no bits$"),
        reading("a/config.json: its record"),
    ):
        raise UserError("a/config.json has no bits")
    with (
        pytest.raises(UserError, match=r"^a does not fit together: KeyError: 'bits'$"),
        reading(Path("a")),
    ):
        _ = {}["bits"]


def test_rows_come_a_few_at_a_time(tmp_path: Path, tiny: ModelFolder) -> None:
    """Of a matrix, a vector and a single number."""
    tensors = {"matrix": torch.randn(7, 3), "vector": torch.arange(5), "number": torch.tensor(2.5)}
    save_tensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_bytes((tiny.path / "config.json").read_bytes())
    folder = ModelFolder(tmp_path)
    parts = {name: list(folder.rows(name, 4)) for name in tensors}
    assert [len(part) for part in parts["matrix"]] == [4, 3]
    assert [len(part) for part in parts["vector"]] == [4, 1]
    assert torch.equal(torch.cat(parts["matrix"]), tensors["matrix"])
    assert torch.equal(torch.cat(parts["vector"]), tensors["vector"])
    assert torch.equal(parts["number"][0], tensors["number"])
    with pytest.raises(UserError, match="holds no tensor nothing"):
        next(folder.rows("nothing", 4))
