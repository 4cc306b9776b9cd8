"""Random models of every kind that is known, as small as they can be with several groups in a row and outputs
in steps of 32, which readers of packed weights ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from compress.model.folder import ModelFolder
from eval.faults.tiny import byte_tokenizer

COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
LLAMA = {**COMMON, "intermediate_size": 96, "num_key_value_heads": 2}
WIDE = {**LLAMA, "head_dim": 64}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
FALCON = {**COMMON, "bias": False, "alibi": False}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SHARED = {**ROUTED, "shared_expert_intermediate_size": 96, "mlp_only_layers": [0]}
LATENT = {
    **LLAMA,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
# Model type and settings of each kind.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "mistral": ("mistral", {**LLAMA, "sliding_window": 8}),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", WIDE),
    "smollm3": ("smollm3", {**LLAMA, "no_rope_layer_interval": 2}),
    "gemma2": ("gemma2", {**WIDE, **SLIDING, "query_pre_attn_scalar": 64}),
    "gemma3": ("gemma3_text", {**WIDE, **SLIDING}),
    "olmo2": ("olmo2", LLAMA),
    "phi3": ("phi3", {**LLAMA, "partial_rotary_factor": 0.5}),
    "gpt_neox": ("gpt_neox", {**COMMON, "intermediate_size": 256, "tie_word_embeddings": False}),
    "opt": ("opt", {**COMMON, "ffn_dim": 96, "word_embed_proj_dim": 128}),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": 320, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128,
            "bos_token_id": 256, "eos_token_id": 256,
        },
    ),
    "falcon-7b": ("falcon", FALCON),
    "falcon-40b": ("falcon", {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon-rw": ("falcon", {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True}),
    "mixtral": ("mixtral", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**LLAMA, **SHARED}),
    "qwen3_moe": ("qwen3_moe", {**WIDE, **ROUTED}),
    "gpt_oss": (
        "gpt_oss", {**WIDE, **SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "deepseek_v2": ("deepseek_v2", {**LATENT, "n_shared_experts": 1, "topk_method": "greedy"}),
    "deepseek_v3": (
        "deepseek_v3", {**LATENT, "n_shared_experts": 1, "n_group": 2, "topk_group": 1},
    ),
    "mamba2": (
        "mamba2",
        {
            "vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 32, "head_dim": 8,
            "state_size": 16, "n_groups": 2, "expand": 2, "chunk_size": 8, "bos_token_id": 256,
            "eos_token_id": 256, "pad_token_id": 256,
        },
    ),
    "jamba": (
        "jamba",
        {
            **LLAMA, "num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 1,
            "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4,
            "num_experts_per_tok": 2, "mamba_d_state": 16, "mamba_dt_rank": 32,
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            **WIDE, **ROUTED, "num_hidden_layers": 4, "shared_expert_intermediate_size": 64,
            "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 8,
            "linear_num_value_heads": 16,
        },
    ),
}  # fmt: skip
# Models that see images too, with a language part of a kind above: settings of that, and of the tower.
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
QWEN_VISION = {
    "depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "intermediate_size": 64,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
SEEING: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **WIDE, **SLIDING},
        "vision_config": {
            "model_type": "siglip_vision_model", **VISION, "image_size": 32, "patch_size": 8,
        },
        "mm_tokens_per_image": 4, "image_token_index": 300, "boi_token_index": 301,
        "eoi_token_index": 302,
    },
    "llava": {
        "text_config": {"model_type": "llama", **LLAMA},
        "vision_config": {
            "model_type": "clip_vision_model", **VISION, "image_size": 16, "patch_size": 8,
            "projection_dim": 32,
        },
        "image_token_index": 300,
    },
    "qwen2_5_vl": {
        "text_config": {"model_type": "qwen2_5_vl_text", **LLAMA, "rope_parameters": MROPE},
        "vision_config": {**QWEN_VISION, "out_hidden_size": 128, "fullatt_block_indexes": [0]},
        "image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302,
        "vision_end_token_id": 303,
    },
}  # fmt: skip
# What is no matrix of a linear: its size matters for what the model computes.
KEPT = ("A_log", "dt_bias", ".D", "sinks")


def random_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of this kind whose channels differ in size and whose norms are not ones."""
    model_type, settings = KINDS[kind]
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("e_score_correction_bias") or "norm" in name or tensor.dim() == 1:
            if isinstance(tensor, torch.nn.Parameter) or "score" in name:
                tensor.data += (0.2 * noise).to(dtype)
        elif isinstance(tensor, torch.nn.Parameter) and not name.endswith(KEPT):
            fan = tensor.shape[-2] if tensor.dim() == 3 and "oss" in kind else tensor.shape[-1]
            tensor.data = (noise / fan**0.5).to(dtype)
    return model


def written_seeing_model(
    kind: str, path: Path, dtype: torch.dtype = torch.float32
) -> tuple[Any, ModelFolder]:
    """A model that sees images too, with a language part."""
    config = AutoConfig.for_model(kind, **SEEING[kind])
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        parameter.data = noise / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 else parameter
        if "norm" in name:
            parameter.data += 0.2 * noise
    model.to(dtype).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return model, ModelFolder(path)


def written_model(
    kind: str, path: Path, dtype: torch.dtype = torch.float32
) -> tuple[Any, ModelFolder]:
    """Such a model, and a folder of it as transformers writes it."""
    model = random_model(kind, dtype)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return model, ModelFolder(path)
