"""A transformers cache that stores keys and values in few bits.

A layer keeps a sequence in three parts: the first tokens (sinks) and the recent ones in 16 bits, and between
them the packed store, which grows by whole groups as tokens leave the window:

    sinks | packed ... | recent

states (batch, heads, tokens, head_dim)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from compress.kv_cache.scheme import CacheScheme
from compress.kv_cache.states import Packed, dequantize, quantize

# position ids (batch or 1, tokens) -> cos and sin (batch or 1, tokens, head_dim), as a model's rotary
# embedding gives them.
Rotary = Callable[[Tensor], tuple[Tensor, Tensor]]
# Keys and values.
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Scales:
    """The fixed scales of a layer: float32 (1,), or (heads, 1, 1)."""

    keys: Tensor
    values: Tensor

    def of_heads(self, heads: int) -> Scales:
        """One for each head, (heads, 1, 1)."""
        return Scales(*(s.expand(heads, 1, 1).contiguous() for s in (self.keys, self.values)))


@dataclass(frozen=True)
class Stored:
    """The parts of a layer at one moment, keys first; what a kernel attends to without unpacking.

    scheme: None if all is in 16 bits
    packed: may have room for more tokens than there are, and so may ``kept``
    kept: what is in 16 bits, sinks first, then the recent tokens
    counts: int64 (3,): the place of the newest token, so one less than there are; packed ones; sinks
    first: int64 (batch,), how many of the packed and recent tokens together, from the front, a row must
        not see
    sliding_window: tokens a query sees, itself included; where there is one there are no sinks
    """

    scheme: CacheScheme | None
    scales: Scales | None
    packed: tuple[Packed, Packed] | None
    kept: Pair
    counts: Tensor
    first: Tensor
    sliding_window: int | None


class PackedLayer(CacheLayerMixin):
    """The keys and values of one layer, appended to in pieces of any length.

    With a window, a piece attends to itself and to the window in 16 bits and to the rest as it is
    stored: behind the sinks, pieces of ``scheme.step`` tokens see exactly what token by token
    would. Without one, and if every token is quantized by itself, everything is read back from the
    store.
    """

    is_compileable = False
    # What was packed cannot be made what it was.
    is_croppable = False

    def __init__(
        self,
        scheme: CacheScheme,
        *,
        dtype: torch.dtype = torch.bfloat16,
        scales: Scales | None = None,
        rotary: Rotary | None = None,
        padding: Tensor | None = None,
        sliding_window: int | None = None,
    ):
        """dtype: of what stays in 16 bits; rotary: needed for ``pre_rope``; padding: tokens on the left of
        each row that are none, int64 (batch,); sliding_window: tokens a query sees, itself included."""
        super().__init__()
        if scheme.static != (scales is not None):
            raise ValueError(f"{scheme.name} needs {'its' if scheme.static else 'no'} scales")
        if scheme.pre_rope and rotary is None:
            raise ValueError("pre_rope needs the rotary embedding of the model")
        self.scheme = scheme
        self.stored_dtype = dtype
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        # Attend to what is stored with a kernel, when one token comes.
        self.fused = False
        self._scales = scales
        self._rotary = rotary
        self._padding = padding
        self.reset()

    def reset(self) -> None:
        self.is_initialized = False
        self._packed: tuple[Packed, Packed] | None = None
        # In 16 bits: so many sinks, then the recent tokens. A sliding window leaves the first tokens behind.
        self._sinks = 0
        self.sink_tokens = 0 if self.is_sliding else self.scheme.sinks
        self._length = self._dropped = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        if self._padding is not None:
            self._padding = self._padding.to(self.device)
        none = [states[:, :, :0].to(self.stored_dtype) for states in (key_states, value_states)]
        self._kept: Pair = (none[0], none[1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Append, and return all keys and values in the dtype of the new ones; where the layer is ``fused``
        and one token came, what is ``Stored`` twice instead."""
        self._append(key_states, value_states)
        read: tuple[Any, Any]
        if self.fused and key_states.shape[2] == 1:
            stored = self.stored()
            read = (stored, stored)
        else:
            read = self._read()
        self._pack()
        self._slide()
        return read

    def fill(self, key_states: Tensor, value_states: Tensor) -> None:
        """``update`` without reading."""
        self._append(key_states, value_states)
        self._pack()
        self._slide()

    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = (key_states.to(self.stored_dtype), value_states.to(self.stored_dtype))
        if self._padding is not None and self._length == 0:
            new = self._sinks_first(new)
        self._length += new[0].shape[2]
        self._kept = _cat(self._kept, new)
        # The first tokens are all there is until there are as many as sinks.
        self._sinks = min(self.sink_tokens, self._length)
        if self.scheme.direct:
            self._pack()

    def stored(self) -> Stored:
        """The parts as they are now; later updates leave them alone."""
        packed = 0 if self._packed is None else self._packed[0].tokens
        tokens, batch = packed + self._kept[0].shape[2], self._kept[0].shape[0]
        first = self._padding
        if first is None:
            first = torch.zeros(batch, dtype=torch.int64, device=self.device)
        elif self._dropped:
            first = (first - self._dropped).clamp(min=0)
        counts = _counts(tokens - 1, packed, self._sinks, self.device)
        return Stored(
            self.scheme, self._scales, self._packed, self._kept, counts, first, self.sliding_window
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that the stored tensors hold."""
        if not self.is_initialized:
            return 0
        tensors = [*self._kept]
        tensors += [part for packed in self._packed or () for part in packed.tensors]
        storages = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in tensors}
        return sum(storage.nbytes() for storage in storages.values())

    def _pack(self) -> None:
        """Move the whole groups that are older than the window into the store."""
        step = self.scheme.step
        recent = self._kept[0].shape[2] - self._sinks
        count = (recent - self.scheme.window) // step * step
        if count <= 0:
            return
        keys, values = _part(self._kept, slice(self._sinks, self._sinks + count))
        if self.scheme.pre_rope:
            cos, sin = self._angles(self._length - recent, count)
            keys = unturn(keys.float(), cos, sin)
        fixed = self._fixed
        new = (
            quantize(keys, self.scheme.keys, fixed[0]),
            quantize(values, self.scheme.values, fixed[1]),
        )
        if self._packed is not None:
            new = (self._packed[0].append(new[0]), self._packed[1].append(new[1]))
        self._packed = new
        self._kept = _cat(
            _part(self._kept, slice(0, self._sinks)),
            _part(self._kept, slice(self._sinks + count, None)),
        )

    def _slide(self) -> None:
        """Drop whole groups that no later query sees."""
        if self.sliding_window is None or self._packed is None:
            return
        unseen = self._length - self.sliding_window + 1 - self._dropped
        count = min(unseen, self._packed[0].tokens) // self.scheme.keys.tokens
        count *= self.scheme.keys.tokens
        if count > 0:
            self._packed = (self._packed[0].without(count), self._packed[1].without(count))
            self._dropped += count

    def _read(self) -> Pair:
        parts: list[Pair] = [
            _part(self._kept, slice(0, self._sinks)),
            _part(self._kept, slice(self._sinks, None)),
        ]
        if self._packed is not None:
            fixed = self._fixed
            keys = dequantize(self._packed[0], self.scheme.keys, fixed[0])
            if self.scheme.pre_rope:
                keys = turn(keys, *self._angles(self._sinks + self._dropped, keys.shape[2]))
            values = dequantize(self._packed[1], self.scheme.values, fixed[1])
            parts.insert(1, (keys, values))
        keys, values = (
            torch.cat([part[i].to(self.dtype) for part in parts], dim=2) for i in (0, 1)
        )
        if self._padding is None or self._dropped:
            return keys, values
        order = self._original_order(self._padding, keys.shape[2])
        return keys.take_along_dim(order, 2), values.take_along_dim(order, 2)

    @property
    def _fixed(self) -> tuple[Tensor | None, Tensor | None]:
        """The scales of keys and values that calibration fixed."""
        return (None, None) if self._scales is None else (self._scales.keys, self._scales.values)

    def _angles(self, first: int, count: int) -> Pair:
        """cos and sin (batch or 1, 1, count, head_dim) of the tokens from index ``first`` on."""
        positions = torch.arange(first, first + count, device=self.device).unsqueeze(0)
        if self._padding is not None:
            positions = (positions - self._padding[:, None]).clamp(min=0)
        assert self._rotary is not None
        cos, sin = self._rotary(positions)
        return cos.float().unsqueeze(1), sin.float().unsqueeze(1)

    def _sinks_first(self, new: Pair) -> Pair:
        """Rows with their own first tokens in front of the padding, which repeats the last token of the row:
        it is never seen, and so it widens no group's range."""
        assert self._padding is not None
        padding = self._padding
        tokens = new[0].shape[2]
        most = int(padding.max())
        if most >= tokens:
            raise ValueError(f"the first piece has {tokens} tokens, {most} of a row are padding")
        self.sink_tokens = min(self.sink_tokens, tokens - most)
        index = torch.arange(tokens, device=self.device).expand(len(padding), -1)
        sinks, pad = self.sink_tokens, padding[:, None]
        order = torch.where(index < sinks, index + pad, index)
        order = torch.where((index >= sinks) & (index < sinks + pad), tokens - 1, order)
        order = order[:, None, :, None]
        return new[0].take_along_dim(order, 2), new[1].take_along_dim(order, 2)

    def _original_order(self, padding: Tensor, tokens: int) -> Tensor:
        """Where the token of each place of the row is stored; padding may be anything."""
        index = torch.arange(tokens, device=self.device)
        pad = padding[:, None]
        order = torch.where(index < pad + self.sink_tokens, (index - pad).clamp(min=0), index)
        return order[:, None, :, None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length - self._dropped + query_length, self._dropped

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return self.sliding_window or -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, if they are still in 16 bits. tokens_to_remove: their negative count."""
        count = abs(tokens_to_remove)
        recent = self._kept[0].shape[2] - self._sinks if self.is_initialized else 0
        if tokens_to_remove > 0 or count > recent:
            raise ValueError(f"{-tokens_to_remove} tokens cannot be taken back: they are packed")
        if count:
            keys, values = _part(self._kept, slice(0, -count))
            self._kept = (keys.clone(), values.clone())
            self._length -= count

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda part: part[indices.to(part.device)])

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the batch of everything that has one."""
        if not self.is_initialized:
            return
        self._kept = (change(self._kept[0]), change(self._kept[1]))
        if self._packed is not None:
            self._packed = (self._packed[0].map(change), self._packed[1].map(change))
        if self._padding is not None:
            self._padding = change(self._padding)


class PackedCache(Cache):
    """A cache of packed layers; give it to ``generate`` or a model as ``past_key_values``.

    Rows with padding on the left need ``attention_mask`` (batch, tokens), the mask of the prompt.
    """

    def __init__(
        self,
        config: Any,
        scheme: CacheScheme,
        *,
        dtype: torch.dtype = torch.bfloat16,
        scales: Sequence[Scales] | None = None,
        rotary: Rotary | None = None,
        attention_mask: Tensor | None = None,
    ):
        """config: of the transformers model; scales: of every layer, if the scheme is static. See
        ``PackedLayer`` for the others."""
        padding = None
        if attention_mask is not None and not attention_mask.bool().all():
            if not (attention_mask.long().diff(dim=1) >= 0).all():
                raise ValueError("attention_mask has gaps or padding on the right: pad on the left")
            padding = attention_mask.shape[1] - attention_mask.long().sum(1)
        super().__init__(
            layers=[
                PackedLayer(
                    scheme,
                    dtype=dtype,
                    scales=None if scales is None else scales[index],
                    rotary=rotary,
                    padding=padding,
                    sliding_window=window,
                )
                for index, window in enumerate(sliding_windows(config))
            ]
        )
        self.scheme = scheme

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that all layers hold."""
        return sum(layer.nbytes for layer in self.layers)

    def attend_packed(self) -> None:
        """Hand what is stored to the attention kernel, unread, whenever one token comes."""
        for layer in self.layers:
            layer.fused = True


def sliding_windows(config: Any) -> list[int | None]:
    """The sliding window of each layer of a transformers config, None where attention sees everything."""
    layers = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return [window] * layers
    return [window if kind == "sliding_attention" else None for kind in types]


def _cat(first: Pair, second: Pair) -> Pair:
    return torch.cat([first[0], second[0]], dim=2), torch.cat([first[1], second[1]], dim=2)


def _part(states: Pair, which: slice) -> Pair:
    return states[0][:, :, which], states[1][:, :, which]


@functools.lru_cache(maxsize=8)
def _counts(place: int, packed: int, sinks: int, device: torch.device) -> Tensor:
    """Made once for all layers that hold alike many."""
    return torch.tensor([place, packed, sinks], device=device)


def _halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def turn(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding (RoFormer, arXiv 2104.09864, in the half-split form of Llama)."""
    return keys * cos + _halves(keys) * sin


def unturn(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of ``turn``, whose angles may carry an attention factor."""
    return (keys * cos - _halves(keys) * sin) / (cos.square() + sin.square())
