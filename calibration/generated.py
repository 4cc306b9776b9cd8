"""Text of the model itself: tokens it samples, for methods that follow a model rather than a text.

A random first token, then the model's own distribution (LLM-QAT, arXiv 2305.17888, section 3.1): no
corpus is needed, and the text is as general as the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Sequences that are sampled together.
BATCH = 64


@torch.inference_mode()
def generated_tokens(
    model: Any, *, sequences: int, length: int, prefix: list[int], seed: int
) -> Tensor:
    """Tokens int64 (sequences, length), sampled at temperature 1, on the model's device.

    model: a transformers model for causal language modelling
    prefix: what every sequence starts with (BOS, or nothing), before the random token
    End-of-text is not sampled: every sequence has the whole length.
    """
    device = next(model.parameters()).device
    start = torch.tensor(prefix, dtype=torch.int64, device=device)
    found = []
    # transformers samples from torch's global generator: seeded here, and put back as it was.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for first in torch.randint(model.config.vocab_size, (sequences,)).split(BATCH):
            begin = torch.cat([start.expand(len(first), -1), first.unsqueeze(1).to(device)], dim=1)
            new = length - begin.shape[1]
            rows = model.generate(
                begin,
                attention_mask=torch.ones_like(begin),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=new,
                max_new_tokens=new,
                pad_token_id=0,
            )
            found.append(rows)
    return torch.cat(found)
