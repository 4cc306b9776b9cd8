"""What differs between two runs of one recipe, as of one and two threads, or of two devices.

    python -m eval.faults.two_runs RUN OTHER [--text TEXT] [--tokens 2048]

Prints JSON: the share of codes and of scales that are not the same in the two records, the mean difference
of the changed codes in steps, and KL(RUN || OTHER) of the checkpoints on a text, read in float32, beside
KL(original || each) from their metrics.json.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch

from calibration.texts import load_texts
from calibration.tokens import evaluation_windows
from compress.export.audit import CHECKPOINT
from compress.model.folder import ModelFolder, read_json
from compress.model.sources import open_tokenizer
from compress.quantize.record import linears, read_linear
from compress.report.table import METRICS
from compress.runtime.load import load_dense
from eval.text import evaluate_text

CPU = torch.device("cpu")


def changed(one: ModelFolder, other: ModelFolder) -> dict[str, Any]:
    """Shares of what two records decided otherwise, over all linears."""
    codes = scales = differing = distant = 0
    moved = 0.0
    for name in linears(one):
        a, b = read_linear(one, name), read_linear(other, name)
        steps = (a.codes.int() - b.codes.int()).abs()
        codes += steps.numel()
        differing += int((steps > 0).sum())
        moved += float(steps.sum())
        scales += a.scale.numel()
        distant += int((a.scale != b.scale).sum())
    return {
        "codes": codes,
        "codes_changed": differing / codes,
        "steps_of_changed": moved / differing if differing else 0.0,
        "scales_changed": distant / scales,
    }


def divergence(one: ModelFolder, other: ModelFolder, text: str, tokens: int) -> dict[str, Any]:
    blocks = evaluation_windows(
        load_texts(text, "text", "train"), open_tokenizer(one), tokens=tokens, window=512
    )
    models = [load_dense(folder, CPU, torch.float32) for folder in (one, other)]
    first, second = (functools.partial(lambda m, t: m(t).logits, model) for model in models)
    found = evaluate_text(second, blocks.tokens, first)["candidate"]
    return {key: found[key] for key in ("kl", "kl_stderr", "top1", "tokens")}


def main() -> None:
    parser = argparse.ArgumentParser("two_runs", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--text", default="sotu-since-2009")
    parser.add_argument("--tokens", type=int, default=2048)
    asked = parser.parse_args()
    runs = [asked.run, asked.other]
    metrics = [read_json(run / METRICS) for run in runs]
    records = [ModelFolder(run / "quantize") for run in runs]
    checkpoints = [ModelFolder(run / CHECKPOINT) for run in runs]
    found = {
        "threads": [m["environment"]["threads"] for m in metrics],
        "device": [m["environment"]["device"] for m in metrics],
        **changed(records[0], records[1]),
        "between": divergence(checkpoints[0], checkpoints[1], asked.text, asked.tokens),
        "from_original": [
            {text: f["kl"] for text, f in m["candidate"]["texts"].items()} for m in metrics
        ],
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
