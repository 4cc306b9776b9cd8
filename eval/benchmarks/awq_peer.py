"""AWQ against llm-compressor in one run: seconds, peak memory, and KL on the same tokens.

    python -m eval.benchmarks.awq_peer --peer-python ENV/bin/python [--bits 4] [--out FILE.json]

Both get the same bf16 folder, the same 64 x 512 calibration tokens, 4 bits, groups of 64,
asymmetric, all linears but the head, and the same threads; each runs in a process of its own, whose
wall time and peak resident memory are taken by the parent (imports and saving included). Time is
also given in units of one bf16 forward of the calibration tokens through the original without its
head. The exported files of both are read by our reader and judged on the same evaluation windows.
``make bench-awq`` prepares the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from calibration.texts import load_texts
from calibration.tokens import calibration_blocks
from compress.compose import compose_settings
from compress.environment import environment
from compress.measure import measure_accuracy, open_windows
from compress.model.folder import ModelFolder, write_json
from compress.model.sources import open_tokenizer, resolve_model
from compress.runtime.load import load_dense

PEER = Path(__file__).parent / "peers" / "llmcompressor_awq.py"
GROUP_SIZE = 64


def timed(command: list[str]) -> dict[str, float]:
    """Run a process to its end: wall seconds and peak resident bytes of it and its children."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{command[:2]} failed with status {status}")
    return {"seconds": seconds, "peak_rss": usage.ru_maxrss * 1024}


@torch.inference_mode()
def forward_seconds(folder: ModelFolder, tokens: torch.Tensor) -> float:
    """The unit of time: one forward of the tokens through the bf16 decoder, no head, 8 rows a batch."""
    model = load_dense(folder, torch.device("cpu"), torch.bfloat16)
    model.model(tokens[:8])
    start = time.perf_counter()
    for rows in tokens.split(8):
        model.model(rows, use_cache=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", required=True, help="python with llmcompressor 0.14")
    parser.add_argument("--bits", type=int, default=4, choices=(3, 4))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()

    recipe = f"recipe=awq-int{asked.bits}"
    settings = compose_settings([recipe])
    data, evaluation = settings.data, settings.eval
    assert evaluation is not None
    folder = ModelFolder(resolve_model(settings.model.source, None))
    tokenizer = open_tokenizer(folder)
    blocks = calibration_blocks(
        load_texts(data.source, data.field, data.split),
        tokenizer,
        sequences=data.sequences,
        length=data.length,
        seed=data.seed,
    )
    windows = open_windows(evaluation, tokenizer)
    evaluation.tasks = []

    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch) / "tokens.json"
        tokens.write_text(json.dumps(blocks.tokens.tolist()))
        ours, theirs = Path(scratch) / "ours", Path(scratch) / "theirs"
        run_ours = [sys.executable, "-m", "compress", recipe, "eval=none", "speed=none"]
        run_ours += [f"scheme.group_size={GROUP_SIZE}", f"hydra.run.dir={ours}"]
        run_theirs = [asked.peer_python, str(PEER), str(folder.path), str(tokens)]
        run_theirs += [str(asked.bits), str(GROUP_SIZE), str(theirs)]
        units = [forward_seconds(folder, blocks.tokens)]
        results: dict[str, dict[str, Any]] = {"compress": timed(run_ours)}
        units.append(forward_seconds(folder, blocks.tokens))
        results["llm-compressor"] = timed(run_theirs)
        units.append(forward_seconds(folder, blocks.tokens))
        # Ours again: what else ran on the machine shows as the spread between the two.
        again = timed([*run_ours[:-1], f"hydra.run.dir={ours}-again"])
        results["compress"]["seconds_again"] = again["seconds"]
        results["compress"]["own_report"] = {
            key: json.loads((ours / "metrics.json").read_text())["compression"][key]
            for key in ("seconds", "peak_rss")
        }
        for name, path in (("compress", ours / "checkpoint"), ("llm-compressor", theirs)):
            accuracy = measure_accuracy(
                ModelFolder(path), folder, windows, evaluation, tokenizer, torch.device("cpu")
            )
            results[name]["texts"] = accuracy["candidate"]["texts"]
            results[name]["units"] = results[name]["seconds"] / (sum(units) / len(units))

    report = {
        "bits": asked.bits,
        "group_size": GROUP_SIZE,
        "calibration_sha256": blocks.sha256,
        "forward_seconds": units,
        "results": results,
        "environment": environment(torch.device("cpu")),
    }
    if asked.out:
        write_json(asked.out, report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
