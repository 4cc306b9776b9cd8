"""What compressing must know of an architecture, as data: one entry a family, no code.

Names are local to a decoder block (``self_attn.q_proj``) or to the model (``model.layers``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compress.errors import UserError


@dataclass(frozen=True)
class Input:
    """Linears of a block that read one tensor, and what makes that tensor.

    linears: the readers, in the order in which they run
    source: the norm or linear whose output channels are the readers' input channels, so that a
        channel's scale can move from the readers into it; None if nothing can take it
    """

    linears: tuple[str, ...]
    source: str | None


@dataclass(frozen=True)
class Twin:
    """Another model type that computes the same function, for sizes that readers of the first refuse.

    settings: keys of config.json that make it so; zeros: biases it has and the first has not, as linears
    """

    model_type: str
    architecture: str
    settings: Mapping[str, Any]
    zeros: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """An architecture whose decoder blocks have these parts."""

    name: str
    model_types: tuple[str, ...]
    inputs: tuple[Input, ...]
    # The linears that make queries and keys; their heads are turned by position in pairs of channels
    # (i, i + head size / 2).
    queries: str
    keys: str
    # The linear whose output heads attention averages as they are, so that a head can be rotated
    # if the reader of the averages is rotated back; and the linears that add to the residual stream.
    values: str
    writers: tuple[str, ...]
    # The linears whose output channels are the neurons of the MLP, and the one that reads these.
    neurons: tuple[str, ...]
    mlp_output: str
    # The linear that a block's attention ends with, if it has one.
    attention_output: str | None
    # Where compressed-tensors looks for the scales of a block's cache.
    attention: str
    # How much of the inputs' spread SmoothQuant moves into the weights.
    smooth_alpha: float
    # Model types whose readers take the head size to be hidden size / heads.
    twins: Mapping[str, Twin] = field(default_factory=dict)
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str = "model.rotary_emb"

    @property
    def attention_logits(self) -> tuple[str, ...]:
        """Linears whose output goes through the softmax."""
        return self.queries, self.keys

    @property
    def mlp_norm(self) -> str:
        """The norm before the MLP: what enters it is the residual stream behind attention."""
        (source,) = (s.source for s in self.inputs if s.linears == self.neurons)
        assert source is not None
        return source

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears of a block that get quantized, in the order in which they run."""
        return tuple(name for shared in self.inputs for name in shared.linears)


LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2"),
    inputs=(
        Input(
            linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            source="input_layernorm",
        ),
        Input(linears=("self_attn.o_proj",), source="self_attn.v_proj"),
        Input(linears=("mlp.gate_proj", "mlp.up_proj"), source="post_attention_layernorm"),
        Input(linears=("mlp.down_proj",), source="mlp.up_proj"),
    ),
    queries="self_attn.q_proj",
    keys="self_attn.k_proj",
    values="self_attn.v_proj",
    writers=("self_attn.o_proj", "mlp.down_proj"),
    neurons=("mlp.gate_proj", "mlp.up_proj"),
    mlp_output="mlp.down_proj",
    attention_output="self_attn.o_proj",
    attention="self_attn",
    smooth_alpha=0.6,
    # vLLM's Qwen2 divides, its Llama reads head_dim; Llama's attention biases include one that Qwen2 lacks.
    twins={
        "qwen2": Twin(
            "llama", "LlamaForCausalLM", {"attention_bias": True}, zeros=("self_attn.o_proj",)
        )
    },
)

FAMILIES = (LLAMA,)


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json. Raises UserError, with the known ones, if there is none."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(t for family in FAMILIES for t in family.model_types)
    raise UserError(f"model type {model_type!r} is not known here: known are {known}")
