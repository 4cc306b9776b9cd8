"""The language part of models that see images too: which tensors it is, and its config by itself.

Such a folder is read as the language model in it, a plain one of its own type. What else it holds, towers and
projectors, is left alone, and goes into every export beside the language part (``export.outer``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from compress.errors import UserError


@dataclass(frozen=True)
class Outer:
    """A type of model with a language model in it.

    text_type: the model type that computes what its language part does from text alone; "": as its text
        config says
    spelled: how names of the language part may begin in checkpoints, and how they do in the language model
    beside: pieces of names that are not of the language part
    """

    text_type: str
    spelled: tuple[tuple[str, str], ...]
    beside: tuple[str, ...] = (
        "vision_tower.",
        "visual.",
        "multi_modal_projector.",
        "image_newline",
    )


LLAVA = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
# Positions of text are the same in each of the three sections of its rotary embedding.
QWEN = (("model.language_model.", "model."), ("lm_head.", "lm_head."))
OUTERS = {
    "gemma3": Outer("", LLAVA),
    "llava": Outer("", LLAVA),
    "qwen2_vl": Outer("qwen2", QWEN),
    "qwen2_5_vl": Outer("qwen2", QWEN),
}
# Of the outer config, what holds for the language part too.
SHARED = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")


def outer_of(config: Mapping[str, Any]) -> Outer | None:
    """None for a language model."""
    return OUTERS.get(str(config.get("model_type")))


def text_config(config: Mapping[str, Any], outer: Outer) -> dict[str, Any]:
    """The config.json of the language part, with what transformers knows where that leaves something out.
    Raises UserError if there is none."""
    from transformers import AutoConfig

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        text: dict[str, Any] = AutoConfig.for_model(**plain).get_text_config().to_dict()
    except Exception as error:
        # Whatever the library raises over a config that does not fit.
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"the config is not usable: {type(error).__name__}: {reason}") from error
    text |= {key: config[key] for key in SHARED if key in config}
    if outer.text_type:
        text["model_type"] = outer.text_type
        rope = text.get("rope_parameters") or text.get("rope_scaling")
        if isinstance(rope, dict) and "mrope_section" in rope:
            # Three equal positions turn as one does.
            text["rope_parameters"] = {
                key: "default" if value == "mrope" else value
                for key, value in rope.items()
                if key not in ("mrope_section", "type")
            }
            text.pop("rope_scaling", None)
    return text


def text_name(stored: str, outer: Outer) -> str | None:
    """The name of a tensor in the language model; None for one that is not of it."""
    for begins, ours in outer.spelled:
        if stored.startswith(begins):
            return ours + stored.removeprefix(begins)
    return None if any(piece in stored for piece in outer.beside) else stored


def spelling(stored: Iterable[str], outer: Outer) -> dict[str, str]:
    """How names of the language model begin in a checkpoint that holds these."""
    held = list(stored)
    return {
        ours: begins
        for begins, ours in reversed(outer.spelled)
        if any(name.startswith(begins) for name in held)
    }


def stored_name(name: str, begins: Mapping[str, str]) -> str:
    """The reverse of ``text_name``. begins: of ``spelling``"""
    for ours, theirs in begins.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
