"""Models and texts behind URLs, here in fsspec's memory and in a filesystem that lists what it should not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from calibration.texts import load_texts
from compress import pins, pipeline, remote
from compress.commands.plan import open_shapes
from compress.compose import compose_settings, expand_shorthand
from compress.config import parse
from compress.disk import DiskError
from compress.errors import UserError
from compress.model.folder import ModelFolder, read_json
from compress.model.sources import resolve_model
from tests.conftest import write_model

URL = "memory://bucket/models/tiny"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("original") / "model", num_hidden_layers=1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pins._known.clear()
    yield
    pins._known.clear()


@pytest.fixture
def memory(original: Path) -> Iterator[Any]:
    """The bucket: the model, with other forms of its weights and other files beside it, and a text."""
    fs = fsspec.filesystem("memory")
    for file in original.iterdir():
        fs.pipe(f"/bucket/models/tiny/{file.name}", file.read_bytes())
    for name in ("pytorch_model.bin", "model.gguf", "onnx/config.json", "a.png"):
        fs.pipe(f"/bucket/models/tiny/{name}", b"x")
    fs.pipe("/bucket/calib.jsonl", b'{"text": "one"}\n')
    yield fs
    fs.rm("/bucket", recursive=True)


def fetches(monkeypatch: pytest.MonkeyPatch, most: int | None = None) -> list[str]:
    """The files that are fetched from now on; of more than ``most`` the rest fails half-way."""
    fetched: list[str] = []
    get_file = MemoryFileSystem.get_file

    def noted(self: Any, place: str, target: str, **more: Any) -> None:
        fetched.append(place.rsplit("/", 1)[1])
        if most is not None and len(fetched) > most:
            Path(target).write_bytes(b"half")
            raise OSError("the connection was lost")
        get_file(self, place, target, **more)

    monkeypatch.setattr(MemoryFileSystem, "get_file", noted)
    return fetched


def test_a_folder_is_copied_once_and_is_then_as_any(
    memory: Any, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = fetches(monkeypatch)
    folder = resolve_model(URL, None)
    assert sorted(fetched) == sorted(file.name for file in original.iterdir())
    assert ModelFolder(folder).fingerprint == ModelFolder(original).fingerprint
    fetched.clear()
    pins._known.clear()
    assert resolve_model(URL, None) == folder
    memory.pipe("/bucket/models/tiny/config.json", (original / "config.json").read_bytes() + b" ")
    # One process sees one state.
    assert resolve_model(URL, None) == folder
    assert folder.name.startswith("tiny-")
    pins._known.clear()
    assert resolve_model(URL, None) != folder


def test_what_was_cut_off_goes_on_with_the_next_file(
    memory: Any, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        first = fetches(patched, most=2)
        with pytest.raises(UserError, match=f"{URL} cannot be had: the connection was lost"):
            resolve_model(URL, None)
    pins._known.clear()
    rest = fetches(monkeypatch)
    folder = resolve_model(URL, None)
    assert len(first) == 3
    assert sorted(first[:2] + rest) == sorted(file.name for file in original.iterdir())
    assert ModelFolder(folder).fingerprint == ModelFolder(original).fingerprint
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert not list(folder.glob("*.partial"))


def test_a_run_goes_on_with_the_copy_it_began_with(
    memory: Any, original: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quick = ["recipe=rtn-int4", "scheme.group_size=32", "eval=none", "speed=none"]
    words = expand_shorthand([*quick, f"model={URL}"])
    run, out = parse(compose_settings(words)), tmp_path / "out"
    metrics = pipeline.run_recipe(run, "x", out)
    assert metrics["model"]["name"] == "tiny"
    assert metrics["pins"].keys() == {URL}
    assert "memory://" not in (out / "checkpoint/README.md").read_text()
    memory.pipe("/bucket/models/tiny/generation_config.json", b"{}")
    pins._known.clear()
    assert pipeline._pinned(run, out).pins == metrics["pins"]
    # Without its copy there is no way back.
    pins._known.clear()
    copy = resolve_model(URL, None)
    pins._known.clear()
    for folder in copy.parent.iterdir():
        folder.rename(tmp_path / folder.name)
    with caplog.at_level(logging.WARNING):
        assert pipeline._pinned(run, out).pins != metrics["pins"]
    assert f"{URL} has changed since the run began" in caplog.text
    assert read_json(out / "metrics.json")["pins"] == metrics["pins"]


def test_texts_and_configs_are_single_files(
    memory: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert load_texts("memory://bucket/calib.jsonl", "text", "train") == ["one"]
    memory.pipe("/bucket/calib.jsonl", b'{"text": "two"}\n')
    assert load_texts("memory://bucket/calib.jsonl", "text", "train") == ["one"]
    pins._known.clear()
    assert load_texts("memory://bucket/calib.jsonl", "text", "train") == ["two"]
    fetched = fetches(monkeypatch)
    assert open_shapes(URL, None).config["num_hidden_layers"] == 1
    assert fetched == ["config.json"]
    local = tmp_path / "here.txt"
    local.write_text("three")
    assert load_texts(f"file://{local}", "text", "train") == ["three"]


def test_a_recorded_pin_is_no_path() -> None:
    pins.remember({URL: "../../../x", "model a/b": 5, "model c/d": "0" * 40})
    assert pins.known(URL) is pins.known("model a/b") is None
    assert pins.known("model c/d") == "0" * 40


def test_a_local_url_is_the_folder_itself(original: Path) -> None:
    assert resolve_model(f"file://{original}", None) == original


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("memory://bucket/none", "^memory://bucket/none does not exist"),
        ("s3://bucket/model", "^s3://bucket/model needs a package that is not here: .*s3fs"),
        ("nowhere://bucket/model", "^nowhere://bucket/model cannot be opened: .*nowhere"),
        ("sftp://me:secret@host/model", "holds a password or a query, which would be recorded"),
        ("https://host/model?signature=secret", "holds a password or a query"),
        ("zip://a::memory://bucket/model.zip", "is a chain of filesystems"),
        ("memory://bucket/..", "ends in no name of a file or folder"),
    ],
)
def test_a_url_that_is_not_read_is_one_sentence(
    memory: Any, url: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where the package is not installed.
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    for read in (lambda: resolve_model(url, None), lambda: remote.fetched_file(url)):
        with pytest.raises(UserError, match=sentence) as caught:
            read()
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "/elsewhere/config.json"},
        {"name": "/bucket/models/tiny/../config.json"},
        {"name": "/bucket/models/tiny/.."},
        {"name": "/bucket/models/tiny/a\\b"},
        {"name": "/bucket/models/tiny/a\nb"},
        {"name": "/bucket/models/tiny/config.json", "islink": True},
    ],
)
def test_what_lies_elsewhere_is_not_fetched(
    memory: Any, entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [{"type": "file", "size": 1, **entry}]
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda *_, **__: listed)
    fetched = fetches(monkeypatch)
    with pytest.raises(UserError, match=r"which does not lie in it|a link: copy the file there"):
        resolve_model(URL, None)
    assert fetched == []


def test_room_and_size_are_checked(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("compress.hub.free_bytes", lambda _: 1000)
        with pytest.raises(DiskError, match=f"{URL} has no room in .*XDG_CACHE_HOME"):
            resolve_model(URL, None)
    pins._known.clear()
    get_file = MemoryFileSystem.get_file

    def short(self: Any, place: str, target: str, **more: Any) -> None:
        get_file(self, place, target, **more)
        Path(target).write_bytes(Path(target).read_bytes()[:-1])

    monkeypatch.setattr(MemoryFileSystem, "get_file", short)
    with pytest.raises(UserError, match=r"came with \d+ bytes of \d+: start again"):
        resolve_model(URL, None)
