"""The decode engine: a checkpoint's network, static caches, and on a GPU one captured graph a step.

prompt (batch, length); a token (batch, 1)
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.device import device_named
from compress.export.formats import Weights
from compress.kv_cache.cache import Scales
from compress.kv_cache.folder import scales_of, scheme_of
from compress.kv_cache.scheme import CacheScheme, cache_bytes
from compress.kv_cache.static import StaticCache
from compress.model.folder import ModelFolder
from compress.model.shapes import ShapeFolder
from compress.runtime.attention import attention
from compress.runtime.build import Source, build
from compress.runtime.network import Attend, Network
from compress.runtime.random import RandomModel, RandomWeights
from compress.runtime.sampling import GREEDY, Sampling
from compress.runtime.weights import nbytes, tune, waits

log = logging.getLogger(__name__)

# The least tokens that a cache has room for: fewer would need a graph of their own for little.
LEAST = 256
# Steps before a capture: libraries set themselves up in the first ones.
WARM_UP = 3
# The scale of a cache of random states, which are about 1 in size.
FIXED = 0.02


class Decoder:
    """Decodes batches of prompts of any length, greedily or by sampling. 16-bit checkpoints run through the
    very same code.

    kernels: how many linears, and layers of attention, run through which kernel
    """

    def __init__(
        self,
        network: Network,
        kernels: dict[str, int],
        *,
        vocabulary: int,
        dtype: torch.dtype,
        device: torch.device,
        scheme: CacheScheme | None = None,
        scales: Sequence[Scales] | None = None,
        sampling: Sampling = GREEDY,
    ):
        """scheme: of the cache, None: 16 bits; scales: of each layer, where the scheme's are fixed"""
        self.kernels, self.vocabulary = kernels, vocabulary
        self._network, self._device = network, device
        self._sampling = sampling
        self._generator = torch.Generator(device)
        self._dtype, self._scheme, self._scales = dtype, scheme, scales
        self._packs = scheme is not None and not scheme.direct
        self._stream: torch.cuda.Stream | None = None
        # Those the last token was picked from, (batch, vocabulary); the next step overwrites them.
        self.logits = torch.empty(0, device=device)
        self._request: Request | None = None
        self._least = LEAST
        waiting = [linear for linear in network.linears if waits(linear.weight)]
        self._captures = device.type == "cuda" and not waiting
        if device.type == "cuda" and waiting:
            log.info(
                "%d linears pick their outlier columns while they run: steps are launched one by one, not as "
                "a captured graph",
                len(waiting),
            )

    @torch.inference_mode()
    def start(self, prompt: Tensor, tokens: int, padding: Tensor | None = None) -> Tensor:
        """Read a prompt; the first token, computed when this returns.

        tokens: how many will be asked for, this one included: the cache gets room for them, and a step
            that it has no room for raises RuntimeError
        padding: int64 (batch,) tokens on the left of each row that are none
        """
        batch, length = prompt.shape
        request = self._room(batch, length + tokens)
        request.reset(padding)
        self._generator.manual_seed(self._sampling.seed)
        if padding is not None:
            padding = padding.to(self._device)
        logits = self._network.prompt(prompt.to(self._device), request.cache.fill, padding)
        request.token.copy_(self._sampling.pick(logits, self._generator))
        self.logits = logits
        return self._token(request)

    @torch.inference_mode()
    def step(self) -> Tensor:
        """The next token, computed when this returns."""
        request = self._request
        assert request is not None, "start() comes first"
        if request.cache.length == request.capacity:
            raise RuntimeError(
                f"the cache has room for {request.capacity} tokens, and holds as many"
            )
        if request.graph is None:
            self._advance(request)
        else:
            request.graph.replay()
        assert request.logits is not None
        self.logits = request.logits
        request.cache.advance_host()
        if request.cache.needs_pack:
            request.pack()
        return self._token(request)

    def generate(
        self, prompts: Sequence[Sequence[int]], tokens: int, end: int | None = None
    ) -> list[list[int]]:
        """What follows each prompt, at most so many tokens, to the first ``end``.

        Raises ValueError for a prompt without tokens, or with one that is not in the vocabulary.
        """
        if tokens < 1 or not prompts or not all(map(len, prompts)):
            raise ValueError(
                "at least one prompt is needed, with a token in each, and one to write"
            )
        for token in itertools.chain(*prompts):
            if not 0 <= token < self.vocabulary:
                raise ValueError(f"token {token} is not in the vocabulary of {self.vocabulary}")
        longest = max(map(len, prompts))
        padding = torch.tensor([longest - len(prompt) for prompt in prompts])
        rows = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            row[longest - len(prompt) :] = torch.as_tensor(prompt)
        columns = [self.start(rows, tokens, padding if padding.any() else None)]
        while len(columns) < tokens:
            if end is not None and (torch.cat(columns, 1) == end).any(1).all():
                break
            columns.append(self.step())
        found = torch.cat(columns, 1).tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in found]

    def reserve(self, tokens: int) -> None:
        """Requests get room for so many tokens, even if they ask for fewer: those of many lengths share a
        cache and a graph."""
        self._least = max(LEAST, tokens)

    def tune(self, batches: Sequence[int]) -> None:
        """Measure on the device how products of these many rows run best, and keep it: see kernels.tuning."""
        for batch in batches:
            for linear in self._network.linears:
                tune(linear.weight, batch, self._dtype)
        # Graphs hold what was looked up when they were captured.
        self._request = None

    def bytes_per_step(self, batch: int, context: int) -> int:
        """Bytes that a step must read at the least: every weight once, as it is stored, but of the embedding
        only the tokens' rows, and the cache of so many tokens."""
        weights = sum(nbytes(linear.weight) for linear in self._network.linears)
        return weights + self._cache_bytes(batch, context)

    def _cache_bytes(self, batch: int, context: int) -> int:
        heads = self._network.heads
        one = cache_bytes(
            self._scheme, heads.windows, heads.keys, heads.size, self._dtype.itemsize, context
        )
        return round(batch * one)

    def _advance(self, request: Request) -> None:
        """One step on the device; nothing in it waits for the host, so it can be a graph."""
        logits = self._network.step(request.token, request.attend)
        request.token.copy_(self._sampling.pick(logits, self._generator))
        request.logits = logits
        request.cache.advance_device()

    def _token(self, request: Request) -> Tensor:
        token = request.token.unsqueeze(1).clone()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return token

    def _room(self, batch: int, tokens: int) -> Request:
        """Buffers and graph for such a batch with room for so many tokens: those of the last request, if they
        fit. Only one set lives at a time."""
        capacity = 1 << (max(self._least, tokens) - 1).bit_length()
        request = self._request
        if request is not None and (request.batch, request.capacity) == (batch, capacity):
            return request
        # With what the last one's graph holds.
        self._request = None
        self.logits = torch.empty(0, device=self._device)
        heads = self._network.heads
        cache = StaticCache(
            (len(self._network.blocks), batch, heads.keys, heads.size),
            capacity,
            dtype=self._dtype,
            device=self._device,
            scheme=self._scheme,
            scales=self._scales,
            sliding_windows=heads.windows,
            rotary=self._network.rotary,
        )
        cos, sin = self._network.rotary(torch.arange(capacity, device=self._device)[None])
        kernel, attend = attention(cache, (cos[0], sin[0]), heads)
        token = torch.zeros(batch, dtype=torch.int64, device=self._device)
        request = Request(cache, attend, token, batch, capacity)
        if self._captures:
            self._capture(request)
        self._request = request
        self.kernels[kernel] = len(self._network.blocks)
        return request

    def _capture(self, request: Request) -> None:
        if self._stream is None:
            # One for all captures: libraries keep a workspace for each stream.
            self._stream = torch.cuda.Stream(self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._warm_up(request)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        request.graph = torch.cuda.CUDAGraph()
        if self._sampling.temperature:
            request.graph.register_generator_state(self._generator)
        with torch.cuda.graph(request.graph, stream=self._stream):
            self._advance(request)
        if self._packs:
            request.pack_graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(request.pack_graph, stream=self._stream):
                request.cache.pack_device()

    def _warm_up(self, request: Request) -> None:
        """Steps and packing on an empty cache, which is empty again afterwards."""
        for _ in range(WARM_UP):
            self._advance(request)
            request.reset(None)
            if self._packs:
                request.cache.pack_device()
                request.reset(None)


@dataclass
class Request:
    """What lives from a prompt to its last token: the cache, the token (batch,) that was picked last, the
    logits of the last step, and the graphs of a step and of packing."""

    cache: StaticCache
    attend: Attend
    token: Tensor
    batch: int
    capacity: int
    logits: Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None
    pack_graph: torch.cuda.CUDAGraph | None = None

    def reset(self, padding: Tensor | None) -> None:
        self.cache.reset(padding)

    def pack(self) -> None:
        if self.pack_graph is None:
            self.cache.pack_device()
        else:
            self.pack_graph.replay()
        self.cache.pack_host()


def open_decoder(path: Path, device: str, sampling: Sampling = GREEDY) -> Decoder:
    """A decoder over the folder at ``path``; picklable by name, for a process of its own."""
    target = device_named(device)
    folder = ModelFolder(path)
    scheme = scheme_of(folder)
    scales = None if scheme is None else scales_of(folder, scheme, target)
    return _decoder(Weights(folder), target, scheme, scales, sampling)


def open_random(model: RandomModel, device: str) -> Decoder:
    """The same of random weights. Raises UserError for a shape that is not known."""
    target = device_named(device)
    folder = ShapeFolder(model.shape)
    scales = None
    if model.cache is not None and model.cache.static:
        one = torch.full((1,), FIXED, device=target)
        scales = [Scales(one, one)] * int(folder.config["num_hidden_layers"])
    weights = RandomWeights(folder, model.schemes, target)
    return _decoder(weights, target, model.cache, scales, GREEDY)


def _decoder(
    source: Source,
    device: torch.device,
    scheme: CacheScheme | None,
    scales: Sequence[Scales] | None,
    sampling: Sampling,
) -> Decoder:
    network, kernels = build(source, device)
    return Decoder(
        network,
        kernels,
        vocabulary=int(source.folder.config["vocab_size"]),
        dtype=source.folder.dtype,
        device=device,
        scheme=scheme,
        scales=scales,
        sampling=sampling,
    )
