"""Greedy decoding over an exported folder, with its weights packed where a kernel fits.

prompt (batch, length); a token (batch, 1)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from compress.model.folder import ModelFolder
from compress.runtime.load import load_packed


class Decoder:
    """A model that decodes. 16-bit folders run through the very same code with dense linears."""

    def __init__(self, model: Any, kernels: dict[str, int], device: torch.device):
        self.model = model
        self.kernels = kernels
        self.device = device
        self.vocabulary = int(model.config.vocab_size)
        self._cache: DynamicCache | None = None
        self._token = torch.empty(0, dtype=torch.int64)

    def start(self, prompt: Tensor) -> Tensor:
        self._cache = DynamicCache(config=self.model.config)
        return self._advance(prompt.to(self.device))

    def step(self) -> Tensor:
        assert self._cache is not None, "start() comes first"
        return self._advance(self._token)

    @torch.inference_mode()
    def _advance(self, tokens: Tensor) -> Tensor:
        logits = self.model(
            tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        ).logits
        self._token = logits[:, -1].argmax(-1, keepdim=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._token


def open_decoder(path: Path, device: str) -> Decoder:
    """A decoder over the folder at ``path``; picklable by name, for a process of its own."""
    target = torch.device(device)
    model, kernels = load_packed(ModelFolder(path), target)
    return Decoder(model, kernels, target)
