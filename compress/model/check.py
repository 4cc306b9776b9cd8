"""Whether a model folder is what its config.json says, from headers alone: before any work starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.errors import UserError
from compress.model.families import family_of
from compress.model.folder import ModelFolder
from compress.model.shapes import ShapeFolder

# What weights are stored in, by the names of safetensors.
FLOATS = ("F64", "F32", "F16", "BF16")


def check_model(folder: ModelFolder, names: Sequence[str], *, plain: bool) -> None:
    """Raises UserError, with the file and the tensor, for a folder that does not fit its config.json: tensors
    missing, beyond it, of another shape or no floats; and for one with links to what does not belong to it.

    names: of its weights, as a plain folder calls them; plain: whether they are stored so
    """
    try:
        family = family_of(folder.config)
    except UserError as error:
        raise UserError(f"{folder.path}/config.json: {error}") from None
    for _ in folder.companions():
        # Each looked at for where it links to.
        pass
    stated = {**folder.config, "dtype": str(folder.dtype).removeprefix("torch.")}
    expected, held = ShapeFolder(f"{folder.path}/config.json", stated), set(names)
    for name in expected.names:
        if name not in held:
            raise UserError(f"{folder.path} holds no tensor {name}, which its config.json asks for")
    # Some files of tied models hold the shared matrix twice.
    twice = {f"{family.head}.weight"} if folder.tied_head else set[str]()
    for name in names:
        if name not in expected and name not in twice:
            raise UserError(
                f"{folder.path} holds a tensor {name}, which its config.json has no place for"
            )
        if plain:
            _check_stored(folder, name, expected)


def _check_stored(folder: ModelFolder, name: str, expected: ShapeFolder) -> None:
    stored, file = folder.stored_type(name), folder.file_of(name)
    if stored not in FLOATS:
        hint = ", and no quantization_config says what it means" if stored.startswith("F8") else ""
        raise UserError(
            f"{file}: {name} is stored as {stored}{hint}: weights are {', '.join(FLOATS)}"
        )
    family = family_of(folder.config)
    known = name if name in expected else f"{family.embedding}.weight"
    shape, asked = folder.shape(name), expected.shape(known)
    if shape != asked:
        raise UserError(f"{file}: {name} has shape {shape}, config.json asks for {asked}")


def check_tokenizer(tokenizer: Any, config: Mapping[str, Any], path: Path) -> None:
    """Raises UserError for a tokenizer of another model: with more tokens than the embedding has rows.

    Tokens added beyond them, which no text has (a padding token), are let pass.
    """
    rows = config.get("vocab_size")
    if not isinstance(rows, int):
        return
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    most = max([tokenizer.vocab_size, *(1 + token for token in ends if token is not None)])
    if most > rows:
        raise UserError(
            f"{path}: its tokenizer has {most} tokens, its embedding {rows} rows (vocab_size): they belong "
            "to different models"
        )


def check_tokens(tokens: Tensor, folder: ModelFolder) -> None:
    """Raises UserError if a text has tokens for which the embedding has no row."""
    rows, most = int(folder.config["vocab_size"]), int(tokens.max())
    if most >= rows:
        raise UserError(
            f"{folder.path}: its tokenizer makes token {most} of the text, its embedding has {rows} rows "
            "(vocab_size): the text holds a token that was added to it, or they belong to different models"
        )
