"""A tokenizer as llama.cpp has it: the vocabulary, how text is split before it, and which tokens mean what.

Of BPE over bytes, llama.cpp knows the split by a name and not by its pattern: ``SPLITS`` has those that the
models here use, with their patterns in tokenizer.json. Of BPE over characters with bytes for the rest
(SentencePiece, as in Llama 2 and Mistral 7B) it takes a score for each token, highest first; they follow
from the order of merges.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from compress.errors import UserError
from compress.model.folder import ModelFolder, read_json

log = logging.getLogger(__name__)

# Which words ignore merges is said by the name too: those of these splits may.
SPLITS: dict[tuple[str, ...], str] = {
    ("bytes of words",): "gpt-2",
    ("digits", "bytes of words"): "smollm",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        "bytes",
    ): "llama-bpe",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        "bytes",
    ): "qwen2",
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "bytes",
    ): "tekken",
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "bytes",
    ): "gpt-4o",
    ("punctuation", "bytes of words", "numbers", "[0-9][0-9][0-9]"): "falcon",
}  # fmt: skip
WHOLE_WORDS = ("llama-bpe", "tekken")
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
# llama.cpp asks for a merge. Where there are none, nothing is as long as the parts of this one.
NO_MERGE = "<none> <none>"
# What a token without a merge scores, below all that have one.
UNMERGED = -1e6


def check_tokenizer(folder: ModelFolder, tokenizer: Any) -> None:
    """Raises UserError for a tokenizer that llama.cpp would not have, with what is known."""
    _described(folder, tokenizer)


@dataclass(frozen=True)
class _Described:
    """A tokenizer in llama.cpp's words.

    settings: its tokenizer.json; pieces: bytes are tokens of their own; split: the name of how text is
    split; prefix: texts begin with a space that they have not; tokens, types: for each row of the
    embedding; begins, ends: with BOS, with EOS
    """

    settings: dict[str, Any]
    pieces: bool
    split: str
    prefix: bool
    tokens: list[str]
    types: list[int]
    begins: bool
    ends: bool


def _described(folder: ModelFolder, tokenizer: Any) -> _Described:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{folder.path}: export=gguf needs a tokenizer.json, or files that give one"
        )
    settings: dict[str, Any] = json.loads(backend.to_str())
    model = settings["model"]
    if model.get("type") != "BPE":
        raise UserError(
            f"{folder.path}: of tokenizers export=gguf knows BPE, not {model.get('type')}"
        )
    pieces = bool(model.get("byte_fallback"))
    split, prefix = (
        ("default", _prefix(folder, settings)) if pieces else (_split(folder, settings), False)
    )
    tokens, types = _tokens(folder, settings, int(folder.config["vocab_size"]), pieces)
    begins, ends = _surrounds(folder, tokenizer)
    return _Described(settings, pieces, split, prefix, tokens, types, begins, ends)


def add_tokenizer(writer: Any, folder: ModelFolder, tokenizer: Any) -> None:
    """Say all of a tokenizer. writer: gguf's. Raises UserError as ``check_tokenizer`` does."""
    found = _described(folder, tokenizer)
    model = found.settings["model"]
    if found.prefix and found.settings.get("pre_tokenizer"):
        log.warning(
            "llama.cpp puts a space before every text, this tokenizer only before one that has none: texts "
            "that begin with a space, and what follows a special token, are split otherwise there"
        )
    if not found.pieces and found.settings.get("normalizer"):
        log.warning(
            "llama.cpp composes no characters, this tokenizer does (NFC): texts with characters in parts "
            "are split otherwise there"
        )
    writer.add_tokenizer_model("llama" if found.pieces else "gpt2")
    writer.add_tokenizer_pre(found.split)
    writer.add_token_list(found.tokens)
    if found.pieces:
        writer.add_token_scores(_scores(model, found.tokens))
    writer.add_token_types(found.types)
    if not found.pieces:
        writer.add_token_merges([_merge(merge) for merge in model["merges"]] or [NO_MERGE])
    writer.add_add_space_prefix(found.prefix)
    writer.add_add_bos_token(found.begins)
    writer.add_add_eos_token(found.ends)
    for kind, token in _special(folder, tokenizer):
        getattr(writer, f"add_{kind}_token_id")(token)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None:
        writer.add_chat_template(template)


def _steps(part: dict[str, Any] | None) -> Iterator[str]:
    """What a pre-tokenizer does, a word or a pattern for each of its steps."""
    if part is None:
        return
    kind = part.get("type")
    if kind == "Sequence":
        for step in part["pretokenizers"]:
            yield from _steps(step)
    elif kind == "ByteLevel" and not part.get("add_prefix_space"):
        yield "bytes of words" if part.get("use_regex", True) else "bytes"
    elif kind == "Digits":
        yield "digits" if part.get("individual_digits") else "numbers"
    elif kind == "Punctuation" and part.get("behavior") == "Contiguous":
        yield "punctuation"
    elif kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        yield str(part["pattern"].get("Regex"))
    else:
        yield json.dumps(part)


def _split(folder: ModelFolder, settings: dict[str, Any]) -> str:
    """llama.cpp's name for how text is split."""
    steps = tuple(_steps(settings.get("pre_tokenizer")))
    normalizer = (settings.get("normalizer") or {}).get("type")
    name = SPLITS.get(steps)
    # llama.cpp has no normalizer: that one is left out with a warning.
    if name is None or normalizer not in (None, "NFC"):
        raise UserError(
            f"{folder.path}: export=gguf knows tokenizers that split text as {', '.join(SPLITS.values())} "
            f"do, this one does not: {' then '.join(steps) or 'no split'}"
            + (f", after {normalizer}" if normalizer else "")
        )
    if settings["model"].get("ignore_merges") and name not in WHOLE_WORDS:
        raise UserError(
            f"{folder.path}: its tokenizer takes whole words before merges, which llama.cpp does with the "
            f"splits {', '.join(WHOLE_WORDS)} and not with {name}"
        )
    return name


def _prefix(folder: ModelFolder, settings: dict[str, Any]) -> bool:
    """Whether pieces begin with a space that the text has not."""
    steps = [settings.get("normalizer"), settings.get("pre_tokenizer")]
    flat = [step for part in steps if part for step in part.get("normalizers", [part])]
    prefix = replaced = False
    for step in flat:
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif kind == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE:
            replaced = True
        elif kind == "Metaspace" and step["replacement"] == SPACE and not step.get("split", True):
            prefix |= step.get("prepend_scheme", "always") != "never"
        elif kind == "Split" and step["pattern"] == {"String": " "} and replaced:
            # Gemma's, which finds no space any more.
            continue
        else:
            raise UserError(
                f"{folder.path}: export=gguf knows tokenizers of pieces that only put {SPACE} for spaces, "
                f"this one has {json.dumps(step)}"
            )
    return prefix


def _tokens(
    folder: ModelFolder, settings: dict[str, Any], rows: int, pieces: bool
) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding, those without a token filled up."""
    from gguf.constants import TokenType

    found = {index: (text, TokenType.NORMAL) for text, index in settings["model"]["vocab"].items()}
    if pieces:
        for index, (text, _) in found.items():
            if re.fullmatch(r"<0x[0-9A-F]{2}>", text):
                found[index] = (text, TokenType.BYTE)
    for added in settings["added_tokens"]:
        text, kind = added["content"], TokenType.USER_DEFINED
        if added["special"]:
            kind = TokenType.CONTROL
        elif pieces:
            text = text.replace(SPACE, " ")
        found[added["id"]] = (text, kind)
    unknown = settings["model"].get("unk_token")
    if pieces and unknown is not None:
        index = settings["model"]["vocab"][unknown]
        found[index] = (unknown, TokenType.UNKNOWN)
    if max(found) >= rows:
        raise UserError(
            f"{folder.path}: its tokenizer has token {max(found)}, its embedding {rows} rows"
        )
    filled = [found.get(index, (f"[PAD{index}]", TokenType.UNUSED)) for index in range(rows)]
    return [text for text, _ in filled], [int(kind) for _, kind in filled]


def _merge(merge: Any) -> str:
    """Both parts with a space between, and their own spaces as bytes have them."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return " ".join(part.replace(" ", chr(ord(" ") + 256)) for part in (first, second))


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """Minus the place at which a token first comes out of a merge."""
    scores: dict[str, float] = {}
    for place, merge in enumerate(model["merges"]):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        scores.setdefault("".join(parts), -float(place))
    return [scores.get(token, UNMERGED) for token in tokens]


def _surrounds(folder: ModelFolder, tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer begins texts with BOS, and ends them with EOS."""
    text = "a"
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(text)["input_ids"])
    for begins in (False, True):
        for ends in (False, True):
            first = [tokenizer.bos_token_id] if begins else []
            last = [tokenizer.eos_token_id] if ends else []
            if whole == first + plain + last:
                return begins, ends
    raise UserError(
        f"{folder.path}: llama.cpp puts BOS before a text and EOS behind it or nothing, its tokenizer makes "
        f"{whole} of {plain}"
    )


def _special(folder: ModelFolder, tokenizer: Any) -> Iterator[tuple[str, int]]:
    """Tokens with a meaning; config.json's where the tokenizer has none."""
    config = folder.config
    for kind in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{kind}_token_id")
        token = config.get(f"{kind}_token_id") if token is None else token
        if isinstance(token, int) and 0 <= token < int(config["vocab_size"]):
            yield kind, token
    # What else ends an answer has two more places.
    generation = folder.path / "generation_config.json"
    ends = read_json(generation).get("eos_token_id") if generation.exists() else None
    others = [
        t
        for t in (ends if isinstance(ends, list) else [ends])
        if t not in (None, tokenizer.eos_token_id)
    ]
    yield from zip(("eot", "eom"), others, strict=False)
