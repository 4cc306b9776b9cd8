"""This project and its peers on the same machine, model, tokens and evaluation, in one table.

    python -m eval.benchmarks.peers_table --peer-python ENV/bin/python --keep FOLDER
        [--bits 4 3 2 8] [--only NAME ...] [--out FILE.json] [--rounds N]

Everybody gets the same bf16 folder, the same 64 x 512 calibration tokens (addresses of 1960 to 2004),
groups of 64, asymmetric, all linears but the head; ``best-*`` adds text that the model writes itself, and
its time counts. At 8 bits it is rows instead of groups, symmetric, with and without rounded inputs. Each
runs in a process of its own, whose wall and processor time and peak resident memory are taken (imports and
saving included). Time is also given in units of one bf16 forward of the calibration tokens through the
original without its head, timed before and after. The written files of all are read by our reader and
judged on the same windows of two texts, one of the calibration's kind and one outside it. ``--keep`` holds
what each wrote and its measurements: what is there already is not run again, so a long comparison can go
on; a row that was cut off starts anew.
``make bench-peers`` prepares the environment. With --rounds the rows are not judged but timed alone, N
times in turn, and the ratios to the first of them are taken round by round: leave the machine to it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from calibration.texts import load_mix
from calibration.tokens import TokenBlocks, calibration_blocks
from compress.compose import compose_settings
from compress.config import RecipeConfig
from compress.environment import environment
from compress.measure.accuracy import measure_accuracy, open_windows
from compress.measure.size import measure_size
from compress.model.folder import ModelFolder, read_json, write_json
from compress.model.sources import open_tokenizer, resolve_model
from compress.report.table import with_error
from compress.runtime.load import load_dense

PEERS = Path(__file__).parent / "peers"
GROUP_SIZE = 64
# auto-round at the steps and batch that stay within half an hour on 2 cores; ours at equal steps.
STEPS, PEER_BATCH = 50, 4
MEASUREMENT = "measurement.json"


def ours(bits: int) -> dict[str, list[str]]:
    """Our candidates: name -> command-line words."""
    if bits == 8:
        return {
            "w8a16": ["recipe=w8a16-int8"],
            "w8a8": ["recipe=w8a8-int8", "transforms=[]"],
            "smooth w8a8": ["recipe=w8a8-int8"],
            "fp8": ["recipe=fp8"],
        }
    scheme = [f"scheme.bits={bits}", f"scheme.group_size={GROUP_SIZE}"]
    return {
        f"rtn int{bits}": ["recipe=rtn-int4", *scheme],
        f"awq int{bits}": ["recipe=awq-int4", *scheme],
        f"gptq int{bits}": ["recipe=gptq-int4", *scheme],
        f"gptaq int{bits}": ["recipe=gptaq-int4", *scheme],
        f"learned int{bits}": ["recipe=learned-int4", *scheme, f"rounding.learned.iters={STEPS}"],
        f"best int{bits}": [f"recipe=best-int{bits}", f"scheme.group_size={GROUP_SIZE}"],
    }


def peers(bits: int, python: str, model: Path, tokens: Path, out: Path) -> dict[str, list[str]]:
    """The peers: name -> command."""
    common = [str(model), str(tokens), str(bits), str(GROUP_SIZE)]
    llmc, autoround = str(PEERS / "run_llmcompressor.py"), str(PEERS / "run_autoround.py")
    if bits == 8:
        methods = ("w8a16", "w8a8", "smooth-w8a8", "smooth-gptq-w8a8", "fp8")
        return {
            f"llm-compressor {method.replace('-', ' ')}": [python, llmc, method, *common, str(out)]
            for method in methods
        }
    return {
        f"llm-compressor awq int{bits}": [python, llmc, "awq", *common, str(out)],
        f"llm-compressor gptq int{bits}": [python, llmc, "gptq", *common, str(out)],
        f"llm-compressor gptq imatrix int{bits}": [python, llmc, "gptq-imatrix", *common, str(out)],
        f"auto-round int{bits}": [
            python,
            autoround,
            *common,
            str(STEPS),
            str(PEER_BATCH),
            str(out),
        ],
    }


# Runs a command and prints its wall and processor seconds and peak resident kB. A process starts with
# its parent's peak: this one, which holds a model at times, must not be the parent.
LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
with open(sys.argv[1], "w") as log:
    status = subprocess.run(sys.argv[2:], stdout=log, stderr=subprocess.STDOUT).returncode
seconds, usage = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([status, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
"""


def timed(command: list[str], log: Path) -> dict[str, float]:
    """Run a process to its end: wall and processor seconds and peak resident bytes, its children
    included. Raises RuntimeError if it fails."""
    launched = subprocess.run(
        [sys.executable, "-c", LAUNCHER, str(log), *command],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    status, seconds, processor, peak = json.loads(launched.stdout)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed with status {status}: see {log}")
    return {"seconds": seconds, "cpu_seconds": processor, "peak_rss": peak * 1024}


@torch.inference_mode()
def forward_seconds(folder: ModelFolder, tokens: torch.Tensor) -> float:
    """The unit of time: one forward of the tokens through the bf16 decoder, no head, 8 rows a batch."""
    model = load_dense(folder, torch.device("cpu"), torch.bfloat16)
    model.model(tokens[:8])
    start = time.perf_counter()
    for rows in tokens.split(8):
        model.model(rows, use_cache=False)
    return time.perf_counter() - start


def written_folder(path: Path) -> Path:
    """Where the weights are: auto-round puts a folder of its own name below."""
    return next(path.rglob("config.json")).parent


def peer_versions(python: str) -> dict[str, str]:
    """Versions of the peers and of what they stand on."""
    names = ("llmcompressor", "auto-round", "compressed-tensors", "torch", "transformers")
    program = (
        "import json, sys; from importlib.metadata import version; "
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    command = [python, "-c", program, *names]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(found.stdout))


def run_all(
    commands: Mapping[str, list[str]],
    keep: Path,
    folder: ModelFolder,
    blocks: TokenBlocks,
    versions: Mapping[str, str],
) -> None:
    """Run what has not been run. A measurement is written when its process has ended well."""
    for name, command in commands.items():
        place = keep / name.replace(" ", "-")
        if (place / MEASUREMENT).exists():
            if read_json(place / MEASUREMENT)["calibration_sha256"] != blocks.sha256:
                raise RuntimeError(f"{place} was measured with other calibration tokens")
            continue
        if place.exists():
            shutil.rmtree(place)
        place.mkdir(parents=True)
        print(name, flush=True)
        before = forward_seconds(folder, blocks.tokens)
        found = timed(command, place / "log.txt")
        units = [before, forward_seconds(folder, blocks.tokens)]
        measured = {
            **found,
            "unit_seconds": sum(units) / 2,
            "units": units,
            "threads": torch.get_num_threads(),
            "calibration_sha256": blocks.sha256,
            "versions": dict(versions),
            "environment": environment(torch.device("cpu")),
        }
        write_json(place / MEASUREMENT, measured)


def time_rounds(
    commands: Mapping[str, list[str]],
    keep: Path,
    rounds: int,
    facts: Mapping[str, Any],
    out: Path | None,
) -> None:
    """Time every command once a round. Prints the medians and the spread of the ratios to the first row.

    What the commands write below ``keep`` is deleted. facts: what else goes into the file ``out``
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            place = keep / name.replace(" ", "-")
            # What a cut-off run left.
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            found[name].append(timed(command, place / "log.txt"))
            print(name, found[name][-1], flush=True)
            shutil.rmtree(place)
    first = next(iter(found.values()))
    for name, measured in found.items():
        ratios = [m["seconds"] / f["seconds"] for m, f in zip(measured, first, strict=True)]
        print(
            f"{name}: {statistics.median(m['seconds'] for m in measured):.0f} s, "
            f"{statistics.median(ratios):.2f} times the first ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"peak {max(m['peak_rss'] for m in measured) / 1e9:.2f} GB"
        )
    if out:
        write_json(out, {**facts, "environment": environment(torch.device("cpu")), "rounds": found})


def judge(
    name: str, keep: Path, folder: ModelFolder, settings: RecipeConfig, tokenizer: Any
) -> dict[str, Any]:
    """The measurement of a candidate with the accuracy of its files, which is kept too."""
    place = keep / name.replace(" ", "-")
    measured = read_json(place / MEASUREMENT)
    candidate = place / "run" / "checkpoint"
    if not candidate.exists():
        candidate = written_folder(place / "out")
    written = ModelFolder(candidate)
    if "quantization_config" in written.config:
        measured["size"] = measure_size(written)
    if "texts" not in measured:
        assert settings.eval is not None
        windows = open_windows(settings.eval, tokenizer)
        accuracy = measure_accuracy(
            written, folder, windows, settings.eval, tokenizer, torch.device("cpu")
        )
        measured["texts"] = accuracy.rows["candidate"]["texts"]
    write_json(place / MEASUREMENT, measured)
    return measured


def as_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row a candidate."""
    texts = list(next(iter(results.values()))["texts"])
    columns = (
        [f"KL {t}" for t in texts]
        + [f"perplexity {t}" for t in texts]
        + [f"top-1 {t}" for t in texts]
    )
    lines = [
        f"| | bits/weight | {' | '.join(columns)} | seconds | CPU seconds | units | peak GB |",
        "|---" * (len(columns) + 6) + "|",
    ]
    for name, r in results.items():
        # auto-round's files hold the dequantized weights: its codes, scales and zero points take as much.
        cells = [f"{r['size']['bits_linears']:.2f}" if "size" in r else "as above"]
        cells += [
            with_error(r["texts"][t]["kl"], r["texts"][t]["kl_stderr"], "{:.4f}") for t in texts
        ]
        cells += [f"{r['texts'][t]['perplexity']:.2f}" for t in texts]
        cells += [f"{100 * r['texts'][t]['top1']:.1f}%" for t in texts]
        cells += [f"{r['seconds']:.0f}", f"{r['cpu_seconds']:.0f}"]
        cells += [f"{r['seconds'] / r['unit_seconds']:.1f}", f"{r['peak_rss'] / 1e9:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", required=True, help="python with llmcompressor 0.14")
    parser.add_argument("--keep", type=Path, required=True, help="where outputs and measures stay")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], choices=(2, 3, 4, 8))
    parser.add_argument("--only", nargs="+", help="names of the table's rows")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, help="only time the rows, so many times in turn")
    asked = parser.parse_args()
    if asked.rounds is not None:
        if asked.rounds < 1:
            parser.error("--rounds must be 1 or more")
        # Apart from the rows that are kept.
        asked.keep /= "rounds"

    settings = compose_settings(["recipe=rtn-int4", "data=sotu", "eval.tasks=[]"])
    data = settings.data
    folder = ModelFolder(resolve_model(settings.model.source, None))
    tokenizer = open_tokenizer(folder)
    blocks = calibration_blocks(
        load_mix(data.source, data.field, data.split),
        tokenizer,
        sequences=data.sequences,
        length=data.length,
        seed=data.seed,
    )
    asked.keep.mkdir(parents=True, exist_ok=True)
    tokens = asked.keep / "tokens.json"
    tokens.write_text(json.dumps(blocks.tokens.tolist()))

    commands: dict[str, list[str]] = {}
    for bits in asked.bits:
        for name, words in ours(bits).items():
            run = asked.keep / name.replace(" ", "-") / "run"
            fixed = ["data=sotu", "eval=none", "speed=none"]
            command = [sys.executable, "-m", "compress", *words, *fixed, f"hydra.run.dir={run}"]
            commands[name] = command
        for name in peers(bits, "", folder.path, tokens, Path()):
            out = asked.keep / name.replace(" ", "-") / "out"
            commands[name] = peers(bits, asked.peer_python, folder.path, tokens, out)[name]
    if asked.only:
        if unknown := set(asked.only) - set(commands):
            parser.error(f"{sorted(unknown)[0]} is none of: {', '.join(commands)}")
        commands = {name: commands[name] for name in commands if name in asked.only}
    if asked.rounds:
        versions = peer_versions(asked.peer_python)
        facts = {"calibration_sha256": blocks.sha256, "versions": versions}
        time_rounds(commands, asked.keep, asked.rounds, facts, asked.out)
        return
    run_all(commands, asked.keep, folder, blocks, peer_versions(asked.peer_python))
    results = {name: judge(name, asked.keep, folder, settings, tokenizer) for name in commands}
    if asked.out:
        shown = {"calibration_sha256": blocks.sha256, "group_size": GROUP_SIZE, "results": results}
        write_json(asked.out, shown)
    print(as_table(results))


if __name__ == "__main__":
    main()
