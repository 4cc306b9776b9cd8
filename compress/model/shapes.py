"""Models by their shapes alone: speed does not depend on the values. Configs of well-known ones."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from compress.errors import UserError
from compress.model.families import is_tied
from compress.model.folder import dtype_named, read_json
from compress.model.skeleton import model_of

PREFIX = "shape:"

# From the config.json of each, without what speed does not depend on.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "llama-2-7b": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "llama-2-13b": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824,
        "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40,
    },
    "mistral-7b": {
        "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "sliding_window": None,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    },
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
CONTEXT = 131072


def shape_config(name: str) -> dict[str, Any]:
    """The config of a named shape, or that in a config.json. Raises UserError for neither."""
    if name in SHAPES:
        common = {"dtype": "bfloat16", "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5}
        return {"tie_word_embeddings": False, **common, **SHAPES[name]}
    path = Path(name).expanduser()
    if path.name == "config.json" and path.exists():
        return read_json(path)
    raise UserError(
        f"{PREFIX}{name} is not known: known are {', '.join(SHAPES)}, or the path of a config.json"
    )


class ShapeFolder:
    """What a folder of such a model would hold, without the folder: ``Shapes``."""

    def __init__(self, name: str, config: dict[str, Any] | None = None):
        """config: that of ``name`` if not given. Raises UserError for a name that is not known."""
        self.path = Path(name)
        self.config = shape_config(name) if config is None else config

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        try:
            model = model_of(self.config, self.dtype)
        except ValueError as error:
            raise UserError(f"{self.path}: the config is not usable: {error}") from error
        if self.tied_head:
            model.tie_weights()
        # Names a shared tensor once.
        stored = dict(model.named_parameters())
        kept = model.state_dict()
        stored |= {name: b for name, b in model.named_buffers() if name in kept}
        return {name: tuple(tensor.shape) for name, tensor in stored.items()}

    @property
    def names(self) -> list[str]:
        return list(self._shapes)

    @property
    def dtype(self) -> torch.dtype:
        # As transformers has it for a config that does not say.
        stated = self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        return dtype_named(stated, self.path)

    @property
    def tied_head(self) -> bool:
        return is_tied(self.config)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def __contains__(self, name: str) -> bool:
        return name in self._shapes
