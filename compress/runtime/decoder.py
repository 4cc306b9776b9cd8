"""Greedy decoding over an exported folder, with weights and cache packed where a kernel fits.

prompt (batch, length); a token (batch, 1)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from compress.kv_cache.cache import PackedCache
from compress.model.folder import ModelFolder
from compress.runtime.cached import Caches, attend_packed
from compress.runtime.load import load_packed


class Decoder:
    """A model that decodes. 16-bit folders run through the very same code with dense linears and
    transformers' cache.

    kernels: how many linears, and layers of a packed cache, run through which kernel
    """

    def __init__(self, model: Any, kernels: dict[str, int], caches: Caches, device: torch.device):
        self.model = model
        self.kernels = kernels
        self.device = device
        self.vocabulary = int(model.config.vocab_size)
        self._caches = caches
        self._cache: Cache | None = None
        self._token = torch.empty(0, dtype=torch.int64)

    def start(self, prompt: Tensor, tokens: int) -> Tensor:
        self._cache = self._caches.new()
        if isinstance(self._cache, PackedCache):
            kernel = attend_packed(self.model, self._cache)
            self.kernels[kernel] = len(self._cache.layers)
        return self._advance(prompt.to(self.device))

    def step(self) -> Tensor:
        assert self._cache is not None, "start() comes first"
        return self._advance(self._token)

    def bytes_per_step(self, batch: int, context: int) -> int | None:
        return None

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
    folder = ModelFolder(path)
    model, kernels = load_packed(folder, target)
    return Decoder(model, kernels, Caches(folder, model), target)
