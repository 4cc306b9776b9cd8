"""Serving engines answer with the exported checkpoints: what they compute, and how fast.

    python -m eval.engines.serve_check --vllm ENV --llama-cpp ENV [--only NAME ...] [--engines NAME ...]
        [--runs FOLDER] [--no-load] [--checkpoint FOLDER ...]

Compresses the demo model by the recipes of CASES, each a run with its accuracy measured, in several formats.
Then each format is asked for the log-probabilities of the same prompts by every engine here that loads it by
the engine matrix: transformers in this process, ``vllm serve`` (its CPU build) and llama.cpp's server on
loopback; ``agreement`` says what has to come out. Then the servers are put under load in turns, the
original's among them. Both go into the section ``served`` of the run's metrics.json, its served.md and its
cards, and all of it beside the runs. Runs that are there already are not made again.

With --checkpoint only these folders are asked, and nothing is written. ``make serve-check`` prepares the
environments.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from calibration.texts import load_texts
from calibration.tokens import evaluation_windows
from compress.compose import compose_settings
from compress.engines import CT, DENSE, GGUF, LLAMA_CPP, TRANSFORMERS, VLLM_CPU
from compress.environment import environment, version_of
from compress.export.formats import FORMATS
from compress.kv_cache.folder import scheme_of
from compress.model.folder import ModelFolder, read_json, write_json
from compress.model.sources import open_tokenizer, resolve_model
from compress.plan.rows import loadable_folder, served_folder
from compress.report.served import served_sections
from compress.report.table import METRICS, find_runs, rows_of
from compress.run_folder import whole
from compress.runtime.load import load_dense
from compress.serve.card import write_cards
from compress.serve.command import Command, serve_command
from compress.serve.loads import checkpoints, gguf_of
from eval.engines.agreement import BF16, CPU, Ours, clip, compare, log_probs, read_ours
from eval.engines.load import Client, Load, in_turns
from eval.engines.servers import NAME, Server, free_port, running

PROMPTS, LENGTH, NEW_TOKENS = 4, 64, 16
# Tokens of a request, and requests at a time, of a server.
CONTEXT, PARALLEL = 1024, 16
# Servers that are up at the same time, the original's among them: as many as memory holds of vLLM's CPU
# build, with room for this process.
TOGETHER, SERVER_BYTES = 5, 4e9
# The load of many requests, and that of a server which takes a second a token.
MANY = Load(PARALLEL, 200, 32, 32)
ROUNDS = 2
SLOW = Load(1, 1, 8, 8)
SERVED = "served.md"
ORIGINAL = "original"
ENGINES_HERE = (TRANSFORMERS, VLLM_CPU, LLAMA_CPP)
# Formats that transformers reads through gptqmodel, which brings a torch for CUDA.
NEED_GPTQMODEL = ("gptq", "awq")
# With two threads it spins for a core that the client has: a fifth of the speed.
LLAMA_THREADS = 1
# Of vLLM: it would give up 8-bit floats after five minutes; a cache of 1 GiB holds all that is asked.
SURROUNDINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3600",
}
Entry = dict[str, Any]
CONCURRENCY = (1, 4, 16)
# What the lengths of speed=patterns are multiplied by.
SCALE = 0.125


@dataclass(frozen=True)
class Case:
    """words: the recipe; slow: an engine has kernels that take a second a token, so its load is one request
    load: formats whose servers are put under load; others of the same weights go through the same kernels"""

    words: tuple[str, ...]
    slow: bool = False
    load: tuple[str, ...] = (CT, DENSE)


CASES = {
    "awq-int4": Case(("recipe=awq-int4", "export=[compressed-tensors,awq,gguf]"), load=(CT, GGUF)),
    "gptq-int4 symmetric": Case(
        ("recipe=gptq-int4", "scheme.symmetric=true", "export=[compressed-tensors,gptq,gguf]"),
        load=(CT, GGUF),
    ),
    "w8a8-int8": Case(("recipe=w8a8-int8",)),
    "kv-fp8": Case(("recipe=kv-fp8", "context=none")),
    "awq-int4-kv-fp8": Case(("recipe=awq-int4-kv-fp8", "context=none")),
    "prune-width": Case(
        ("recipe=prune-width", "prune.candidates=1", "export=[compressed-tensors,gguf]")
    ),
    # Calibrated on less it strays so far from the original that engines differ by more than the limit.
    "prune-kv-heads": Case(("recipe=prune-kv-heads", "data.length=1024"), load=()),
    "fp8": Case(("recipe=fp8",), slow=True),
    "w8a16-int8": Case(("recipe=w8a16-int8", "export=[compressed-tensors,gguf,dense]"), load=()),
    "fp8-static": Case(("recipe=fp8-static",)),
    "nvfp4": Case(("recipe=nvfp4",)),
    "mxfp4": Case(("recipe=mxfp4", "export=[compressed-tensors,gguf]")),
    "llm-int8": Case(("recipe=llm-int8",)),
}


@dataclass(frozen=True)
class Asked:
    """A checkpoint and an engine that loads it. run: where its figures go, None: it is the original, or
    nowhere"""

    name: str
    export: str
    engine: str
    folder: Path
    run: Path | None
    slow: bool = False
    load: bool = True

    @property
    def label(self) -> str:
        return f"{self.name} ({self.export}) in {self.engine}"

    @property
    def original(self) -> bool:
        return self.name == ORIGINAL


class Check:
    """What all of it needs: environments of the engines, the original, and its answers."""

    def __init__(self, vllm: Path, llama_cpp: Path, scratch: Path):
        self.vllm, self.llama_cpp, self.scratch = vllm, llama_cpp, scratch
        self.base = ModelFolder(resolve_model(compose_settings([]).model.source, None))
        texts = load_texts("sotu-since-2009", "text", "train")
        self.tokens = evaluation_windows(
            texts, open_tokenizer(self.base), tokens=PROMPTS * LENGTH, window=LENGTH
        ).tokens
        self.answers = log_probs(load_dense(self.base, CPU, BF16), self.tokens)
        self.vocabulary = int(self.base.config["vocab_size"])

    def ours(self, asked: Asked) -> Ours:
        return read_ours(asked.folder, self.tokens, self.answers)

    def version(self, engine: str) -> str:
        """Of an engine as it is installed."""
        if engine == TRANSFORMERS:
            return str(version_of(engine))
        python, package = (
            (self.vllm, "vllm") if engine == VLLM_CPU else (self.llama_cpp, "xllamacpp")
        )
        code = f"import importlib.metadata as m; print(m.version({package!r}))"
        command = [str(python / "bin" / "python"), "-c", code]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def conditions(self, engine: str) -> str:
        """What its figures depend on beside the machine."""
        if engine == TRANSFORMERS:
            return f"{torch.get_num_threads()} threads"
        if engine == VLLM_CPU:
            return f"--enforce-eager, at most {PARALLEL} requests at a time"
        python = str(self.llama_cpp / "bin" / "python")
        code = "import xllamacpp; print(xllamacpp.get_system_info())"
        told = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
        built = [part.strip() for part in told.stdout.split("|") if part.strip().endswith("= 1")]
        with_ = ", ".join(part.removesuffix("= 1").strip().rpartition(" ")[2] for part in built)
        return f"{LLAMA_THREADS} thread, {PARALLEL} slots, the wheel's build ({with_})"

    @contextlib.contextmanager
    def served(self, engine: str, folder: Path, log: str) -> Iterator[Server]:
        port = free_port()
        command = self._command(engine, folder, port)
        with running(
            engine,
            command.words,
            {**command.environment, **SURROUNDINGS},
            port=port,
            log=self.scratch / f"{log}.log",
            vocabulary=self.vocabulary,
        ) as server:
            yield server

    def _command(self, engine: str, folder: Path, port: int) -> Command:
        """What ``compress serve`` would run, and what this machine needs beside."""
        if engine == VLLM_CPU:
            program, context = self.vllm / "bin" / "vllm", CONTEXT
            extra = ["--enforce-eager", "--max-num-seqs", str(PARALLEL)]
        else:
            program, context = self.llama_cpp / "bin" / "python", CONTEXT * PARALLEL
            extra = ["-np", str(PARALLEL), "-t", str(LLAMA_THREADS)]
        return serve_command(
            engine,
            folder,
            port=port,
            name=NAME,
            context=context,
            program=str(program),
            extra=extra,
        )

    def ask(self, asked: Asked, server: Server) -> dict[str, Any]:
        """What ``agreement.compare`` finds, and what the engine writes."""
        tokens, ours = self.tokens, self.ours(asked)

        def clipped() -> Tensor:
            with tempfile.TemporaryDirectory() as place:
                copy = clip(asked.folder, Path(place) / "clipped")
                with self.served(asked.engine, copy, "clipped") as other:
                    return other.log_probs(tokens)

        cache = scheme_of(ModelFolder(asked.folder))
        stored = cache is not None and cache.static
        found = compare(
            ours,
            server.log_probs(tokens),
            clipped if stored else None,
            rounds=asked.engine == LLAMA_CPP,
        )
        return {**found, "writes": server.greedy(tokens[0].tolist(), NEW_TOKENS)}

    def ask_transformers(self, asked: Asked) -> dict[str, Any]:
        """What a plain from_pretrained call computes, without our code."""
        tokens = self.tokens

        @functools.cache
        def answer(folder: Path) -> tuple[Tensor, Tensor]:
            gguf = gguf_of(folder)
            file = {} if gguf is None else {"gguf_file": gguf.name}
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16, **file)
            mask = torch.ones_like(tokens)
            written = model.generate(
                tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False
            )
            return log_probs(model, tokens), written[0, tokens.shape[1] :]

        def clipped() -> Tensor:
            with tempfile.TemporaryDirectory() as place:
                return answer(clip(asked.folder, Path(place) / "clipped"))[0]

        theirs, written = answer(asked.folder)
        # Where the checkpoint asks it to unpack the weights while loading, it keeps a 16-bit cache.
        stated = ModelFolder(asked.folder).config.get("quantization_config") or {}
        keeps = not stated.get("dequantize")
        found = compare(self.ours(asked), theirs, clipped if keeps else None)
        return {**found, "writes": open_tokenizer(self.base).decode(written)}


def loads_of(group: Sequence[Asked]) -> list[Load]:
    """The four patterns at several concurrencies, and in vLLM many requests; of slow ones a single one."""
    if not all(one.load for one in group):
        return []
    if any(one.slow for one in group):
        return [SLOW]
    speed = compose_settings(["speed=patterns"]).speed
    assert speed is not None
    sizes = [(round(SCALE * size[0]), round(SCALE * size[1])) for size in speed.patterns]
    short = [Load(at, max(at, 2), *size, rounds=ROUNDS) for size in sizes for at in CONCURRENCY]
    return short if group[0].engine == LLAMA_CPP else [*short, MANY]


def export_demo(directory: Path, words: Sequence[str]) -> None:
    fixed = ["data=sotu", "data.sequences=8", "speed=none"]
    fixed += ["eval.tasks=[]", "eval.block_tokens=null", "eval.generated=0"]
    command = [sys.executable, "-m", "compress", *words, *fixed, f"hydra.run.dir={directory}"]
    subprocess.run(command, check=True)


def demo(check: Check, runs: Path, names: Sequence[str]) -> list[Asked]:
    """The runs of these cases, made if they are not there, and who is asked for what of them."""
    found: list[Asked] = []
    for name in names:
        run, case = runs / name.replace(" ", "-"), CASES[name]
        if not (run / METRICS).exists():
            export_demo(run, case.words)
        for folder in checkpoints(run):
            found += asked_of(name, folder, run, case)
    gguf = runs / ORIGINAL / "gguf"
    if not gguf.exists():
        with whole(gguf) as partial:
            FORMATS["gguf"].write(check.base, partial)
    originals = [*asked_of(ORIGINAL, check.base.path), *asked_of(ORIGINAL, gguf)]
    return [*(one for one in originals if one.engine != TRANSFORMERS), *found]


def asked_of(
    name: str, folder: Path, run: Path | None = None, case: Case | None = None
) -> list[Asked]:
    """Every engine that can be run here and loads the folder, by the engine matrix."""
    export, case = served_folder(ModelFolder(folder)).export, case or Case(())
    found = loadable_folder(ModelFolder(folder))
    load = run is None or export in case.load
    return [
        Asked(name, export, engine, folder, run, case.slow and engine == VLLM_CPU, load)
        for engine in ENGINES_HERE
        if found[engine]["loads"] and not (engine == TRANSFORMERS and export in NEED_GPTQMODEL)
    ]


def together(nbytes: float) -> int:
    """How many servers so much memory holds: the original and a candidate at least."""
    return min(TOGETHER, max(2, int(nbytes // SERVER_BYTES)))


def groups(asked: Sequence[Asked]) -> Iterator[list[Asked]]:
    """Who is served at the same time: of one engine, the original first, as many as fit into memory; alone
    those that are slow, or not put under load."""
    most = together(psutil.virtual_memory().available)
    for engine in (VLLM_CPU, LLAMA_CPP):
        own = [one for one in asked if one.engine == engine]
        originals = [one for one in own if one.original]
        others = [one for one in own if one.load and not (one.original or one.slow)]
        room = most - len(originals)
        for start in range(0, len(others), room):
            yield [*originals, *others[start : start + room]]
        yield from ([one] for one in own if one.slow or not one.load)


def serve(check: Check, client: Client | None, group: Sequence[Asked]) -> list[Entry]:
    """Start a server for each, ask it, then put them under load in turns. An entry for each."""
    entries = [entry_of(check, one) for one in group]
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for one, entry in zip(group, entries, strict=True):
            try:
                server = stack.enter_context(
                    check.served(one.engine, one.folder, f"server{len(servers)}")
                )
                entry["agreement"] = check.ask(one, server)
                servers[one.label] = server
            except RuntimeError as error:
                entry["agreement"] = _failed(error)
            _tell(one, entry)
        loads = loads_of(group)
        if client is None or not servers or not loads:
            return entries
        # What is known so far, if a server ends under the load.
        keep(group, entries)
        points = in_turns(client, servers, check.base.path, loads)
        beside = next((points[one.label] for one in group if one.original), None)
        for one, entry in zip(group, entries, strict=True):
            entry["client"] = f"vllm bench serve {client.version}"
            entry["points"] = points.get(one.label, [])
            for point, base in zip(entry["points"], beside or (), strict=beside is not None):
                point["over_original"] = over(point, base)
    return entries


def over(point: Mapping[str, Any], base: Mapping[str, Any]) -> float | None:
    """Tokens a second over those of the original, the median of the rounds; None if it lost all of one."""
    pairs = zip(point["rounds"]["tokens_per_s"], base["rounds"]["tokens_per_s"], strict=True)
    ratios = [ours / theirs for ours, theirs in pairs if theirs]
    return statistics.median(ratios) if len(ratios) == len(base["rounds"]["tokens_per_s"]) else None


def entry_of(check: Check, asked: Asked) -> Entry:
    facts, given = environment(CPU), served_folder(ModelFolder(asked.folder))
    return {
        "engine": asked.engine,
        "version": check.version(asked.engine),
        "conditions": check.conditions(asked.engine),
        "export": asked.export,
        # In the words of the engine matrix.
        "format": given.format,
        "kinds": given.kinds,
        "device": facts["device"],
        "date": facts["date"],
        "agreement": {},
        "points": [],
    }


def _failed(error: Exception) -> dict[str, Any]:
    return {"agrees": False, "error": str(error).strip().splitlines()[-1][:200]}


def _tell(asked: Asked, entry: Entry) -> None:
    found = entry["agreement"]
    print(f"{'ok  ' if found['agrees'] else 'FAIL'} {asked.label}: {json.dumps(found)}", flush=True)


def keep(asked: Sequence[Asked], entries: Sequence[Entry]) -> None:
    """Put the entries of a group into metrics.json and served.md of their runs, the original's beside; points
    that an entry has none of stay."""
    of_original = [e for one, e in zip(asked, entries, strict=True) if one.original]
    for one, entry in zip(asked, entries, strict=True):
        if one.run is None:
            continue
        metrics = read_json(one.run / METRICS)
        for row, new in (("candidate", [entry]), ("base", of_original)):
            found = metrics[row].setdefault("served", {})
            for e in new:
                key = f"{e['engine']}/{e['export']}"
                kept = found.get(key, {}) if not e["points"] else {}
                found[key] = e | {k: kept[k] for k in ("points", "client") if k in kept}
        with whole(one.run / METRICS) as partial:
            write_json(partial, metrics)
        for section in served_sections([metrics]):
            (one.run / SERVED).write_text(section.text, encoding="utf-8")


def tell_all(runs: Sequence[Path], base: ModelFolder, place: Path) -> None:
    """Print what the runs were found to be, and leave it in ``place``: served.md, served.json; and in their
    cards."""
    found = find_runs(runs)
    for metrics in found:
        write_cards(metrics, base, Path(metrics["folder"]))
    text = "".join(section.text for section in served_sections(found))
    print(f"\n{text}", flush=True)
    (place / SERVED).write_text(text, encoding="utf-8")
    served = {row.label: row.values["served"] for row in rows_of(found) if row.values.get("served")}
    write_json(place / SERVED.replace(".md", ".json"), {**environment(CPU), "served": served})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", type=Path, required=True, help="its environment")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="that of xllamacpp")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--engines", nargs="+", choices=ENGINES_HERE, default=list(ENGINES_HERE))
    parser.add_argument("--runs", type=Path, default=Path("outputs/serve-check"))
    parser.add_argument("--no-load", action="store_true")
    parser.add_argument("--checkpoint", type=Path, nargs="*", default=[])
    asked = parser.parse_args()
    passed = []
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        check = Check(asked.vllm, asked.llama_cpp, Path(scratch))
        if asked.checkpoint:
            wanted = [one for folder in asked.checkpoint for one in asked_of(folder.name, folder)]
        else:
            wanted = demo(check, asked.runs, asked.only)
        wanted = [one for one in wanted if one.engine in asked.engines]
        client = None
        if not (asked.no_load or asked.checkpoint):
            python = str(asked.vllm / "bin" / "python")
            client = stack.enter_context(Client(python, Path(scratch) / "client.log"))
        for one in wanted:
            if one.engine == TRANSFORMERS:
                entry = entry_of(check, one)
                try:
                    entry["agreement"] = check.ask_transformers(one)
                except Exception as error:
                    # Whatever it raises: it did not load what it should.
                    entry["agreement"] = _failed(error)
                _tell(one, entry)
                passed.append(entry["agreement"]["agrees"])
                keep([one], [entry])
        for group in groups(wanted):
            entries = serve(check, client, group)
            passed += [entry["agreement"]["agrees"] for entry in entries]
            passed += [point["lost"] == 0 for entry in entries for point in entry["points"]]
            keep(group, entries)
    if not asked.checkpoint:
        tell_all([one.run for one in wanted if one.run is not None], check.base, asked.runs)
    print(f"{sum(passed)} of {len(passed)} checks passed", flush=True)
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
