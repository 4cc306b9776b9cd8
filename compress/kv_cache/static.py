"""Keys and values in buffers that are there from the beginning, so that a step of decoding can be a captured
graph: whatever changes from token to token is in tensors on the device.

All rows advance together; a row whose prompt is shorter has padding on its left. A layer holds what
``compress.kv_cache.cache.PackedLayer`` would after the same tokens:

    kept    (batch, heads, room, head_dim): what is in 16 bits, sinks first, then the recent tokens; without
            a scheme the whole sequence, with room for the capacity
    packed  (batch, heads, room, ...): the store, see ``compress.kv_cache.states``

With a sliding window nothing is dropped, which takes the memory of the capacity: attention begins at the
oldest token that is seen. A step is

    every layer: write its token, attend to stored[layer]
    advance_device(), advance_host()
    if needs_pack: pack_device(), pack_host()

and what is for the device can be captured: those for the host count along.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

import torch
from torch import Tensor

from compress.kv_cache.cache import PackedLayer, Pair, Rotary, Scales, Stored, turn, unturn
from compress.kv_cache.scheme import CacheScheme, StateScheme
from compress.kv_cache.states import Packed, dequantize, quantize

# Numbers that are quantized at once, which takes several float32 copies.
AT_ONCE = 2**24


class StaticCache:
    """The keys and values of all layers.

    length: tokens so far; place: the same on the device, int64 (1,), where the next token goes
    first: int64 (batch,), the padding of each row
    counts: int64 (3,), as in ``Stored`` while the next token is attended to
    keys, values: what is kept, (layers, batch, heads, room, head_dim)
    stored: the parts of each layer for kernels, views of the buffers
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        capacity: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        scheme: CacheScheme | None = None,
        scales: Sequence[Scales] | None = None,
        sliding_windows: Sequence[int | None] | None = None,
        rotary: Rotary | None = None,
    ):
        """shape: layers, batch, heads of keys, head_dim; capacity: tokens of a row, padding included; scheme:
        None if all is in 16 bits. The others as for ``PackedLayer``, of each layer.

        Raises ValueError where they do not fit together.
        """
        layers, batch = shape[:2]
        windows = list(sliding_windows or [None] * layers)
        if min(*shape, capacity) < 1 or len(windows) != layers:
            raise ValueError(f"no cache has {shape=}, {capacity=} and {len(windows)} windows")
        if scheme is not None and scheme.sinks and None in windows and any(windows):
            raise ValueError(
                "sliding layers keep no sinks, so that they and others would pack at different times"
            )
        self.scheme, self.rotary = scheme, rotary
        self.scales = None if scales is None else [scale.of_heads(shape[2]) for scale in scales]
        self.capacity, self.dtype, self.device = capacity, dtype, torch.device(device)
        self.windows = windows
        self._padded = False
        if scheme is not None:
            # Raises where scales or the embedding are missing.
            self._prompt_layer(0)
        kept_room, packed_room = _rooms(scheme, capacity)
        self.keys, self.values = (
            torch.zeros(*shape[:3], kept_room, shape[3], dtype=dtype, device=self.device)
            for _ in range(2)
        )
        self._packed: tuple[Packed, Packed] | None = None
        if scheme is not None:
            room = (*shape[:3], packed_room, shape[3])
            self._packed = (
                _store(room, scheme.keys, self.device),
                _store(room, scheme.values, self.device),
            )
        self.length = self._packed_tokens = self._sinks = 0
        self.counts = torch.zeros(3, dtype=torch.int64, device=self.device)
        self.place = self.counts[:1]
        self.first = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.stored = [self._of_layer(i) for i in range(layers)]
        self.reset()

    def reset(self, first: Tensor | None = None) -> None:
        """Forget all tokens. first: the padding of the rows to come, int64 (batch,)"""
        self.first.zero_()
        if first is not None:
            self.first.copy_(first)
        self._padded = bool(self.first.any())
        sinks = 0 if self.scheme is None or any(self.windows) else self.scheme.sinks
        # Steps that the host did not count, as in warming up, have moved what the device counts.
        self.counts.zero_()
        self.length = self._packed_tokens = self._sinks = 0
        self._count(0, 0, sinks)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        tensors = [self.keys, self.values]
        tensors += [part for packed in self._packed or () for part in packed.tensors]
        return sum(part.nbytes for part in tensors)

    def fill(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """The states of a whole prompt, (batch, heads, tokens, head_dim)."""
        if self.scheme is not None:
            source = self._prompt_layer(layer)
            source.fill(keys, values)
            self.take(layer, source)
            return
        tokens = self.checked(keys.shape[2])
        self.keys[layer, :, :, :tokens].copy_(keys)
        self.values[layer, :, :, :tokens].copy_(values)
        self._count(tokens, 0, 0)

    def take(self, layer: int, source: PackedLayer) -> None:
        """What another cache of the scheme holds, with the same padding."""
        tokens, stored = self.checked(source.get_seq_length()), source.stored()
        kept = stored.kept[0].shape[2]
        for i, buffer in enumerate((self.keys, self.values)):
            buffer[layer, :, :, :kept].copy_(stored.kept[i])
            if stored.packed is None or self._packed is None:
                continue
            held = stored.packed[i].tokens
            for into, part in zip(self._packed[i].tensors, stored.packed[i].tensors, strict=True):
                # What the window has left behind was dropped: it is never seen.
                start = (tokens - kept - held) * part.shape[2] // max(1, held)
                into[layer, :, :, start : start + part.shape[2]].copy_(part)
        self._count(tokens, tokens - kept, source.sink_tokens)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """The token at ``place``, (batch, heads, head_dim), which the layer attends to next."""
        pair = (keys.unsqueeze(2).to(self.dtype), values.unsqueeze(2).to(self.dtype))
        place, packed, sinks = self.counts.split(1)
        direct = self.scheme is not None and self.scheme.direct
        if self.keys.shape[3]:
            # Behind the sinks there is room for a token that only the store wants.
            slot = place.minimum(sinks) if direct else place - packed
            self.keys[layer].index_copy_(2, slot, pair[0])
            self.values[layer].index_copy_(2, slot, pair[1])
        if direct:
            # Before there are as many tokens as sinks, the first packed one will overwrite this.
            self._quantize(slice(layer, layer + 1), pair, (packed - 1).clamp(min=0))

    def read(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (batch, heads, n, head_dim) as attention sees them after ``write``, and which each
        row sees, bool (batch, n): those in 16 bits, then the packed ones."""
        place, packed, sinks = self.counts.split(1)
        stored = self.stored[layer]
        window = self.windows[layer]
        first = self.first if window is None else self.first.maximum(place + 1 - window)
        # What a graph reads may not depend on what the host counts.
        whole = self.device.type != "cpu"
        kept = self.keys.shape[3] if whole else self.length + 1 - self._packed_tokens
        index = torch.arange(kept, device=self.device)
        seen = (index < sinks) | (index - sinks + packed >= first[:, None])
        seen &= index <= place - packed
        keys, values = (states[:, :, :kept] for states in stored.kept)
        if stored.packed is None or self.scheme is None:
            return keys, values, seen
        index = torch.arange(
            stored.packed[0].tokens if whole else self._packed_tokens, device=self.device
        )
        seen = torch.cat([seen, (index < packed) & (index >= first[:, None])], dim=1)
        fixed = self._fixed(slice(layer, layer + 1))
        new = [
            dequantize(stored.packed[i].first(len(index)), state, fixed[i])
            for i, state in enumerate((self.scheme.keys, self.scheme.values))
        ]
        if self.scheme.pre_rope:
            new[0] = turn(new[0], *self._angles(sinks, len(index)))
        keys, values = (
            torch.cat([old, more.to(self.dtype)], dim=2)
            for old, more in zip((keys, values), new, strict=True)
        )
        return keys, values, seen

    def advance_device(self) -> None:
        self.place.add_(1)
        if self.scheme is not None and self.scheme.direct:
            place, packed, sinks = self.counts.split(1)
            packed.copy_((place + 1 - sinks).clamp(min=0))

    def advance_host(self) -> None:
        """Raises ValueError if there was no room for the token."""
        self.checked(self.length + 1)
        self.length += 1
        if self.scheme is not None and self.scheme.direct:
            self._packed_tokens = max(0, self.length + 1 - self._sinks)

    @property
    def needs_pack(self) -> bool:
        """Whether the recent tokens fill their room."""
        scheme = self.scheme
        if scheme is None or scheme.direct:
            return False
        return self.length - self._packed_tokens - self._sinks >= scheme.window + scheme.step

    def pack_device(self) -> None:
        """Move the oldest recent tokens of all layers into the store."""
        assert self.scheme is not None
        step, window = self.scheme.step, self.scheme.window
        _, packed, sinks = self.counts.split(1)
        recent = sinks + torch.arange(step + window, device=self.device)
        layers, *rest = self.keys[:, :, :, :step].shape
        count = max(1, AT_ONCE // math.prod(rest))
        for start in range(0, layers, count):
            part = slice(start, start + count)
            keys, values = (
                states[part].index_select(3, recent) for states in (self.keys, self.values)
            )
            oldest = (keys[..., :step, :].flatten(0, 1), values[..., :step, :].flatten(0, 1))
            self._quantize(part, oldest, packed)
            self.keys[part].index_copy_(3, recent[:window], keys[..., step:, :])
            self.values[part].index_copy_(3, recent[:window], values[..., step:, :])
        packed.add_(step)

    def pack_host(self) -> None:
        assert self.scheme is not None
        self._packed_tokens += self.scheme.step

    def _quantize(self, layers: slice, states: Pair, start: Tensor) -> None:
        """Put keys and values (layers * batch, heads, tokens, head_dim) at a place of the store."""
        assert self.scheme is not None
        assert self._packed is not None
        keys, values = states
        tokens = keys.shape[2]
        if self.scheme.pre_rope:
            cos, sin = self._angles(self.counts[2:] + start, tokens)
            count = len(keys) // len(self.first)
            keys = unturn(keys.float(), cos.repeat(count, 1, 1, 1), sin.repeat(count, 1, 1, 1))
        fixed = self._fixed(layers)
        for i, (x, state) in enumerate(((keys, self.scheme.keys), (values, self.scheme.values))):
            new = quantize(x, state, fixed[i])
            for into, part in zip(self._packed[i].tensors, new.tensors, strict=True):
                share = tokens // part.shape[2]
                index = start // share + torch.arange(part.shape[2], device=self.device)
                into[layers].flatten(0, 1).index_copy_(2, index, part)

    def _fixed(self, layers: slice) -> tuple[Tensor | None, Tensor | None]:
        """The fixed scales of some layers, broadcastable to their states (layers * batch, ...)."""
        if self.scales is None:
            return None, None
        chosen, batch = self.scales[layers], len(self.first)
        keys, values = (
            torch.stack([scale.reshape(-1, 1, 1) for scale in scales]).repeat_interleave(batch, 0)
            for scales in ([s.keys for s in chosen], [s.values for s in chosen])
        )
        return keys, values

    def _angles(self, start: Tensor, count: int) -> Pair:
        """cos and sin (batch, 1, count, head_dim) of tokens from an index on, sinks counted."""
        assert self.rotary is not None
        index = start + torch.arange(count, device=self.device)
        cos, sin = self.rotary((index - self.first[:, None]).clamp(min=0))
        return cos.float().unsqueeze(1), sin.float().unsqueeze(1)

    def _of_layer(self, layer: int) -> Stored:
        packed = None
        if self._packed is not None:
            keys, values = (store.map(itemgetter(layer)) for store in self._packed)
            packed = (keys, values)
        return Stored(
            self.scheme,
            None if self.scales is None else self.scales[layer],
            packed,
            (self.keys[layer], self.values[layer]),
            self.counts,
            self.first,
            self.windows[layer],
        )

    def _prompt_layer(self, layer: int) -> PackedLayer:
        assert self.scheme is not None
        return PackedLayer(
            self.scheme,
            dtype=self.dtype,
            scales=None if self.scales is None else self.scales[layer],
            rotary=self.rotary,
            padding=self.first.clone() if self._padded else None,
            sliding_window=self.windows[layer],
        )

    def checked(self, tokens: int) -> int:
        """So many tokens; raises ValueError if there is no room for them."""
        if tokens > self.capacity:
            raise ValueError(f"a cache of {self.capacity} tokens has no room for {tokens}")
        return tokens

    def _count(self, length: int, packed: int, sinks: int) -> None:
        """Set what is counted, here and on the device."""
        if self.scheme is not None and self.scheme.direct:
            # The next token is in the store when it is attended to.
            packed = max(0, length + 1 - sinks)
        if (length, packed, sinks) != (self.length, self._packed_tokens, self._sinks):
            self.counts.copy_(torch.tensor([length, packed, sinks]))
        self.length, self._packed_tokens, self._sinks = length, packed, sinks


def _rooms(scheme: CacheScheme | None, capacity: int) -> tuple[int, int]:
    """Tokens that the buffer in 16 bits and the store have room for."""
    if scheme is None:
        return capacity, 0
    if scheme.direct:
        return scheme.sinks + 1 if scheme.sinks else 0, capacity
    # Rows with much padding have fewer sinks, so that more is packed.
    packed = max(0, capacity - scheme.window) // scheme.step * scheme.step
    return scheme.sinks + scheme.window + scheme.step, max(scheme.step, packed)


def _store(shape: tuple[int, ...], state: StateScheme, device: torch.device) -> Packed:
    """An empty store for states of a shape (..., tokens, head_dim)."""
    *many, tokens, head_dim = shape
    scale = torch.ones(1) if state.static else None
    one = quantize(torch.zeros(1, 1, state.tokens, head_dim), state, scale)
    return one.map(
        lambda part: torch.zeros(
            *many,
            tokens // state.tokens * part.shape[2],
            part.shape[3],
            dtype=part.dtype,
            device=device,
        )
    )
