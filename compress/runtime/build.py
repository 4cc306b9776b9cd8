"""From the files of a checkpoint to the network of the engine, weight by weight: each is read, arranged for
its kernel on the device, and let go before the next, so that there are never two copies of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding

from compress.errors import UserError
from compress.kernels.fusion import Fusion
from compress.kv_cache.cache import sliding_windows
from compress.model.families import Family, family_of
from compress.model.folder import Shapes, reading
from compress.model.skeleton import check_tensor, model_of
from compress.quantize.qtensor import QTensor, stack
from compress.runtime.embedding import packed_embedding
from compress.runtime.network import Block, Heads, Linear, Network
from compress.runtime.weights import PackedWeight, Side, pack, pack_dense, unpacked

ACTIVATION = "silu"
# Rotary embeddings whose frequencies depend on how long the text is.
GROWING = ("dynamic", "longrope")


class Source(Protocol):
    """Where weights come from: the files of a folder, or random numbers in its shapes."""

    @property
    def folder(self) -> Shapes: ...
    def get(self, name: str) -> Tensor | QTensor: ...


class Builder:
    """Reads weights and arranges them; counts the linears by the kernel that runs them."""

    def __init__(self, source: Source, model: Any, device: torch.device):
        """model: the empty one of transformers, for its shapes"""
        self.source, self.model, self.device = source, model, device
        self.dtype = source.folder.dtype
        self.kernels: Counter[str] = Counter()

    def get(self, name: str) -> Tensor | QTensor:
        """A weight as it is stored. Raises UserError if its shape is not that of the model."""
        value = self.source.get(name)
        check_tensor(self.model, name, tuple(value.shape), self.source.folder)
        return value

    def tensor(self, name: str) -> Tensor:
        """A vector of the model, on the device."""
        value = self.get(name)
        assert isinstance(value, Tensor), name
        return value.to(self.device, self.dtype, copy=True)

    def weight(self, names: Sequence[str]) -> PackedWeight:
        """The weights of linears that read the same inputs, as one if a kernel can run them so."""
        found = [self.get(f"{name}.weight") for name in names]
        merged = _merged(found)
        if merged is not None:
            return self.arrange(merged, len(names))
        return Side([self.arrange(value, 1) for value in found])

    def arrange(self, value: Tensor | QTensor, count: int) -> PackedWeight:
        """count: linears of the checkpoint that this is"""
        if isinstance(value, Tensor):
            # A copy: what was read from a file may be a view of its memory map.
            return self.keep(value.to(self.device, self.dtype, copy=True), count)
        found = pack(value, self.device, self.dtype)
        name, weight = found or unpacked(value, self.device, self.dtype)
        self.kernels[name] += count
        return weight

    def keep(self, value: Tensor, count: int) -> PackedWeight:
        """A weight of 16 bits on the device, as it is."""
        name, weight = pack_dense(value)
        self.kernels[name] += count
        return weight

    def bias(self, names: Sequence[str]) -> Tensor | None:
        """The biases of linears one after the other, 0 for those without; None if none has one."""
        names = [f"{name}.bias" for name in names]
        if not any(name in self.source.folder for name in names):
            return None
        missing = [name for name in names if name not in self.source.folder]
        if missing:
            raise UserError(
                f"{self.source.folder.path} holds no tensor {missing[0]}: biases of linears that are read "
                "together go together"
            )
        return torch.cat([self.tensor(name) for name in names])

    def linear(
        self, names: Sequence[str], norm: str | None, *, eps: float, gated: bool = False
    ) -> Linear:
        """Linears that read the same inputs, with the norm before them."""
        weight = None if norm is None else self.tensor(f"{norm}.weight")
        return Linear(self.weight(names), Fusion(weight, eps, self.bias(names), gated))


def _merged(found: Sequence[Tensor | QTensor]) -> Tensor | QTensor | None:
    if len(found) == 1:
        return found[0]
    quantized = [value for value in found if isinstance(value, QTensor)]
    if len(quantized) == len(found):
        return stack(quantized)
    plain = [value for value in found if isinstance(value, Tensor)]
    return torch.cat(plain) if len(plain) == len(found) else None


def build(source: Source, device: torch.device) -> tuple[Network, dict[str, int]]:
    """The network of a checkpoint, and how many of its linears, the head included, run through which kernel.

    Raises UserError for a model whose blocks are not of this form.
    """
    with reading(source.folder.path):
        family = family_of(source.folder.config)
    try:
        model = model_of(source.folder.config, source.folder.dtype)
    except ValueError as error:
        raise UserError(f"{source.folder.path}/config.json is not usable: {error}") from error
    config = model.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in GROWING:
        raise UserError(
            f"{source.folder.path}: rope_type={rope!r} is not run by the decode engine: its angles depend on "
            "the text's length"
        )
    if config.hidden_act != ACTIVATION:
        raise UserError(
            f"{source.folder.path}: hidden_act={config.hidden_act!r} is not run by the decode engine: it "
            f"knows {ACTIVATION}"
        )
    builder = Builder(source, model, device)
    eps = config.rms_norm_eps
    blocks = [
        _block(builder, family, f"{family.blocks}.{index}", eps)
        for index in range(config.num_hidden_layers)
    ]
    embed, head = _ends(builder, family)
    norm = Fusion(builder.tensor(f"{family.final_norm}.weight"), eps)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = Heads(
        config.num_attention_heads,
        config.num_key_value_heads,
        size,
        size**-0.5,
        sliding_windows(config),
    )
    rotary = model.get_submodule(family.rotary).to(device)
    return Network(embed, blocks, Linear(head, norm), heads, Rotary(rotary)), dict(builder.kernels)


class Rotary:
    """The angles of a model: positions int64 (batch, n) -> cos and sin float32 (batch, n, head_dim)."""

    def __init__(self, module: Any):
        self._module = module

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._module(torch.zeros(1, device=positions.device), positions)
        return cos, sin


def _block(builder: Builder, family: Family, block: str, eps: float) -> Block:
    def linear(names: Sequence[str], *, gated: bool = False) -> Linear:
        (norm,) = (i.source for i in family.inputs if i.linears == tuple(names))
        full = None if norm is None or norm in family.linears else f"{block}.{norm}"
        return builder.linear([f"{block}.{name}" for name in names], full, eps=eps, gated=gated)

    assert family.attention_output is not None
    return Block(
        qkv=linear((family.queries, family.keys, family.values)),
        attention_output=linear((family.attention_output,)),
        gate_up=linear(family.neurons, gated=True),
        mlp_output=linear((family.mlp_output,)),
    )


def _ends(builder: Builder, family: Family) -> tuple[Any, PackedWeight]:
    """The embedding, tokens -> rows, and the head's weight."""
    source = builder.source
    value = builder.get(f"{family.embedding}.weight")
    if isinstance(value, QTensor):
        tied = builder.arrange(value, 1) if source.folder.tied_head else None
        embed = packed_embedding(value, tied, builder.device, builder.dtype)
        return embed, tied or builder.weight([family.head])
    table = value.to(builder.device, builder.dtype, copy=True)
    head = builder.keep(table, 1) if source.folder.tied_head else builder.weight([family.head])
    return lambda tokens: embedding(tokens, table), head
