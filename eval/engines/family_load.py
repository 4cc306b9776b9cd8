"""Reads a checkpoint with an engine and says what it makes of tokens: a program for the engine's own
environment, which has none of this project.

    python family_load.py ENGINE FOLDER TOKENS OUT

ENGINE: transformers, gptqmodel or vllm; TOKENS: safetensors with ``tokens`` int64 (sequences, length); OUT
gets ``log_probs`` float32 (sequences, length - 1): of each next token, natural logarithms. What ends it is
its last line on standard error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def transformers_log_probs(folder: Path, tokens: Tensor) -> Tensor:
    """Raises ValueError if weights were made up for want of a tensor."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    whole: Any = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    model, found = whole.from_pretrained(
        folder, dtype="auto", device_map="cpu", output_loading_info=True
    )
    if found["missing_keys"]:
        raise ValueError(f"does not find {len(found['missing_keys'])} of its weights")
    return _next(model, tokens)


def gptqmodel_log_probs(folder: Path, tokens: Tensor) -> Tensor:
    from gptqmodel import GPTQModel

    return _next(GPTQModel.load(str(folder), device="cpu").model, tokens)


def _next(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens, use_cache=False).logits.float()
    return logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)


def vllm_log_probs(folder: Path, tokens: Tensor) -> Tensor:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=2,
        dtype="bfloat16",
        enable_prefix_caching=False,
    )
    asked = SamplingParams(max_tokens=1, temperature=0, detokenize=False, prompt_logprobs=0)
    prompts = [{"prompt_token_ids": row.tolist()} for row in tokens]
    rows = []
    for row, answer in zip(tokens, engine.generate(prompts, asked), strict=True):
        pairs = zip(row[1:].tolist(), answer.prompt_logprobs[1:], strict=True)
        rows.append([found[token].logprob for token, found in pairs])
    return torch.tensor(rows)


ENGINES = {
    "transformers": transformers_log_probs,
    "gptqmodel": gptqmodel_log_probs,
    "vllm": vllm_log_probs,
}


def main() -> None:
    engine, folder, tokens, out = sys.argv[1:]
    try:
        found = ENGINES[engine](Path(folder), load_file(tokens)["tokens"])
    except BaseException as error:
        reason = str(error).strip().partition("\n")[0]
        print(f"{type(error).__name__}: {reason}", file=sys.stderr, flush=True)
        # vLLM's other processes may not end by themselves.
        os._exit(1)
    save_file({"log_probs": found.contiguous()}, out)
    os._exit(0)


if __name__ == "__main__":
    main()
