"""What an evaluation takes: the pass over a text beside bare forward passes of both models, and the whole.

    python -m eval.benchmarks.evaluation_speed ORIGINAL FOLDER [--whole] [--out FILE]

In turns, window by window: both models called for their logits and nothing else; the pass that compares them.
What counts is the median ratio. --whole: then the evaluation as `compress evaluate` does it, of 20,480 tokens
and two tasks of 200 questions, nothing of the original's taken from the cache.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from compress.compose import compose_settings
from compress.config import device_of
from compress.environment import environment
from compress.measure.accuracy import measure_accuracy, open_windows
from compress.model.folder import ModelFolder, write_json
from compress.model.sources import open_tokenizer
from compress.runtime.load import load_dense
from eval.text import read_text

ROUNDS = 11
WHOLE = ["eval.tokens=10240", "eval.limit=200"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("original", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    original, folder = ModelFolder(asked.original), ModelFolder(asked.folder)
    found: dict[str, Any] = {"pass": _pass(original, folder)}
    print(
        "KL pass over bare forwards of both: {ratio:.3f} ({ratio_low:.3f} to {ratio_high:.3f})".format(
            **found["pass"]
        )
    )
    if asked.whole:
        found["whole"] = _whole(original, folder)
        print(f"whole evaluation: {found['whole']['seconds']:.0f} s")
    if asked.out:
        settings = compose_settings(["recipe=rtn-int4"])
        write_json(asked.out, {"environment": environment(device_of(settings)), **found})


@torch.no_grad()
def _pass(original: ModelFolder, folder: ModelFolder) -> dict[str, Any]:
    settings = compose_settings(["recipe=rtn-int4"])
    assert settings.eval is not None
    device = device_of(settings)
    windows = open_windows(settings.eval, open_tokenizer(original))
    rows = list(itertools.chain(*(blocks.tokens.to(device) for blocks in windows.values())))
    models = {
        "base": load_dense(original, device, torch.float32),
        "candidate": load_dense(folder, device, torch.float32),
    }
    readers = {name: lambda t, m=model: m(t).logits for name, model in models.items()}
    bare, compared = [], []
    for i in range(ROUNDS + 1):
        row = rows[i % len(rows)]
        start = time.perf_counter()
        for reader in readers.values():
            float(reader(row.unsqueeze(0))[0, -1, 0])
        middle = time.perf_counter()
        read_text(readers, [row], "base")
        end = time.perf_counter()
        bare.append(middle - start)
        compared.append(end - middle)
    # The first round warms up.
    ratios = [c / b for b, c in zip(bare[1:], compared[1:], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "window": settings.eval.window,
        "rounds": ROUNDS,
        "bare_s": statistics.median(bare[1:]),
        "pass_s": statistics.median(compared[1:]),
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
    }


def _whole(original: ModelFolder, folder: ModelFolder) -> dict[str, Any]:
    settings = compose_settings(["recipe=rtn-int4", *WHOLE])
    assert settings.eval is not None
    tokenizer = open_tokenizer(original)
    windows = open_windows(settings.eval, tokenizer)
    with tempfile.TemporaryDirectory() as empty:
        os.environ["XDG_CACHE_HOME"] = empty
        start = time.perf_counter()
        measure_accuracy(folder, original, windows, settings.eval, tokenizer, device_of(settings))
        took = time.perf_counter() - start
    tokens = sum(blocks.tokens.numel() for blocks in windows.values())
    return {
        "seconds": took,
        "tokens": tokens,
        "tasks": settings.eval.tasks,
        "limit": settings.eval.limit,
        "generated": settings.eval.generated,
    }


if __name__ == "__main__":
    main()
