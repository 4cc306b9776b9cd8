"""How the next token is picked from logits, on their device and without a word to the host.

logits (batch, vocabulary)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 takes the likeliest token; top_k: of so many likeliest alone; top_p: of the fewest
    likeliest whose probabilities add up to it (nucleus sampling, arXiv 1904.09751, section 3.1)."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature} is not allowed: choose 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} is not allowed: choose 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} is not allowed: choose more than 0, at most 1")

    def pick(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Tokens int64 (batch,)."""
        if self.temperature == 0:
            # Half the time of argmax on a CPU; the first of equals, both.
            return logits.max(-1).indices
        probabilities = self.probabilities(logits)
        # The largest of p / e with e exponential is token i with probability p_i: a draw that, unlike
        # torch.multinomial, never waits for the device.
        noise = torch.empty_like(probabilities).exponential_(generator=generator)
        return (probabilities / noise).argmax(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """float32 (batch, vocabulary), 0 for tokens that are left out."""
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p is None or self.top_p == 1:
            return probabilities
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # A token stays if those before it do not add up yet: the first always does.
        out = ordered.cumsum(-1) - ordered >= self.top_p
        return probabilities.masked_fill(out.scatter(1, order, out), 0)


GREEDY = Sampling()
