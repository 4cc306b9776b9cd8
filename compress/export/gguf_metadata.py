"""What a GGUF file says of a model beside its weights and tokenizer, and which models llama.cpp runs.

Read from llama.cpp's sources of October 2026 (src/models/llama.cpp, qwen2.cpp, llama-context.cpp): its graphs
of these architectures have optional biases of every linear but Qwen2's MLP and attention output, no sliding
window, and one activation.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.errors import UserError
from compress.kv_cache.cache import sliding_windows
from compress.model.gguf_file import ARCHITECTURES, DERIVED
from compress.model.skeleton import model_of

ROPES = ("default", "linear", "yarn", "llama3")
# general.file_type by the type of most weights.
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11,
    "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "BF16": 32, "MXFP4": 38,
}  # fmt: skip
# Where config.json tells what a model was called.
NAMES = ("_name_or_path", "_model_name_or_path")


def _rope(config: Any) -> dict[str, Any]:
    """Kind and numbers of the rotary embedding: ``rope_type``, ``rope_theta``, what goes with the kind."""
    found: dict[str, Any] = dict(config.rope_parameters)
    return found


def check_model(settings: dict[str, Any], path: Path) -> Any:
    """The transformers config of a model, with all that its config.json, settings, leaves to defaults.

    Raises UserError for a model that llama.cpp's graph would not compute.
    """
    if settings.get("model_type") not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(
            f"{path}: export=gguf knows the model types {known}, not {settings.get('model_type')}"
        )
    config = model_of(settings, torch.float32).config
    reason = _unknown(config, ARCHITECTURES[settings["model_type"]])
    if reason is not None:
        raise UserError(
            f"{path}: llama.cpp does not run {reason}: choose export=compressed-tensors"
        )
    return config


def _unknown(config: Any, architecture: str) -> str | None:
    """What of a model llama.cpp does not have."""
    if config.hidden_act not in ("silu", "swish"):
        return f"the activation {config.hidden_act} in this architecture"
    windows = [w for w in sliding_windows(config) if w is not None]
    if windows and min(windows) < config.max_position_embeddings:
        return f"attention in a sliding window of {min(windows)} tokens in this architecture"
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind not in ROPES or (kind == "llama3" and architecture != "llama"):
        return f"rotary embeddings of the kind {kind} in this architecture"
    if kind == "yarn" and any(rope.get(key) for key in ("mscale", "mscale_all_dim")):
        return "rotary embeddings of the kind yarn with mscale"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "rotary embeddings of a part of each head"
    return None


def add_metadata(
    writer: Any, settings: dict[str, Any], config: Any, most: str, quantized: bool
) -> None:
    """Say all of a model but its tokenizer.

    writer: gguf's, which knows all tensors; settings: config.json; config: of ``check_model``; most: the
    type of most weights
    """
    from gguf import size_label
    from gguf.constants import GGML_QUANT_VERSION, GGUFType

    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    label = size_label(*writer.get_total_parameter_count())
    called = next((settings[key] for key in NAMES if settings.get(key)), None)
    writer.add_type(GGUFType.MODEL)
    writer.add_name(Path(called).name if called else f"{settings['model_type']} {label}")
    writer.add_size_label(label)
    writer.add_file_type(FILE_TYPES[most])
    if quantized:
        writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    _add_rope(writer, _rope(config), config.max_position_embeddings)


def _add_rope(writer: Any, rope: dict[str, Any], positions: int) -> None:
    """Of llama3 only the base is said here: its factors are a tensor."""
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


def extra_tensors(config: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors that follow from the config of ``check_model``: what llama3 divides rotary frequencies by,
    float32 (pairs,)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return {}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    channels = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32)
    plain = 1.0 / rope["rope_theta"] ** (channels / (2 * len(scaled)))
    return {DERIVED: (plain / scaled).numpy()}
