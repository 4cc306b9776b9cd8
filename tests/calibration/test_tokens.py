"""Token blocks: seeded, hashed, honest about short texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.texts import load_texts
from calibration.tokens import bos_prefix, calibration_blocks, evaluation_windows
from compress.errors import UserError
from tests.conftest import byte_tokenizer

TEXTS = [f"document {i}: " + "some words about it " * 20 for i in range(30)]


def test_blocks_depend_on_the_seed_alone() -> None:
    make = lambda seed: calibration_blocks(  # noqa: E731
        TEXTS, byte_tokenizer(), sequences=8, length=64, seed=seed
    )
    first, again, other = make(0), make(0), make(1)
    assert first.tokens.shape == (8, 64)
    assert torch.equal(first.tokens, again.tokens)
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256


def test_windows_are_the_text_in_order() -> None:
    tokenizer = byte_tokenizer()
    windows = evaluation_windows(TEXTS, tokenizer, tokens=200, window=64)
    assert windows.tokens.shape == (3, 64)
    ids = [*tokenizer(TEXTS[0]).input_ids, tokenizer.eos_token_id, *tokenizer(TEXTS[1]).input_ids]
    assert windows.tokens.flatten().tolist() == ids[:192]


class WithBos:
    """A tokenizer that starts every text with BOS, as Llama's do."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
        ids = [10 + ord(c) for c in text]
        return type("Encoding", (), {"input_ids": ([1] if add_special_tokens else []) + ids})


def test_bos_starts_every_block() -> None:
    tokenizer = WithBos()
    assert bos_prefix(tokenizer) == [1]
    assert bos_prefix(byte_tokenizer()) == []
    blocks = calibration_blocks(TEXTS, tokenizer, sequences=4, length=32, seed=0).tokens
    assert blocks.shape == (4, 32)
    assert (blocks[:, 0] == 1).all()
    assert (blocks[:, 1:] != 1).all()
    windows = evaluation_windows(TEXTS, tokenizer, tokens=128, window=64).tokens
    assert windows.shape == (2, 65)
    assert (windows[:, 0] == 1).all()


def test_short_texts_are_refused() -> None:
    with pytest.raises(UserError, match=r"gives \d+ blocks"):
        calibration_blocks(["short"], byte_tokenizer(), sequences=8, length=64, seed=0)
    with pytest.raises(UserError, match="less than one window"):
        evaluation_windows(["short"], byte_tokenizer(), tokens=100, window=64)


def test_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    (tmp_path / "a.csv").write_text("body\none\ntwo\n")
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert load_texts(str(tmp_path / "a.jsonl"), "body", "train") == ["one", "two"]
    assert load_texts(str(tmp_path / "a.csv"), "body", "train") == ["one", "two"]
    assert load_texts(str(tmp_path / "a.txt"), "text", "train") == ["one\ntwo\n"]
    with pytest.raises(UserError, match="no field 'text': it has body"):
        load_texts(str(tmp_path / "a.csv"), "text", "train")
    with pytest.raises(UserError, match="does not exist"):
        load_texts(str(tmp_path / "b.csv"), "text", "train")
    with pytest.raises(UserError, match="none of: sotu-1960-2004"):
        load_texts("nothing", "text", "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "cannot be read"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "cannot be read"),
        ("number.jsonl", b'{"text": 5}\n', "no text in field 'text'"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "cannot be read"),
        ("blank.txt", b"  \n", "holds no text"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*{message}"):
        load_texts(str(tmp_path / name), "text", "train")


def test_packaged_years_do_not_overlap() -> None:
    assert len(load_texts("sotu-since-2009", "text", "train")) >= 10
    assert len(load_texts("sotu-1960-2004", "text", "train")) >= 40
    from calibration.texts import _sotu

    calibration = {row["name"] for row in _sotu(lambda year: 1960 <= year <= 2004)}
    assert not calibration & {row["name"] for row in _sotu(lambda year: year >= 2009)}
