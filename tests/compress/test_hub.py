"""Names on a hub, here one on this machine: the commit they are at, what is fetched, mirror, offline."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from calibration.texts import load_texts
from compress import hub, pins, pipeline
from compress.compose import compose_settings
from compress.config import parse
from compress.disk import DiskError
from compress.errors import UserError
from compress.model.folder import INDEX, ModelFolder, read_json, write_json
from compress.model.sources import resolve_model
from tests.conftest import write_model
from tests.hub_server import HubServer, Repository, files_of

TINY = {"num_hidden_layers": 1}
TOKEN = "hf_acanarythatnofilemayhold"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("original") / "model", **TINY)


def another_process() -> None:
    """What a process remembers is gone."""
    pins._known.clear()
    hub.model_folder.cache_clear()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that this process takes for the hub, and a cache of its own."""
    with HubServer() as running:
        online(monkeypatch)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", running.url)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        another_process()
        yield running
        another_process()


def online(monkeypatch: pytest.MonkeyPatch, yes: bool = True) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not yes)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", not yes)


@pytest.fixture
def repository(server: HubServer, original: Path) -> Repository:
    """owner/tiny: one commit, with weights in other forms and other files beside the model's."""
    found = server.add("models", "owner/tiny")
    others = (
        "pytorch_model.bin",
        "model.gguf",
        "consolidated.safetensors",
        "onnx/config.json",
        "a.png",
    )
    found.commit(files_of(original) | dict.fromkeys(others, b"x"))
    return found


def run(out: Path, *words: str) -> dict[str, Any]:
    quick = ["recipe=rtn-int4", "scheme.group_size=32", "eval=none", "speed=none"]
    settings = compose_settings([*quick, "model=folder", "model.source=owner/tiny", *words])
    return pipeline.run_recipe(parse(settings), "rtn-int4", out)


def test_what_is_needed_is_fetched_once_at_one_commit(
    server: HubServer, repository: Repository, original: Path
) -> None:
    commit = repository.refs["main"]
    folder = resolve_model("owner/tiny", None)
    assert folder.name == commit
    assert sorted(server.fetched()) == sorted(file.name for file in original.iterdir())
    assert ModelFolder(folder).fingerprint == ModelFolder(original).fingerprint
    repository.commit(files_of(original), branch="main")
    server.asked.clear()
    # One process sees one commit.
    assert resolve_model("owner/tiny", None) == folder
    assert server.asked == []
    another_process()
    assert resolve_model("owner/tiny", commit) == folder
    assert server.fetched() == []
    assert resolve_model("owner/tiny", None).name == repository.refs["main"] != commit


def test_a_run_records_its_commit_and_goes_on_with_it(
    repository: Repository, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branch moves on while the run is stopped: other weights, which a new run takes."""
    commit, out = repository.refs["main"], tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "export", _stop)
        with pytest.raises(KeyboardInterrupt):
            run(out)
    assert read_json(out / "run.json")["pins"] == {"model owner/tiny": commit}
    changed = write_model(tmp_path / "changed", **TINY, rms_norm_eps=1e-4)
    repository.commit(files_of(changed))
    another_process()
    metrics = run(out)
    assert (
        metrics["pins"] == read_json(out / "metrics.json")["pins"] == {"model owner/tiny": commit}
    )
    assert "quantize" in metrics["compression"]["resumed"]
    assert metrics["model"]["fingerprint"] == ModelFolder(original).fingerprint
    assert (
        f"Original: owner/tiny at commit `{commit}`" in (out / "checkpoint/README.md").read_text()
    )
    another_process()
    anew = run(tmp_path / "anew")
    assert anew["pins"] == {"model owner/tiny": repository.refs["main"]}
    assert anew["model"]["fingerprint"] == ModelFolder(changed).fingerprint
    another_process()
    tagged = run(tmp_path / "tagged", f"model.revision={commit}")
    assert tagged["pins"] == {f"model owner/tiny@{commit}": commit}


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_sharded_weights_are_those_of_the_index(
    server: HubServer, original: Path, tmp_path: Path
) -> None:
    files = files_of(original)
    shard = "model-00001-of-00001.safetensors"
    files[shard] = files.pop("model.safetensors")
    names = ModelFolder(original).names
    files[INDEX] = json.dumps({"weight_map": dict.fromkeys(names, shard)}).encode()
    tiny = server.add("models", "owner/tiny")
    tiny.commit(files | {"consolidated.safetensors": b"x"})
    assert ModelFolder(resolve_model("owner/tiny", None)).names == names
    assert "consolidated.safetensors" not in server.fetched()
    assert shard in server.fetched()
    for named in ("../model.safetensors", "model-00002-of-00002.safetensors"):
        another_process()
        tiny.commit(files | {INDEX: json.dumps({"weight_map": {"a": named}}).encode()})
        with pytest.raises(UserError, match="which is not beside it"):
            resolve_model("owner/tiny", tiny.refs["main"])


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"pytorch_model.bin": b"x"}, r"pytorch_model.bin and no safetensors.*allow_pickle=true"),
        ({"a.gguf": b"x", "b.gguf": b"x"}, "neither model.safetensors nor"),
    ],
)
def test_a_model_that_cannot_be_read_is_not_fetched(
    server: HubServer, files: dict[str, bytes], sentence: str
) -> None:
    server.add("models", "owner/tiny").commit({"config.json": b"{}"} | files)
    with pytest.raises(UserError, match=sentence):
        resolve_model("owner/tiny", None)
    assert server.fetched() == []


def test_no_room_is_told_before_anything_is_fetched(
    server: HubServer, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.hub.free_bytes", lambda _: 1000)
    with pytest.raises(DiskError, match=r"owner/tiny has no room in .*HF_HOME"):
        resolve_model("owner/tiny", None)
    assert server.fetched() == []


@pytest.mark.parametrize(
    ("name", "revision", "sentence"),
    [
        ("owner/none", None, "model owner/none is not on http://127.0.0.1:.*HF_TOKEN"),
        ("owner/tiny", "v2", "model owner/tiny has no revision 'v2'"),
        ("owner/tiny", "../../x", "'../../x' is no revision"),
        ("owner/tiny", "/tmp/x", "'/tmp/x' is no revision"),
        ("./tiny", "main", "model.revision=main is of a name on the hub, which ./tiny is not"),
    ],
)
def test_a_mistake_is_one_sentence(
    repository: Repository, name: str, revision: str | None, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        resolve_model(name, revision)


def test_offline_the_cache_is_the_hub(
    server: HubServer,
    repository: Repository,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    commit = repository.refs["main"]
    folder = resolve_model("owner/tiny", None)
    server.asked.clear()
    another_process()
    online(monkeypatch, False)
    assert run(tmp_path / "out")["pins"] == {"model owner/tiny": commit}
    assert server.asked == []
    for name, revision in (("owner/other", None), ("owner/tiny", "v2"), ("owner/tiny", "0" * 40)):
        with pytest.raises(
            UserError, match=rf"^model {name} cannot be had from the hub: .*offline"
        ):
            resolve_model(name, revision)
    # A hub that does not answer is the same, with a warning.
    online(monkeypatch)
    server.broken = True
    another_process()
    with caplog.at_level(logging.WARNING):
        assert resolve_model("owner/tiny", None) == folder
    assert f"taken at commit {commit}, which is in the cache" in caplog.text


def test_a_dataset_is_one_commit(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, tiny: ModelFolder, tmp_path: Path
) -> None:
    texts = server.add("datasets", "owner/texts")
    rows = [b'{"text": "%s"}\n' % (b"old " * 400), b'{"text": "%s"}\n' % (b"new " * 400)]
    old = texts.commit({"train.jsonl": rows[0]})
    assert load_texts("owner/texts", "text", "train")[0].startswith("old")
    new = texts.commit({"train.jsonl": rows[1], "README.md": b"# Texts\n"})
    assert load_texts("owner/texts", "text", "train")[0].startswith("old")
    words = ["data=text", "data.source=owner/texts", "data.sequences=2", "data.length=32"]
    settings = ["recipe=gptq-int4", "scheme.group_size=32", "eval=none", "speed=none", *words]
    source = ["model=folder", f"model.source={tiny.path}"]
    composed = parse(compose_settings([*settings, *source]))
    assert pipeline._pinned(composed, None).pins == {"dataset owner/texts": old}
    another_process()
    # As it was recorded.
    write_json(tmp_path / "run.json", {"pins": {"dataset owner/texts": old}})
    pinned = pipeline._pinned(composed, tmp_path)
    recorded = pipeline._calibration(pinned, tiny)
    another_process()
    pinned = pipeline._pinned(composed, None)
    assert pinned.pins == {"dataset owner/texts": new}
    now = pipeline._calibration(pinned, tiny)
    assert recorded is not None
    assert now is not None
    assert recorded.sha256 != now.sha256
    another_process()
    assert load_texts(f"owner/texts@{old}", "text", "train")[0].startswith("old")
    another_process()
    online(monkeypatch, False)
    assert load_texts("owner/texts", "text", "train")[0].startswith("new")
    with pytest.raises(UserError, match=f"cannot be had at commit {'1' * 40}"):
        load_texts(f"owner/texts@{'1' * 40}", "text", "train")
    with pytest.raises(UserError, match="dataset owner/none cannot be had from the hub"):
        load_texts("owner/none", "text", "train")


def test_mirror_and_token_come_from_the_environment(
    server: HubServer,
    repository: Repository,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a program: the endpoint is asked, with the token, which nothing that is written or said holds."""
    repository.token = TOKEN
    wrong = TOKEN[::-1]
    monkeypatch.setenv("HF_TOKEN", wrong)
    with pytest.raises(UserError, match="needs a token that may read it") as refused:
        resolve_model("owner/tiny", None)
    assert wrong not in str(refused.value)
    quick = ["recipe=rtn-int4", "scheme.group_size=32", "eval=none", "speed=none"]
    words = [*quick, "model=owner/tiny", "hydra.run.dir=out"]
    settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "compress", *words],
        cwd=tmp_path,
        env=os.environ | settings | {"HF_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    sent = {headers.get("Authorization") for headers in server.headers}
    assert sent == {f"Bearer {wrong}", f"Bearer {TOKEN}"}
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert metrics["pins"] == {"model owner/tiny": repository.refs["main"]}
    written = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(written) > 10
    assert not [file for file in written if TOKEN.encode() in file.read_bytes()]
