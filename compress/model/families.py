"""What compressing must know of an architecture, as data: one entry a family, no code.

Names are local to a decoder block (``self_attn.q_proj``) or to the model (``model.layers``).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from compress.errors import UserError

# Layers that predict further tokens: models have one to three.
MOST_DRAFTS = 64
# Experts of a block that a file is believed to have.
MOST_EXPERTS = 2**16


@dataclass(frozen=True)
class Input:
    """Linears of a block that read one tensor, and what makes that tensor.

    linears: the readers, in the order in which they run
    source: the norm or linear whose output channels are the readers' input channels, so that a
        channel's scale can move from the readers into it; None if nothing can take it. Of a linear that
        makes more than these, the last ones.
    others: readers that keep 16 bits (routers): a scale moves out of them too

    pattern: the linears as the family names them, of one expert's input

    ``{}`` in a name stands for the number of an expert: there is one input an expert.
    """

    linears: tuple[str, ...]
    source: str | None
    others: tuple[str, ...] = ()
    pattern: tuple[str, ...] = ()

    def of_expert(self, number: int) -> Input:
        """That of one expert."""
        names = tuple(name.format(number) for name in self.linears)
        source = None if self.source is None else self.source.format(number)
        return replace(self, linears=names, source=source, pattern=self.linears)

    @property
    def routed(self) -> bool:
        """Whether it is an expert's, which reads the tokens that are sent to it."""
        return bool(self.pattern)


@dataclass(frozen=True)
class Experts:
    """The experts of a block, of whose MLPs a router sends each token to a few.

    mlp: the module that holds router and experts, by its name in checkpoints; module: its name in
        transformers, where that is another
    gate, up, down: the linears of one, behind ``{mlp}.experts.{number}.``
    packed: whether checkpoints hold all experts' weights in one tensor, (expert, in, out), the rows of gate
        and up in turn
    """

    mlp: str = "mlp"
    module: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    packed: bool = False


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
    # What config.json must say, for model types of which not all are alike: a key and its values.
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    # Of all kinds of its blocks: a block has those whose linears it holds.
    inputs: tuple[Input, ...] = ()
    # The linears that make queries and keys; their heads are turned by position in pairs of channels
    # (i, i + head size / 2).
    queries: str = ""
    keys: str = ""
    # The linear whose output heads attention averages as they are, so that a head can be rotated
    # if the reader of the averages is rotated back; and the linears that add to the residual stream.
    values: str = ""
    writers: tuple[str, ...] = ()
    # The linears whose output channels are the neurons of the MLP, and the one that reads these.
    neurons: tuple[str, ...] = ()
    mlp_output: str = ""
    # The linear that a block's attention ends with.
    attention_output: str = ""
    # Norms of every head of queries or keys, the same for all of them.
    head_norms: tuple[str, ...] = ()
    # Where compressed-tensors looks for the scales of a block's cache.
    attention: str = "self_attn"
    # How much of the inputs' spread SmoothQuant moves into the weights.
    smooth_alpha: float = 0.6
    # What norms add to their weights.
    norm_shift: float = 0.0
    experts: Experts | None = None
    # Linears that checkpoints hold as (in, out).
    transposed: tuple[str, ...] = ()
    # What checkpoints may leave out in front of all names, and the ends of names that they may hold and
    # nobody needs: tables that follow from the config.
    base: str = ""
    derived: tuple[str, ...] = ()
    # How names begin of layers that predict further tokens, which no engine needs to decode; and the key of
    # config.json that says how many of them stand behind the last block.
    drafts: tuple[str, ...] = ()
    draft_blocks: str = ""
    # Sizes by the names that config.json has for them, where those are others than Llama's.
    settings: Mapping[str, str] = field(default_factory=dict)
    # The ends of names of tensors that stay in 32 bits in models of 16.
    wide: tuple[str, ...] = ()
    # Whether transformers computes with the weights of linears by itself, so that it must unpack them first.
    open_weights: bool = False
    # Whether head and embedding are one matrix where config.json does not say.
    tied: bool = False
    # Whether a block returns its hidden states as the first of several.
    tuples: bool = False
    # Whether logits are the head's products alone, neither capped nor scaled.
    plain_logits: bool = True
    # What does not apply to it, and why.
    refuses: Mapping[str, str] = field(default_factory=dict)
    # Model types whose readers take the head size to be hidden size / heads.
    twins: Mapping[str, Twin] = field(default_factory=dict)
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    # What transformers calls it, where that is another name.
    head_module: str = "lm_head"
    rotary: str = "model.rotary_emb"
    # Of one that a person added, the file that says so.
    file: str = field(default="", compare=False)

    def why_not(self, what: str) -> str | None:
        """Why something (a key of ``refuses``) does not apply to it; None if it does."""
        if what in OF_LOGITS and not self.plain_logits:
            return NO_LOGITS
        return self.refuses.get(what)

    @property
    def attention_logits(self) -> tuple[str, ...]:
        """Linears whose output goes through the softmax."""
        return self.queries, self.keys

    @property
    def head_names(self) -> tuple[str, ...]:
        """What checkpoints and transformers call the head."""
        return tuple(dict.fromkeys((self.head, self.head_module)))

    @property
    def mlp_norm(self) -> str:
        """The norm before the MLP: what enters it is the residual stream behind attention."""
        (source,) = (s.source for s in self.inputs if s.linears == self.neurons)
        assert source is not None
        return source

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears that get quantized, in the order in which they run, as its inputs name them."""
        return tuple(name for shared in self.inputs for name in shared.linears)

    def inputs_in(self, names: Iterable[str]) -> tuple[Input, ...]:
        """The inputs of a block that holds these linears, in the order in which they run."""
        return _inputs_in(self.inputs, frozenset(names))

    def drafts_of(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """How names begin of what predicts further tokens, by a config.json."""
        blocks, drafts = config.get("num_hidden_layers"), config.get(self.draft_blocks)
        if type(blocks) is not int or type(drafts) is not int:
            return self.drafts
        behind = range(blocks, blocks + min(drafts, MOST_DRAFTS))
        return *self.drafts, *(f"{self.blocks}.{index}." for index in behind)

    def linears_in(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of these linears that get quantized, in the order in which they run."""
        return tuple(name for shared in self.inputs_in(names) for name in shared.linears)


def _has_expert(pattern: str, held: frozenset[str], number: int) -> bool:
    return pattern.format(number) in held


@functools.lru_cache(maxsize=256)
def _inputs_in(inputs: tuple[Input, ...], held: frozenset[str]) -> tuple[Input, ...]:
    found = []
    for shared in inputs:
        if "{}" in shared.linears[0]:
            numbers = itertools.takewhile(
                functools.partial(_has_expert, shared.linears[0], held), itertools.count()
            )
            found += [shared.of_expert(number) for number in numbers]
        elif linears := tuple(name for name in shared.linears if name in held):
            found.append(replace(shared, linears=linears))
    return tuple(found)


# Why stages, the search for bits, the rounding gptaq, formats, the prediction of speed (``plan``) and the
# decode engine (``decoder``) do not apply to a family.
NO_ENGINE = (
    "its blocks are not of the form that the decode engine runs: choose transformers or vllm"
)
NO_CUT = "which of its parts belong together is not known"
NO_LOGITS = "its logits are not its head's products alone"
# What computes logits block by block, with the head by itself.
OF_LOGITS = ("search", "repair", "distill")
POST_NORMS = {
    "rotate": "the norms behind its attention and MLP weigh single channels of the residual stream",
    "prune": "the norms behind its attention and MLP weigh what is left of a cut",
    "decoder": NO_ENGINE,
}
LAYER_NORMS = {
    "rotate": "its norms subtract a mean, which a rotation changes",
    "prune": NO_CUT,
    "decoder": NO_ENGINE,
}
IN_ONE = "transformers holds all experts in one tensor, which bitsandbytes does not read"
FUSED = LAYER_NORMS | {"rotate": "its queries, keys and values are one linear"}
OWN_WAYS = "the original and the compressed model send tokens to experts each by itself"
ROUTED = {
    "gptaq": OWN_WAYS,
    "bitsandbytes": IN_ONE,
    "rotate": "its routers read the residual stream too",
    "prune": "its MLPs are many, and a router chooses among them",
    "decoder": NO_ENGINE,
}
LATENT = ROUTED | dict.fromkeys(
    ("kv_cache", "plan"), "its cache holds latent vectors, not keys and values"
)
RECURRENT = {
    "rotate": "its blocks are not all attention",
    "prune": "its blocks are not all attention",
    "kv_cache": "its blocks are not all attention",
    "plan": "its blocks are not all attention",
    "decoder": NO_ENGINE,
}
PACKED = Experts(packed=True)
FEED_FORWARD = Experts("feed_forward", "feed_forward")
BLOCK_SPARSE = Experts("block_sparse_moe", "mlp", "w1", "w3", "w2")

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


def _llama_like(name: str, *model_types: str, **changes: Any) -> Family:
    """A family that differs from Llama's in these fields alone; it has no twins."""
    return replace(LLAMA, name=name, model_types=model_types, twins={}, **changes)


def _attention(source: str | None = "input_layernorm") -> tuple[Input, Input]:
    """Llama's attention, behind a norm or none."""
    return replace(LLAMA.inputs[0], source=source), LLAMA.inputs[1]


def _mlp(source: str | None = "post_attention_layernorm", path: str = "mlp") -> tuple[Input, Input]:
    """A gated MLP behind a norm or none."""
    gate, up, down = (f"{path}.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
    return Input((gate, up), source), Input((down,), up)


def _experts(
    source: str, names: Experts, *routers: str, scalable: bool = True
) -> tuple[Input, Input]:
    """Experts behind a norm that their routers read too. scalable: whether what gate and up make scales
    with up"""
    gate, up, down = (
        f"{names.mlp}.experts.{{}}.{name}" for name in (names.gate, names.up, names.down)
    )
    others = tuple(f"{names.mlp}.{name}" for name in routers)
    return Input((gate, up), source, others), Input((down,), up if scalable else None)


# Queries and keys pass a norm of their own: a scale of these stays where it is.
QWEN3 = _llama_like(
    "qwen3",
    "qwen3",
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    refuses={"decoder": NO_ENGINE},
)
# Some blocks do not turn their heads by position.
SMOLLM3 = _llama_like("smollm3", "smollm3", tied=True, refuses={"decoder": NO_ENGINE})
# Norms before and behind attention and MLP.
GEMMA3 = _llama_like(
    "gemma3",
    "gemma3_text",
    inputs=(*_attention(), *_mlp("pre_feedforward_layernorm")),
    norm_shift=1.0,
    tied=True,
    refuses=POST_NORMS,
)
GEMMA2 = replace(GEMMA3, name="gemma2", model_types=("gemma2",), plain_logits=False)
# Norms behind attention and MLP alone: these read the residual stream, which nothing may scale.
OLMO2 = _llama_like(
    "olmo2",
    "olmo2",
    inputs=(*_attention(None), *_mlp(None)),
    refuses=POST_NORMS,
)
PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    inputs=(
        Input(("self_attn.qkv_proj",), "input_layernorm"),
        Input(("self_attn.o_proj",), None),
        Input(("mlp.gate_up_proj",), "post_attention_layernorm"),
        Input(("mlp.down_proj",), "mlp.gate_up_proj"),
    ),
    attention_output="self_attn.o_proj",
    writers=("self_attn.o_proj", "mlp.down_proj"),
    mlp_output="mlp.down_proj",
    refuses=FUSED,
)
GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    inputs=(
        Input(("attention.query_key_value",), "input_layernorm"),
        Input(("attention.dense",), None),
        Input(("mlp.dense_h_to_4h",), "post_attention_layernorm"),
        Input(("mlp.dense_4h_to_h",), None),
    ),
    attention_output="attention.dense",
    attention="attention",
    writers=("attention.dense", "mlp.dense_4h_to_h"),
    mlp_output="mlp.dense_4h_to_h",
    blocks="gpt_neox.layers",
    embedding="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    head="embed_out",
    head_module="lm_head",
    rotary="gpt_neox.rotary_emb",
    derived=(".attention.bias", ".attention.masked_bias"),
    refuses=FUSED,
)
OPT = Family(
    name="opt",
    model_types=("opt",),
    inputs=(
        Input(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn_layer_norm"),
        Input(("self_attn.out_proj",), "self_attn.v_proj"),
        Input(("fc1",), "final_layer_norm"),
        # ReLU of a scaled number is the scaled ReLU.
        Input(("fc2",), "fc1"),
    ),
    queries="self_attn.q_proj",
    keys="self_attn.k_proj",
    values="self_attn.v_proj",
    writers=("self_attn.out_proj", "fc2"),
    neurons=("fc1",),
    mlp_output="fc2",
    attention_output="self_attn.out_proj",
    when=(
        ("do_layer_norm_before", (None, True)),
        ("activation_function", (None, "relu")),
        ("layer_norm_elementwise_affine", (None, True)),
        ("_remove_final_layer_norm", (None, False)),
    ),
    smooth_alpha=0.5,
    blocks="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    final_norm="model.decoder.final_layer_norm",
    rotary="",
    base="model.",
    tied=True,
    settings={"intermediate_size": "ffn_dim"},
    refuses=LAYER_NORMS,
)
FALCON = Family(
    name="falcon",
    model_types=("falcon",),
    inputs=(
        Input(("self_attention.query_key_value", "mlp.dense_h_to_4h"), "input_layernorm"),
        Input(("self_attention.dense",), None),
        Input(("mlp.dense_4h_to_h",), None),
    ),
    attention_output="self_attention.dense",
    attention="self_attention",
    writers=("self_attention.dense", "mlp.dense_4h_to_h"),
    mlp_output="mlp.dense_4h_to_h",
    blocks="transformer.h",
    embedding="transformer.word_embeddings",
    final_norm="transformer.ln_f",
    rotary="transformer.rotary_emb",
    settings={"intermediate_size": "", "num_key_value_heads": "num_kv_heads"},
    tuples=True,
    open_weights=True,
    tied=True,
    refuses=FUSED
    | {"bitsandbytes": "its linears are of a class that bitsandbytes does not replace"},
)
# Of 40B and 180B.
FALCON_TWO_NORMS = replace(
    FALCON,
    name="falcon with two norms",
    when=(("new_decoder_architecture", (True,)), ("num_ln_in_parallel_attn", (None, 2))),
    inputs=(
        Input(("self_attention.query_key_value",), "ln_attn"),
        Input(("self_attention.dense",), None),
        Input(("mlp.dense_h_to_4h",), "ln_mlp"),
        Input(("mlp.dense_4h_to_h",), None),
    ),
)
# Of RW: attention and MLP one behind the other.
FALCON_SERIAL = replace(
    FALCON,
    name="falcon in series",
    when=(("parallel_attn", (False,)), ("new_decoder_architecture", (None, False))),
    inputs=(
        Input(("self_attention.query_key_value",), "input_layernorm"),
        Input(("self_attention.dense",), None),
        Input(("mlp.dense_h_to_4h",), "post_attention_layernorm"),
        Input(("mlp.dense_4h_to_h",), None),
    ),
)
MIXTRAL = _llama_like(
    "mixtral",
    "mixtral",
    inputs=(
        *_attention(),
        *_experts("post_attention_layernorm", BLOCK_SPARSE, "gate"),
    ),
    writers=("self_attn.o_proj", "block_sparse_moe.experts.{}.w2"),
    neurons=(),
    mlp_output="",
    experts=BLOCK_SPARSE,
    refuses=ROUTED,
)
QWEN_MOE = _llama_like(
    "qwen_moe",
    "qwen2_moe",
    "qwen3_moe",
    inputs=(
        *_attention(),
        # Some blocks have a plain MLP.
        *_mlp(),
        *_mlp(path="mlp.shared_expert"),
        *_experts("post_attention_layernorm", Experts(), "gate", "shared_expert_gate"),
    ),
    writers=(
        *LLAMA.writers,
        "mlp.shared_expert.down_proj",
        "mlp.experts.{}.down_proj",
    ),
    neurons=(),
    mlp_output="",
    experts=Experts(),
    refuses=ROUTED,
)
DEEPSEEK = Family(
    name="deepseek",
    model_types=("deepseek_v2", "deepseek_v3"),
    inputs=(
        Input(
            ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
            "input_layernorm",
        ),
        Input(("self_attn.q_b_proj",), "self_attn.q_a_layernorm"),
        Input(("self_attn.kv_b_proj",), "self_attn.kv_a_layernorm"),
        Input(("self_attn.o_proj",), None),
        *_mlp(),
        *_experts("post_attention_layernorm", Experts(), "gate"),
        *_mlp(path="mlp.shared_experts"),
    ),
    attention_output="self_attn.o_proj",
    writers=(
        *LLAMA.writers,
        "mlp.shared_experts.down_proj",
        "mlp.experts.{}.down_proj",
    ),
    experts=Experts(),
    draft_blocks="num_nextn_predict_layers",
    wide=(".e_score_correction_bias",),
    refuses=LATENT,
)
MAMBA2 = Family(
    name="mamba2",
    model_types=("mamba2",),
    inputs=(Input(("mixer.in_proj",), "norm"), Input(("mixer.out_proj",), "mixer.norm")),
    writers=("mixer.out_proj",),
    open_weights=True,
    blocks="backbone.layers",
    embedding="backbone.embeddings",
    final_norm="backbone.norm_f",
    rotary="",
    settings={"intermediate_size": "", "num_attention_heads": "num_heads"},
    refuses=RECURRENT,
)

GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    inputs=(
        Input(("attn.c_attn",), "ln_1"),
        # The last of what c_attn makes are the values.
        Input(("attn.c_proj",), "attn.c_attn"),
        Input(("mlp.c_fc",), "ln_2"),
        Input(("mlp.c_proj",), None),
    ),
    attention_output="attn.c_proj",
    attention="attn",
    writers=("attn.c_proj", "mlp.c_proj"),
    mlp_output="mlp.c_proj",
    transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    blocks="transformer.h",
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
    rotary="",
    base="transformer.",
    derived=(".attn.bias", ".attn.masked_bias"),
    tied=True,
    settings={
        "hidden_size": "n_embd",
        "intermediate_size": "",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    refuses=FUSED
    | {
        "bitsandbytes": "its checkpoints hold weights as (in, out), which bitsandbytes does not read"
    },
)
GPT_OSS = _llama_like(
    "gpt_oss",
    "gpt_oss",
    inputs=(
        *_attention(),
        *_experts("post_attention_layernorm", PACKED, "router", scalable=False),
    ),
    writers=("self_attn.o_proj", "mlp.experts.{}.down_proj"),
    neurons=(),
    mlp_output="",
    experts=PACKED,
    refuses=ROUTED | {"distill": "its checkpoints hold all experts in one tensor"},
)
JAMBA = Family(
    name="jamba",
    model_types=("jamba",),
    inputs=(
        *_attention(),
        Input(("mamba.in_proj",), "input_layernorm"),
        Input(("mamba.x_proj",), None),
        Input(("mamba.out_proj",), None),
        *_mlp("pre_ff_layernorm", "feed_forward"),
        *_experts("pre_ff_layernorm", FEED_FORWARD, "router"),
    ),
    attention_output="self_attn.o_proj",
    writers=(
        "self_attn.o_proj",
        "mamba.out_proj",
        "feed_forward.down_proj",
        "feed_forward.experts.{}.down_proj",
    ),
    experts=FEED_FORWARD,
    final_norm="model.final_layernorm",
    rotary="",
    refuses=RECURRENT | {"bitsandbytes": IN_ONE, "gptaq": OWN_WAYS},
)
QWEN3_NEXT = Family(
    name="qwen3_next",
    model_types=("qwen3_next",),
    inputs=(
        *_attention(),
        Input(("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"), "input_layernorm"),
        Input(("linear_attn.out_proj",), None),
        *_mlp(),
        *_mlp(path="mlp.shared_expert"),
        *_experts("post_attention_layernorm", Experts(), "gate", "shared_expert_gate"),
    ),
    attention_output="self_attn.o_proj",
    writers=(
        *LLAMA.writers,
        "linear_attn.out_proj",
        "mlp.shared_expert.down_proj",
        "mlp.experts.{}.down_proj",
    ),
    norm_shift=1.0,
    experts=Experts(),
    drafts=("mtp.",),
    refuses=RECURRENT | {"bitsandbytes": IN_ONE, "gptaq": OWN_WAYS},
)

FAMILIES = (
    LLAMA, QWEN3, SMOLLM3, GEMMA2, GEMMA3, OLMO2, PHI3, GPT_NEOX, OPT, GPT2, FALCON_TWO_NORMS, FALCON_SERIAL,
    FALCON, MIXTRAL, QWEN_MOE, GPT_OSS, DEEPSEEK, MAMBA2, JAMBA, QWEN3_NEXT,
)  # fmt: skip


def linears_among(names: Iterable[str], family: Family) -> list[str]:
    """The linears of decoder blocks among the tensors of a model, without suffix, in their order."""
    held: dict[str, list[str]] = {}
    for name in names:
        if name.startswith(f"{family.blocks}.") and name.endswith(".weight"):
            number, _, local = name[len(family.blocks) + 1 : -len(".weight")].partition(".")
            held.setdefault(number, []).append(local)
    wanted = {
        f"{family.blocks}.{number}.{local}"
        for number, inner in held.items()
        for local in family.linears_in(inner)
    }
    return [base for name in names if (base := name.removesuffix(".weight")) in wanted]


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json. Raises UserError, with the known ones, if there is none."""
    model_type = config.get("model_type")
    families = list(FAMILIES)
    found = [family for family in families if model_type in family.model_types]
    if not found:
        # Here, not above: what reads files knows of families. No file says anything of a type above.
        from compress.model.added import added

        families += added()
        found = [family for family in families if model_type in family.model_types]
    for family in found:
        if all(config.get(key) in values for key, values in family.when):
            return family
    if found:
        key = next(key for key, values in found[-1].when if config.get(key) not in values)
        raise UserError(
            f"models of type {model_type!r} with {key}={config.get(key)} are not known here"
        )
    known = ", ".join(dict.fromkeys(t for family in families for t in family.model_types))
    raise UserError(
        f"model type {model_type!r} is not known here: known are {known}; compress families --probe FOLDER "
        "--add adds one"
    )


def check_applies(what: str, config: dict[str, Any]) -> Family:
    """The family of a config.json. Raises UserError if something (a key of ``refuses``) is not for it."""
    family = family_of(config)
    if (reason := family.why_not(what)) is not None:
        raise UserError(f"{what} does not apply to models of type {config['model_type']}: {reason}")
    return family


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether head and embedding are one matrix, by a config.json."""
    stated = config.get("tie_word_embeddings")
    if stated is not None:
        return bool(stated)
    try:
        return family_of(dict(config)).tied
    except UserError:
        return False


def has_logits_of_head(config: dict[str, Any]) -> bool:
    """Whether logits are the head's products alone, neither capped nor scaled."""
    return family_of(config).plain_logits


def turned_over(config: dict[str, Any]) -> tuple[str, ...]:
    """The ends of names of weights that checkpoints of this config hold as (in, out)."""
    return tuple(f".{name}.weight" for name in family_of(config).transposed)


def size_of(name: str, config: Mapping[str, Any]) -> int:
    """A size by Llama's name for it, from a config.json that may have another."""
    return int(config[_key(name, config)])


def limit_of(config: Mapping[str, Any]) -> int | None:
    """The tokens of a sequence that a model takes, as far as its config.json says."""
    return config.get(_key("max_position_embeddings", config))


def heads_of(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Heads of queries, heads of keys and values, channels of one, by a config.json with attention."""
    heads = size_of("num_attention_heads", config)
    shared = config.get(_key("num_key_value_heads", config)) or heads
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        # Whatever the number beside it.
        shared = 1
    size = config.get("head_dim") or size_of("hidden_size", config) // heads
    return heads, int(shared), int(size)


def _key(name: str, config: Mapping[str, Any]) -> str:
    try:
        settings = family_of(dict(config)).settings
    except UserError:
        # Most have Llama's.
        return name
    return settings.get(name) or name
