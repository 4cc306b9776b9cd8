"""What a GGUF file says of a model beside its weights and tokenizer, and which models llama.cpp runs.

Read from llama.cpp's sources of 2026 (src/models/*.cpp, llama-model.cpp, llama-context.cpp) and its converter
(conversion/*.py); what was not found there was tried with the wheel xllamacpp 2026.10.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.errors import UserError
from compress.kv_cache.cache import sliding_windows
from compress.model.families import family_of, heads_of
from compress.model.gguf_file import ARCHITECTURES, DERIVED, OF_BLOCK, Heads
from compress.model.skeleton import model_of

log = logging.getLogger(__name__)
SILU, TANH_GELU = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
# The one by the error function, in whose place llama.cpp's graphs have the one by tanh.
GELU = "gelu"
PLAIN_ROPES = ("default", "linear", "yarn")
UNBIASED = {"attention_bias": (False,)}
# Every block has experts.
SPARSE: dict[str, tuple[Any, ...]] = {"mlp_only_layers": (None, []), "decoder_sparse_step": (1,)}
# Layers of the sizes of Gemma that scale queries by hidden size / heads, not by the head's.
GEMMA_27B = {"gemma2": 46, "gemma3": 62}


@dataclass(frozen=True)
class Graph:
    """What llama.cpp's graph of an architecture computes, where models of one type differ.

    activations: of the MLP
    ropes: kinds of rotary embeddings; part: whether of a part of each head too
    windows: whether layers of sliding windows take turns with those that see all tokens
    settings: keys of the config, and the values that are computed
    capped: keys of caps of logits that must be there
    tied: whether the head must be the embedding, or must not; None: either
    square: whether heads must be as wide together as the residual stream
    """

    activations: tuple[str, ...] = SILU
    ropes: tuple[str, ...] = PLAIN_ROPES
    part: bool = False
    windows: bool = False
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    capped: tuple[str, ...] = ()
    tied: bool | None = None
    square: bool = False


GRAPHS = {
    "llama": Graph(ropes=(*PLAIN_ROPES, "llama3")),
    "qwen2": Graph(),
    "qwen3": Graph(settings=UNBIASED),
    # Every fourth layer does not turn its heads by position.
    "smollm3": Graph(settings={**UNBIASED, "mlp_bias": (False,)}),
    "gemma2": Graph(
        TANH_GELU,
        windows=True,
        settings={**UNBIASED, "use_bidirectional_attention": (None, False)},
        capped=("attn_logit_softcapping", "final_logit_softcapping"),
        tied=True,
    ),
    "gemma3": Graph(
        TANH_GELU,
        windows=True,
        settings={
            **UNBIASED,
            "use_bidirectional_attention": (None, False),
            "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,),
        },
        tied=True,
    ),
    "olmo2": Graph(settings=UNBIASED, tied=False, square=True),
    "phi3": Graph(ropes=("default", "longrope"), part=True, square=True),
    "qwen2moe": Graph(settings={**SPARSE, "norm_topk_prob": (False,)}, tied=False, square=True),
    "qwen3moe": Graph(settings={**UNBIASED, **SPARSE, "norm_topk_prob": (True,)}),
    "gptneox": Graph(
        (*TANH_GELU, GELU), part=True, settings={"attention_bias": (True,)}, tied=False
    ),
    "gpt2": Graph(
        TANH_GELU,
        settings={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
    ),
    "falcon": Graph((*TANH_GELU, GELU), settings={"alibi": (False,), "bias": (False,)}),
}
# general.file_type by the type of most weights.
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11,
    "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "BF16": 32, "MXFP4": 38,
}  # fmt: skip
# How keys of the config are told, of models that have them.
TOLD = {
    "num_hidden_layers": "add_block_count",
    "max_position_embeddings": "add_context_length",
    "hidden_size": "add_embedding_length",
    "rms_norm_eps": "add_layer_norm_rms_eps",
    "layer_norm_eps": "add_layer_norm_eps",
    "layer_norm_epsilon": "add_layer_norm_eps",
    "use_parallel_residual": "add_parallel_residual",
    "attn_logit_softcapping": "add_attn_logit_softcapping",
    "final_logit_softcapping": "add_final_logit_softcapping",
    "num_experts": "add_expert_count",
    "num_experts_per_tok": "add_expert_used_count",
    "moe_intermediate_size": "add_expert_feed_forward_length",
    "shared_expert_intermediate_size": "add_expert_shared_feed_forward_length",
    "vocab_size": "add_vocab_size",
}
# Where config.json tells what a model was called.
NAMES = ("_name_or_path", "_model_name_or_path")
# What llama.cpp looks for in that, to treat these tokens as Phi-3 does; without them it does not load.
PHI3, PHI3_TOKENS = ("phi-3", "phi3"), {"</s>", "<unk>", "<s>", "<|endoftext|>"}


def stored_heads(config: Any) -> Heads:
    """Of the config of ``check_model``."""
    queries, keys, _ = heads_of(config.to_dict())
    return Heads(ARCHITECTURES[config.model_type], queries, keys)


def _activation(config: Any) -> str:
    """By any of its keys."""
    keys = ("hidden_activation", "hidden_act", "activation_function", "activation")
    return str(next(value for key in keys if (value := getattr(config, key, None)) is not None))


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Kind and numbers of the rotary embedding: ``rope_type``, ``rope_theta``, what goes with the kind; then
    that of layers with sliding windows, if they have their own; none where positions are learned."""
    found: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    if "full_attention" in found:
        return [dict(found["full_attention"]), dict(found["sliding_attention"])]
    return [found] if found else []


def _feed_forward(config: Any) -> int:
    """The width of the MLP."""
    keys = ("intermediate_size", "ffn_hidden_size", "n_inner")
    stated = next((value for key in keys if (value := getattr(config, key, None))), None)
    return int(stated or 4 * config.hidden_size)


def _period(windows: list[int | None]) -> int | None:
    """How many layers it takes until one sees all tokens, one more than there are if none does; None if that
    is not always as many, or all do."""
    for period in range(2, len(windows) + 2):
        if all(
            (window is not None) == (layer % period < period - 1)
            for layer, window in enumerate(windows)
        ):
            return period
    return None


def check_model(settings: dict[str, Any], path: Path) -> Any:
    """The transformers config of a model, with all that its config.json, settings, leaves to defaults.

    Raises UserError for a model that llama.cpp's graph would not compute.
    """
    if settings.get("model_type") not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(
            f"{path}: export=gguf knows the model types {known}, not {settings.get('model_type')}"
        )
    family = family_of(settings)
    if family.name not in OF_BLOCK:
        raise UserError(
            f"{path}: llama.cpp does not run models of the kind {family.name}: choose "
            "export=compressed-tensors"
        )
    config = model_of(settings, torch.float32).config
    reason = _unknown(config)
    if reason is not None:
        raise UserError(
            f"{path}: llama.cpp does not run {reason}: choose export=compressed-tensors"
        )
    return config


def _unknown(config: Any) -> str | None:
    """What of a model llama.cpp does not have."""
    architecture = ARCHITECTURES[config.model_type]
    graph = GRAPHS[architecture]
    if _activation(config) not in graph.activations:
        return f"the activation {_activation(config)} in this architecture"
    for key, allowed in graph.settings.items():
        if getattr(config, key, allowed[0]) not in allowed:
            return f"{key}={getattr(config, key)} in this architecture"
    for key in graph.capped:
        if getattr(config, key) is None:
            return f"models without {key} in this architecture"
    if graph.tied is not None and bool(config.tie_word_embeddings) != graph.tied:
        return f"models with tie_word_embeddings={not graph.tied} in this architecture"
    heads, _, head_dim = heads_of(config.to_dict())
    if graph.square and head_dim * heads != config.hidden_size:
        return "heads that are not as wide together as the hidden size in this architecture"
    return _unknown_attention(config, architecture) or _unknown_rope(config, graph)


def _unknown_attention(config: Any, architecture: str) -> str | None:
    windows = sliding_windows(config)
    shorter = [w for w in windows if w is not None and w < config.max_position_embeddings]
    if shorter and not GRAPHS[architecture].windows:
        return f"attention in a sliding window of {min(shorter)} tokens in this architecture"
    if GRAPHS[architecture].windows and _period(windows) is None:
        return (
            "layers that see all tokens but are not every second, third or so in this architecture"
        )
    scaled = getattr(config, "query_pre_attn_scalar", None)
    if scaled is not None:
        usual = float(heads_of(config.to_dict())[2])
        if config.num_hidden_layers == GEMMA_27B.get(architecture):
            usual = config.hidden_size // config.num_attention_heads
        if scaled != usual:
            return f"query_pre_attn_scalar={scaled} where it takes {usual:g}"
    positions = getattr(config, "no_rope_layers", None)
    turned = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    if positions is not None and list(positions) != turned:
        return "no_rope_layers other than every fourth"
    return None


def _unknown_rope(config: Any, graph: Graph) -> str | None:
    for rope, ropes in zip(_ropes(config), (graph.ropes, ("default",)), strict=False):
        kind = rope.get("rope_type", "default")
        if kind not in ropes:
            return f"rotary embeddings of the kind {kind} in this architecture"
        if kind == "yarn" and any(rope.get(key) for key in ("mscale", "mscale_all_dim")):
            return "rotary embeddings of the kind yarn with mscale"
        if kind == "yarn" and rope.get("truncate") is False:
            return "rotary embeddings of the kind yarn with truncate=false"
        if rope.get("partial_rotary_factor", 1.0) != 1.0 and not graph.part:
            return "rotary embeddings of a part of each head"
    return None


def _name(settings: dict[str, Any], label: str, tokens: Set[str]) -> str:
    called = next((settings[key] for key in NAMES if settings.get(key)), None)
    name = Path(called).name if called else f"{settings['model_type']} {label}"
    taken_for_phi3 = any(part in name.lower() for part in PHI3)
    return label if taken_for_phi3 and not tokens >= PHI3_TOKENS else name


def add_metadata(
    writer: Any,
    settings: dict[str, Any],
    config: Any,
    most: str,
    tokens: Set[str],
    quantized: bool,
) -> None:
    """Say all of a model but its tokenizer.

    writer: gguf's, which knows all tensors; settings: config.json; config: of ``check_model``; most: the
    type of most weights; tokens: the texts of the vocabulary
    """
    from gguf import size_label
    from gguf.constants import GGML_QUANT_VERSION, GGUFType

    heads, head_dim = stored_heads(config), heads_of(config.to_dict())[2]
    label = size_label(*writer.get_total_parameter_count())
    writer.add_type(GGUFType.MODEL)
    writer.add_name(_name(settings, label, tokens))
    writer.add_size_label(label)
    writer.add_file_type(FILE_TYPES[most])
    if quantized:
        writer.add_quantization_version(GGML_QUANT_VERSION)
    for key, add in TOLD.items():
        if (value := getattr(config, key, None)) is not None:
            getattr(writer, add)(value)
    writer.add_feed_forward_length(_feed_forward(config))
    writer.add_head_count(heads.queries)
    writer.add_head_count_kv(heads.keys)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if GRAPHS[heads.architecture].windows:
        period = _period(sliding_windows(config))
        assert period is not None
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(period)
    ropes = _ropes(config)
    for rope in ropes[:1]:
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
        _add_rope(writer, rope, config.max_position_embeddings)
    for rope in ropes[1:]:
        writer.add_rope_freq_base_swa(float(rope["rope_theta"]))
    if _activation(config) == GELU:
        log.warning(
            "llama.cpp computes GELU by tanh in this architecture, this model by the error function: outputs "
            "of the activation differ by up to 5e-4 there"
        )


def _add_rope(writer: Any, rope: dict[str, Any], positions: int) -> None:
    """Of llama3 only the base is said here: its factors are a tensor, as those of longrope are."""
    from gguf.constants import RopeScalingType

    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        factor = float(rope["factor"])
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        original = rope.get("original_max_position_embeddings") or positions
        writer.add_rope_scaling_orig_ctx_len(int(original))
        if rope.get("attention_factor") is not None:
            # llama.cpp multiplies the usual factor by this one; transformers puts it in its place.
            usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
            writer.add_rope_scaling_attn_factors(float(rope["attention_factor"]) / usual)
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))
    elif kind == "longrope":
        original = int(rope["original_max_position_embeddings"])
        factor = float(rope.get("factor") or positions / original)
        usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(float(rope.get("attention_factor") or usual))
        log.warning(
            "llama.cpp takes the factors of long texts for all if it is started with room for more than %d "
            "tokens, transformers for texts that are longer: keep -c at that where texts are short",
            original,
        )


def extra_tensors(config: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors that follow from the config of ``check_model``: what llama3 or longrope divides rotary
    frequencies by, float32 (pairs,)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope: dict[str, Any] = next(iter(_ropes(config)), {})
    kind = rope.get("rope_type")
    one, long, short = DERIVED
    if kind == "longrope":
        lists = {long: rope["long_factor"], short: rope["short_factor"]}
        return {name: np.array(factors, np.float32) for name, factors in lists.items()}
    if kind != "llama3":
        return {}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    channels = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32)
    plain = 1.0 / rope["rope_theta"] ** (channels / (2 * len(scaled)))
    return {one: (plain / scaled).numpy()}
