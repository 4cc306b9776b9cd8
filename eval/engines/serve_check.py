"""Does a serving engine compute what was exported? vLLM's CPU build and transformers against our reader.

    python -m eval.engines.serve_check --vllm-python ENV/bin/python [--checkpoint FOLDER ...]

Without a checkpoint, the demo model is compressed by the recipe awq-int4 first, asymmetric as it
stands and once symmetric. For each: log-probabilities of the same 4 x 64 prompt tokens, and greedy
text. An engine passes if its mean log-probability is within TOLERANCE of ours and much nearer to
ours than to the original's (so an engine that dropped the quantization would fail). ``make
serve-check`` prepares vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from calibration.texts import load_texts
from calibration.tokens import evaluation_windows
from compress.compose import compose_settings
from compress.model.folder import ModelFolder
from compress.model.sources import open_tokenizer, resolve_model
from compress.runtime.load import load_dense

CLIENT = Path(__file__).parent / "vllm_client.py"
PROMPTS, LENGTH, NEW_TOKENS = 4, 64, 16
# Nats per token, mean of |difference|: engines round in bf16 at other places than we do.
TOLERANCE = 0.1
# The distance to our own log-probabilities must be below this share of the distance to the
# original's.
NEARER = 0.5
BF16, CPU = torch.bfloat16, torch.device("cpu")


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
    return log_probs(model, tokens), answer[:, LENGTH:].tolist()


def ask_vllm(python: str, folder: Path, tokens: Tensor) -> tuple[Tensor, list[list[int]]]:
    """What vLLM computes, in its own environment."""
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
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


def check(folder: Path, original: Tensor, tokens: Tensor, vllm_python: str) -> bool:
    """Print how far each engine is from our reader; True if all are near."""
    tokenizer = open_tokenizer(ModelFolder(folder))
    ours = log_probs(load_dense(ModelFolder(folder), CPU, BF16), tokens)
    passed = True
    engines = {
        "transformers": lambda: ask_transformers(folder, tokens),
        "vllm": lambda: ask_vllm(vllm_python, folder, tokens),
    }
    for name, ask in engines.items():
        theirs, answers = ask()
        distance = float((theirs - ours).abs().mean())
        to_original = float((theirs - original).abs().mean())
        near = distance < TOLERANCE and distance < NEARER * to_original
        passed &= near
        print(
            f"{'ok  ' if near else 'FAIL'} {name}: |difference| of log-probabilities {distance:.4f} to our "
            f"reader, {to_original:.4f} to the original; says {tokenizer.decode(answers[0])!r}"
        )
    return passed


def export_demo(directory: Path, *overrides: str) -> Path:
    words = ["recipe=awq-int4", "data=sotu", "eval=none", "speed=none", *overrides]
    command = [sys.executable, "-m", "compress", *words, f"hydra.run.dir={directory}"]
    subprocess.run(command, check=True)
    return directory / "checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("--checkpoint", type=Path, nargs="*", default=[])
    asked = parser.parse_args()
    base = ModelFolder(resolve_model(compose_settings([]).model.source, None))
    tokenizer = open_tokenizer(base)
    texts = load_texts("sotu-since-2009", "text", "train")
    tokens = evaluation_windows(texts, tokenizer, tokens=PROMPTS * LENGTH, window=LENGTH).tokens
    original = log_probs(load_dense(base, CPU, BF16), tokens)
    with tempfile.TemporaryDirectory() as scratch:
        few = ("data.sequences=8",)
        checkpoints = asked.checkpoint or [
            export_demo(Path(scratch) / "asymmetric", *few),
            export_demo(Path(scratch) / "symmetric", "scheme.symmetric=true", *few),
        ]
        passed = [check(folder, original, tokens, asked.vllm_python) for folder in checkpoints]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
