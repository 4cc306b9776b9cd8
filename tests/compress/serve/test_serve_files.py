"""What is written beside a checkpoint: a Triton repository, a Dockerfile and its compose.yaml."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.commands import serve as verb
from compress.engines import ENGINES
from compress.errors import UserError
from compress.model.folder import ModelFolder
from compress.quantize.scheme import Scheme
from compress.serve import command
from compress.serve.command import flags, serve_command
from compress.serve.docker import IMAGES
from tests.exported import exported


@pytest.fixture(scope="module")
def int4(tiny: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tiny, Scheme(4, 32), tmp_path_factory.mktemp("run")).path


def parse_pbtxt(text: str) -> dict[str, Any]:
    """Protobuf's text format, as far as a model's config uses it: fields, messages, lists of messages."""
    tokens = re.findall(r'"[^"]*"|[\w-]+|[{}\[\]:,]', re.sub(r"#.*", "", text))

    def message(i: int) -> tuple[dict[str, Any], int]:
        found: dict[str, Any] = {}
        while i < len(tokens) and tokens[i] != "}":
            key, i = tokens[i], i + 1
            assert key.isidentifier()
            assert key not in found
            colon = tokens[i] == ":"
            i += colon
            if tokens[i] == "{":
                found[key], i = message(i + 1)
                assert tokens[i] == "}"
                i += 1
            elif tokens[i] == "[":
                found[key], i = [], i + 1
                while tokens[i] != "]":
                    assert tokens[i] == "{"
                    inner, i = message(i + 1)
                    assert tokens[i] == "}"
                    found[key].append(inner)
                    i += 1 + (tokens[i + 1] == ",")
                i += 1
            else:
                assert colon, f"{key} has a value without a colon"
                found[key], i = tokens[i].strip('"'), i + 1
        return found, i

    found, end = message(0)
    assert end == len(tokens), f"what is left: {tokens[end:]}"
    return found


def test_triton_is_told_what_vllm_is_told(
    int4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "repository"
    verb.main([str(int4), f"triton={target}", "name=mine", "context=64", "tp=2", "port=7"])
    assert {str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()} == {
        "mine/config.pbtxt",
        "mine/1/model.json",
    }
    config = parse_pbtxt((target / "mine" / "config.pbtxt").read_text())
    assert config == {
        "name": "mine",
        "backend": "vllm",
        "max_batch_size": "0",
        "model_transaction_policy": {"decoupled": "True"},
        "instance_group": [{"count": "1", "kind": "KIND_MODEL"}],
    }
    arguments = json.loads((target / "mine" / "1" / "model.json").read_text())
    assert Path(arguments.pop("model")) == int4.resolve()
    assert 0 < arguments.pop("gpu_memory_utilization") < 1
    assert arguments == {"max_model_len": 64, "tensor_parallel_size": 2}
    words = serve_command("vllm", int4, name="mine", context=64, tp=2).words
    assert list(words)[-4:] == flags("vllm", arguments)
    line = capsys.readouterr().out.splitlines()[-1]
    for part in ("-p 127.0.0.1:7:8000", f"-v {target}:/models:ro", f"-v {int4}:{int4}:ro"):
        assert part in line


def test_docker_runs_the_same_command(
    int4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for engine in ("vllm", "vllm-cpu", "sglang"):
        target = tmp_path / engine
        verb.main(
            [str(int4), f"engine={engine}", f"docker={target}", "name=Mine", "port=7", "tp=2"]
        )
        lines = (target / "Dockerfile").read_text().splitlines()
        image, program = IMAGES[engine]
        assert f"FROM {image}" in lines
        (entry,) = [line.removeprefix("ENTRYPOINT ") for line in lines if "ENTRYPOINT" in line]
        outside = serve_command(engine, int4, host="0.0.0.0", name="Mine", tp=2, program=program)
        expected = ["/models/Mine" if word == str(int4) else word for word in outside.words]
        assert json.loads(entry) == expected
        assert {line for line in lines if line.startswith("ENV ")} == {
            f"ENV {key}={value}" for key, value in outside.environment.items()
        }
        assert any("http://127.0.0.1:8000/health" in line for line in lines)
        (service,) = yaml.safe_load((target / "compose.yaml").read_text())["services"].values()
        assert service["ports"] == ["127.0.0.1:7:8000"]
        (volume,) = service["volumes"]
        assert volume == {
            "type": "bind",
            "source": str(int4.resolve()),
            "target": "/models/Mine",
            "read_only": True,
        }
        assert ("deploy" in service) == (engine != "vllm-cpu")
        if "deploy" in service:
            (device,) = service["deploy"]["resources"]["reservations"]["devices"]
            assert (device["count"], device["capabilities"]) == (2, ["gpu"])
    assert f"--project-directory {tmp_path}/sglang" in capsys.readouterr().out


@pytest.mark.parametrize("engine", IMAGES)
def test_images_are_of_the_versions_that_were_read(engine: str) -> None:
    tag = IMAGES[engine][0].rpartition(":")[2]
    if engine == "llama.cpp":
        # Its rows are about a wheel; the flags are those of this build.
        assert f"llama.cpp {tag.removeprefix('server-')}" in " ".join(str(command.__doc__).split())
    else:
        assert f"{tag}.".startswith(f"v{ENGINES[engine].version}.")


def test_a_gguf_file_is_found_in_the_container(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-gguf"
    folder.mkdir()
    (folder / "m.gguf").write_bytes(b"GGUF")
    verb.main([str(folder), "docker=true", "name=m"])
    text = (tmp_path / "checkpoint-gguf-docker" / "Dockerfile").read_text()
    assert '"/app/llama-server", "-m", "/models/m/m.gguf", "-a", "m"' in text
    assert str(tmp_path) not in text


def test_a_relative_folder_is_served_as_any(
    int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").symlink_to(int4)
    gguf = tmp_path / "g"
    gguf.mkdir()
    (gguf / "g.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    for name in ("m", "g"):
        verb.main([name, "docker=true"])
        (entry,) = re.findall("ENTRYPOINT (.*)", Path(f"{name}-docker/Dockerfile").read_text())
        named = {"m": "--served-model-name", "g": "-a"}[name]
        words = json.loads(entry)
        assert words[words.index(named) + 1] == name
        assert {"m": "/models/m", "g": "/models/g/g.gguf"}[name] in words
        (service,) = yaml.safe_load(Path(f"{name}-docker/compose.yaml").read_text())[
            "services"
        ].values()
        assert service["volumes"][0]["source"] == str(Path(name).resolve())


def test_a_name_stays_in_the_repository(int4: Path, tmp_path: Path) -> None:
    verb.main([str(int4), f"triton={tmp_path}/in/repository", "name=.."])
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.relative_to(tmp_path / "in/repository").parts[0] for file in files} == {"model"}


def test_a_dollar_of_a_path_is_none_of_compose(int4: Path, tmp_path: Path) -> None:
    folder = tmp_path / "b$USER"
    folder.mkdir()
    for file in int4.iterdir():
        (folder / file.name).symlink_to(file)
    verb.main([str(folder), f"docker={tmp_path}/new"])
    (service,) = yaml.safe_load((tmp_path / "new/compose.yaml").read_text())["services"].values()
    assert service["volumes"][0]["source"] == f"{tmp_path}/b$$USER"


def test_nothing_is_overwritten(int4: Path, tmp_path: Path) -> None:
    for kind in ("triton", "docker"):
        target = tmp_path / kind
        target.mkdir()
        (target / "mine").write_text("x")
        with pytest.raises(UserError, match=f"{target} exists already"):
            verb.main([str(int4), f"{kind}={target}"])
        assert [file.name for file in target.iterdir()] == ["mine"]
        with pytest.raises(UserError, match="cannot be written"):
            verb.main([str(int4), f"{kind}={target}/mine/deeper"])
    assert {path.name for path in tmp_path.iterdir()} == {"triton", "docker"}


def test_what_no_image_runs_is_refused(int4: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image of transformers: choose engine=vllm"):
        verb.main([str(int4), "engine=transformers", f"docker={tmp_path}/new"])
    assert not (tmp_path / "new").exists()
