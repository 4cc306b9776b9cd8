"""A model that reads and decodes through the cache its folder asks for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from compress.kernels import decode_attention
from compress.kernels.decode_attention import UNPACKED
from compress.kv_cache.cache import PackedCache, Stored
from compress.kv_cache.folder import scales_of, scheme_of
from compress.kv_cache.scheme import CacheScheme
from compress.model.families import family_of
from compress.model.folder import ModelFolder
from compress.runtime.load import load_dense, load_packed


class Caches:
    """Makes the caches of a folder for its model: packed ones, or transformers' own in 16 bits.

    scheme: another one than the folder's
    """

    def __init__(self, folder: ModelFolder, model: Any, scheme: CacheScheme | None = None):
        self.scheme = scheme_of(folder) if scheme is None else scheme
        self.dtype = folder.dtype
        self._config = model.config
        self._scales = None
        if self.scheme is not None:
            self._scales = scales_of(folder, self.scheme, model.device)
        rotary = model.get_submodule(family_of(folder.config).rotary)
        like = torch.zeros(1, device=model.device)
        self._rotary = lambda positions: rotary(like, positions)

    def new(self, attention_mask: Tensor | None = None) -> Cache:
        """An empty cache. attention_mask: of a prompt with padding on the left."""
        if self.scheme is None:
            return DynamicCache(config=self._config)
        return PackedCache(
            self._config,
            self.scheme,
            dtype=self.dtype,
            scales=self._scales,
            rotary=self._rotary,
            attention_mask=attention_mask,
        )


class Reader:
    """Reads tokens piece by piece; every token sees the cache that it would see decoded by itself."""

    def __init__(self, model: Any, caches: Caches):
        self._model, self._caches = model, caches
        self.cache = caches.new()

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds; of one that is not packed, as it would in the folder's dtype."""
        if isinstance(self.cache, PackedCache):
            return self.cache.nbytes
        return sum(
            states.numel() * self._caches.dtype.itemsize
            for layer in self.cache.layers
            for states in (layer.keys, layer.values)
        )

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (batch, n, vocabulary) of the next n tokens (batch, n)."""
        tokens = tokens.to(self._model.device)
        return torch.cat(
            [
                self._model(piece, past_key_values=self.cache, use_cache=True).logits
                for piece in tokens.split(list(self._pieces(tokens.shape[1])), dim=1)
            ],
            dim=1,
        )

    def _pieces(self, count: int) -> Iterator[int]:
        """Lengths between the places at which tokens leave the window."""
        scheme = self._caches.scheme
        if scheme is None or scheme.direct:
            yield count
            return
        place = self.cache.get_seq_length() - scheme.sinks - scheme.window
        while count:
            piece = min(count, scheme.step - place % scheme.step)
            yield piece
            place, count = place + piece, count - piece

    def fork(self) -> Reader:
        """A reader that goes on from here; this one stays where it is."""
        other = Reader(self._model, self._caches)
        other.cache = copy.deepcopy(self.cache)
        return other


def load_served(folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> Any:
    """As ``load_dense``, and a folder with a quantized cache reads through it: texts and tasks are judged by
    what decoding would have seen."""
    model = load_dense(folder, device, dtype)
    read_through(model, Caches(folder, model))
    return model


def load_running(folder: ModelFolder, device: torch.device) -> Any:
    """As ``load_packed``, through the folder's cache too, with a kernel where one takes its scheme."""
    model, _ = load_packed(folder, device)
    read_through(model, Caches(folder, model), packed=True)
    return model


def read_through(model: Any, caches: Caches, *, packed: bool = False) -> None:
    """Let calls of a model and ``generate`` go through such caches, unless the caller brings one. packed:
    single tokens attend to what is stored, where a kernel can"""
    if caches.scheme is None:
        return
    plain, plain_generate = model.forward, model.generate

    def generate(*arguments: Any, **settings: Any) -> Any:
        if settings.get("past_key_values") is None:
            cache = settings["past_key_values"] = caches.new(settings.get("attention_mask"))
            if packed:
                attend_packed(model, cache)
        return plain_generate(*arguments, **settings)

    def forward(input_ids: Tensor, **arguments: Any) -> Any:
        if arguments.get("past_key_values") is not None:
            return plain(input_ids, **arguments)
        model.forward = plain
        try:
            return CausalLMOutputWithPast(logits=Reader(model, caches)(input_ids))
        finally:
            model.forward = forward

    model.forward, model.generate = forward, generate


ATTENTION = "compress-packed"


def attend_packed(model: Any, cache: PackedCache) -> str:
    """Let single tokens attend to what is stored, if a kernel takes the scheme here; returns what runs."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not decode_attention.supported(cache.scheme, head_dim, model.device):
        return UNPACKED
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
    cache.attend_packed()
    return decode_attention.NAME


def _attention(
    module: Any, query: Tensor, key: Any, value: Any, attention_mask: Any, **arguments: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: query (batch, heads, tokens, head_dim) -> (batch, tokens, heads,
    head_dim)."""
    if not isinstance(key, Stored):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
    out = decode_attention.attend(query[:, :, 0], key, arguments["scaling"])
    return out.unsqueeze(1), None
