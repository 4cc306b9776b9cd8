"""Does a serving engine compute what was exported? vLLM's CPU build and transformers against our reader.

    python -m eval.engines.serve_check --vllm-python ENV/bin/python [--only NAME ...]
        [--checkpoint FOLDER ...]

Without a checkpoint, the demo model is compressed by the recipes of CASES first. For each: log-probabilities
of the same prompt tokens, and greedy text. ``make serve-check`` prepares vLLM.

Where inputs stay in 16 bits, an engine passes if its mean log-probability is within TOLERANCE of ours and
much nearer to ours than to the original's (so an engine that dropped the quantization would fail). Where
inputs are rounded, that cannot be asked: the last bit of a bf16 input decides which of two 8-bit values
it takes, a whole step, so that two engines that round at other places differ as much as either does from
the original. There an engine passes if it is about as far from the original as we are, and not as near as
we would be with the inputs left alone, where that makes a clear difference: with 8-bit floats, whose
weights cost most of it, it does not, and passing says no more than that the weights are read right. That
linears compute the same number by number is a test (tests/compress/export/test_eight_bits.py).

A cache in 8-bit floats is rounded in the same sense, and engines convert to E4M3 in different ways. There the
same checkpoint read with a 16-bit cache is what counts: an engine passes if it strays from that between half
and twice as far as we do, is much nearer to it than to the original where weights are quantized too, and
moves much further once the stored scales are divided by CLIP (so one that computes scales of its own, or
keeps the cache in 16 bits, fails). transformers does keep 16 bits where the checkpoint asks it to unpack
the weights while loading; it is then compared with our reader doing so.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from calibration.texts import load_texts
from calibration.tokens import evaluation_windows
from compress.compose import compose_settings
from compress.export.formats import Weights
from compress.kv_cache.folder import SCALES, scheme_of
from compress.model.folder import ModelFolder
from compress.model.sources import open_tokenizer, resolve_model
from compress.quantize.qtensor import QTensor
from compress.runtime.cached import load_served
from compress.runtime.load import load_dense

CLIENT = Path(__file__).parent / "vllm_client.py"
PROMPTS, LENGTH, NEW_TOKENS = 4, 64, 16
# Nats per token, mean of |difference|: engines round in bf16 at other places than we do.
TOLERANCE = 0.1
# The distance to our own log-probabilities must be below this share of the distance to the
# original's.
NEARER = 0.5
# With rounded inputs: how far the distances of ours and theirs to the original may be apart.
ALIKE = 0.25
# With a cache in 8-bit floats: how far our and their distances to the 16-bit cache may be apart, what the
# stored scales are divided by (most keys and values are clipped then), and how many times their distance to
# the 16-bit cache an answer must move then.
CACHE_ALIKE = 2.0
CLIP = 16.0
CLIPPED = 2.0
BF16, CPU = torch.bfloat16, torch.device("cpu")
# A checkpoint and tokens (prompts, length) -> log-probabilities (prompts, length - 1), greedy answers.
Ask = Callable[[Path, Tensor], tuple[Tensor, list[list[int]]]]


@dataclass(frozen=True)
class Case:
    """words: the recipe; vllm: whether its CPU build has kernels for it"""

    words: tuple[str, ...]
    vllm: bool = True


CASES = {
    "awq-int4": Case(("recipe=awq-int4",)),
    "awq-int4 symmetric": Case(("recipe=awq-int4", "scheme.symmetric=true")),
    "w8a8-int8": Case(("recipe=w8a8-int8",)),
    "fp8": Case(("recipe=fp8",)),
    "w8a16-int8": Case(("recipe=w8a16-int8",), vllm=False),
    "fp8-static": Case(("recipe=fp8-static",), vllm=False),
    "nvfp4": Case(("recipe=nvfp4",), vllm=False),
    "mxfp4": Case(("recipe=mxfp4",), vllm=False),
    "llm-int8": Case(("recipe=llm-int8",), vllm=False),
    "prune-width": Case(("recipe=prune-width", "prune.candidates=1")),
    "prune-depth": Case(("recipe=prune-depth",)),
    "prune-heads": Case(("recipe=prune-heads",)),
    "prune-kv-heads": Case(("recipe=prune-kv-heads", "data.length=1024")),
    "kv-fp8": Case(("recipe=kv-fp8", "context=none")),
    "awq-int4-kv-fp8": Case(("recipe=awq-int4-kv-fp8", "context=none")),
    "awq-int4-kv-fp8 symmetric": Case(
        ("recipe=awq-int4-kv-fp8", "scheme.symmetric=true", "context=none"), vllm=False
    ),
}


@torch.inference_mode()
def log_probs(model: Any, tokens: Tensor) -> Tensor:
    """Log-probability of every token but the first, (prompts, length - 1)."""
    found = model(tokens).logits[:, :-1].float().log_softmax(-1)
    return found.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)


def ask_transformers(folder: Path, tokens: Tensor) -> tuple[Tensor, list[list[int]]]:
    """What a plain from_pretrained call computes, without our code."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16)
    answer = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    return log_probs(model, tokens), answer[:, tokens.shape[1] :].tolist()


def ask_vllm(python: str, folder: Path, tokens: Tensor) -> tuple[Tensor, list[list[int]]]:
    """What vLLM computes, in its own environment."""
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # 8-bit floats take minutes for these prompts; it would give up after five.
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3600",
        # The default on CPUs with VNNI rounds activations to 8 bits for asymmetric int4 weights; the
        # question here is whether the weights are read right.
        "VLLM_CPU_INT4_W4A8": "0",
    }
    with tempfile.TemporaryDirectory() as scratch:
        prompts, output = Path(scratch) / "prompts.json", Path(scratch) / "output.json"
        prompts.write_text(json.dumps(tokens.tolist()))
        command = [python, str(CLIENT), str(folder), str(prompts), str(output)]
        subprocess.run(command, check=True, env={**os.environ, **settings})
        answers = json.loads(output.read_text())["answers"]
    return torch.tensor([a["logprobs"] for a in answers]), [a["tokens"] for a in answers]


def check(folder: Path, original: Tensor, tokens: Tensor, vllm_python: str | None) -> bool:
    """Print how far each engine is from our reader; True if all pass. Without a python no vLLM."""
    exported = ModelFolder(folder)
    tokenizer, weights = open_tokenizer(exported), Weights(exported)
    rounded = False
    if weights.linears:
        q = weights.get(f"{next(iter(weights.linears))}.weight")
        rounded = isinstance(q, QTensor) and q.inputs is not None
    model = load_served(exported, CPU, BF16)
    ours = log_probs(model, tokens)
    loss = _apart(ours, original)
    for linear in model.modules():
        linear._forward_pre_hooks.clear()
    alone = _apart(log_probs(model, tokens), original)
    del model
    cached = scheme_of(exported) is not None
    wide = log_probs(load_dense(exported, CPU, BF16), tokens) if cached else ours
    unpacked = bool((exported.config.get("quantization_config") or {}).get("dequantize"))
    passed = True
    engines: dict[str, Ask] = {"transformers": ask_transformers}
    if vllm_python is not None:
        engines["vllm"] = functools.partial(ask_vllm, vllm_python)
    for name, ask in engines.items():
        theirs, answers = ask(folder, tokens)
        keeps = cached and not (unpacked and name == "transformers")
        distance, to_original = _apart(theirs, ours if keeps else wide), _apart(theirs, original)
        note = f"with inputs left alone {alone:.4f}"
        if keeps:
            good, note = _check_cache(exported, ask, tokens, ours=ours, theirs=theirs, wide=wide)
            good &= not weights.linears or _apart(theirs, wide) < NEARER * to_original
        elif rounded:
            nearer = abs(to_original - loss) < abs(to_original - alone)
            telling = abs(alone / loss - 1) > ALIKE
            good = abs(to_original / loss - 1) < ALIKE and (nearer or not telling)
        else:
            good = distance < TOLERANCE and distance < NEARER * to_original
        passed &= good
        reader = "our reader with a 16-bit cache" if cached and not keeps else "our reader"
        print(
            f"{'ok  ' if good else 'FAIL'} {name}: |difference| of log-probabilities {distance:.4f} to "
            f"{reader}, {to_original:.4f} to the original (ours {loss:.4f}, {note}); says "
            f"{tokenizer.decode(answers[0])!r}",
            flush=True,
        )
    return passed


def _check_cache(
    exported: ModelFolder, ask: Ask, tokens: Tensor, *, ours: Tensor, theirs: Tensor, wide: Tensor
) -> tuple[bool, str]:
    """Whether an engine keeps the cache as the checkpoint says, and the figures that tell. wide: ours with
    the cache in 16 bits"""
    loss, their_loss = _apart(ours, wide), _apart(theirs, wide)
    with tempfile.TemporaryDirectory() as scratch:
        clipped, _ = ask(_clip(exported.path, Path(scratch) / "clipped"), tokens)
    moved = _apart(clipped, theirs)
    good = 1 / CACHE_ALIKE < their_loss / loss < CACHE_ALIKE and moved > CLIPPED * their_loss
    return good, (
        f"to a 16-bit cache {their_loss:.4f}, ours {loss:.4f}, moved by clipped scales {moved:.4f}"
    )


def _clip(folder: Path, copy: Path) -> Path:
    """A copy of a checkpoint whose cache scales are a CLIP-th."""
    shutil.copytree(folder, copy)
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith(SCALES):
                tensors[name] = tensors[name] / CLIP
        save_file(tensors, file, metadata={"format": "pt"})
    return copy


def _apart(some: Tensor, other: Tensor) -> float:
    """Mean |difference| in nats per token."""
    return float((some - other).abs().mean())


def export_demo(directory: Path, words: tuple[str, ...]) -> Path:
    fixed = ["data=sotu", "data.sequences=8", "eval=none", "speed=none"]
    command = [sys.executable, "-m", "compress", *words, *fixed, f"hydra.run.dir={directory}"]
    subprocess.run(command, check=True)
    return directory / "checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--checkpoint", type=Path, nargs="*", default=[])
    asked = parser.parse_args()
    base = ModelFolder(resolve_model(compose_settings([]).model.source, None))
    tokenizer = open_tokenizer(base)
    texts = load_texts("sotu-since-2009", "text", "train")
    tokens = evaluation_windows(texts, tokenizer, tokens=PROMPTS * LENGTH, window=LENGTH).tokens
    original = log_probs(load_dense(base, CPU, BF16), tokens)
    passed = [check(folder, original, tokens, asked.vllm_python) for folder in asked.checkpoint]
    for name in [] if asked.checkpoint else asked.only:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as scratch:
            folder = export_demo(Path(scratch) / "run", case.words)
            print(name, flush=True)
            python = asked.vllm_python if case.vllm else None
            passed.append(check(folder, original, tokens, python))
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
