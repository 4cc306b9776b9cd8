"""Token blocks: seeded, hashed, honest about short texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.texts import PACKAGED, load_mix, load_texts
from calibration.tokens import (
    bos_prefix,
    calibration_blocks,
    evaluation_windows,
    held_out,
    interleave,
    training_blocks,
)
from compress.compose import compose_settings
from compress.errors import UserError
from eval.faults.tiny import byte_tokenizer

TEXTS = [f"document {i}: " + "some words about it " * 20 for i in range(30)]
MIX = {"words": TEXTS}


def test_blocks_depend_on_the_seed_alone() -> None:
    make = lambda seed: calibration_blocks(  # noqa: E731
        MIX, byte_tokenizer(), sequences=8, length=64, seed=seed
    )
    first, again, other = make(0), make(0), make(1)
    assert first.tokens.shape == (8, 64)
    assert torch.equal(first.tokens, again.tokens)
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256


def test_a_mix_gives_every_part_an_equal_share() -> None:
    """However long the documents of a part are, and whatever else is in the mix."""
    tokenizer = byte_tokenizer()
    letters = {"a": ["a" * 50] * 200, "b": ["b" * 5000] * 9, "c": ["c" * 900] * 30}
    draw = lambda mix, sequences: calibration_blocks(  # noqa: E731
        mix, tokenizer, sequences=sequences, length=64, seed=3
    )
    rows = draw(letters, 8).tokens
    found = [tokenizer.decode(row[row != tokenizer.eos_token_id])[0] for row in rows]
    assert found == list("abcabcab")
    assert draw(letters, 8).sha256 == draw(letters, 8).sha256
    words = draw({"a": letters["a"], "words": TEXTS}, 8).tokens[1::2]
    assert torch.equal(words, draw({"words": TEXTS, "b": letters["b"]}, 8).tokens[::2])


def test_training_takes_all_text() -> None:
    """Every document once, whole but for the tail of its part, parts evenly among each other."""
    tokenizer = byte_tokenizer()
    mix = {"a": [c * 30 for c in "abcdefgh"], "b": [c * 300 for c in "ij"]}
    blocks = training_blocks(mix, tokenizer, length=20, seed=5)
    # 8 x 31 tokens in 12 blocks, 2 x 301 in 30.
    assert blocks.tokens.shape == (42, 20)
    is_a = [tokenizer.decode(row.tolist()).replace("<|end|>", "")[0] < "i" for row in blocks.tokens]
    for part, kind in (("abcdefgh", True), ("ij", False)):
        rows = [row for row, a in zip(blocks.tokens, is_a, strict=True) if a == kind]
        text = tokenizer.decode(torch.cat(rows).tolist()).split("<|end|>")
        whole = [document for document in text if len(set(document)) == 1]
        lengths = {document[0]: len(document) for document in whole}
        assert set(lengths) == set(part)
        assert list(lengths.values())[:-1] == [30 if kind else 300] * (len(part) - 1)
        assert "".join(lengths) != part, "documents are shuffled"
    # In any seven neighbours two are of the part that has two sevenths of the blocks, give or take one.
    counts = [sum(is_a[i : i + 7]) for i in range(36)]
    assert set(counts) <= {1, 2, 3}
    assert training_blocks(mix, tokenizer, length=20, seed=5).sha256 == blocks.sha256
    assert training_blocks(mix, tokenizer, length=20, seed=6).sha256 != blocks.sha256


def test_no_more_text_is_tokenized_than_is_enough() -> None:
    """Parts in shares of their characters; of a long document, blocks of all of it."""
    seen: list[str] = []

    class Counting(WithBos):
        def __call__(self, text: str, add_special_tokens: bool = True, **more: Any) -> Any:
            if not add_special_tokens:
                seen.append(text)
            return super().__call__(text, add_special_tokens, **more)

    short, long = [f"{i:02d}" * 25 for i in range(60)], ["".join(map(chr, range(100, 1100)))]
    mix = {"short": short, "long": long}
    found = training_blocks(mix, Counting(), length=11, seed=0, most=40).tokens
    assert found.dtype == torch.int64
    # 3,000 characters against 1,000; 51 tokens of a document give five blocks of 10.
    is_short = found[:, 1] < 110
    assert (len(found), int(is_short.sum())) == (40, 30)
    assert len([text for text in seen if text != long[0]]) == 6
    assert int(found[~is_short].max()) > 110 + 700
    again = training_blocks(mix, WithBos(), length=11, seed=0, most=40)
    assert torch.equal(again.tokens, found)
    # More than there is: all of it.
    whole = training_blocks(mix, WithBos(), length=11, seed=0)
    assert training_blocks(mix, WithBos(), length=11, seed=0, most=1000).sha256 == whole.sha256


def test_one_in_sixteen_is_held_out() -> None:
    trained, held = held_out(40)
    assert held.tolist() == [15, 31]
    assert sorted([*trained.tolist(), 15, 31]) == list(range(40))
    assert [part.tolist() for part in held_out(2)] == [[0], [1]]


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
    blocks = calibration_blocks(MIX, tokenizer, sequences=4, length=32, seed=0).tokens
    assert blocks.shape == (4, 32)
    assert (blocks[:, 0] == 1).all()
    assert (blocks[:, 1:] != 1).all()
    trained = training_blocks(MIX, tokenizer, length=32, seed=0).tokens
    assert (trained[:, 0] == 1).all()
    assert (trained[:, 1:] != 1).all()
    windows = evaluation_windows(TEXTS, tokenizer, tokens=128, window=64).tokens
    assert windows.shape == (2, 65)
    assert (windows[:, 0] == 1).all()


def test_short_texts_are_refused() -> None:
    with pytest.raises(UserError, match=r"text b gives 0 blocks of 64 tokens, 4 are"):
        calibration_blocks(
            {"a": TEXTS, "b": ["short"]}, byte_tokenizer(), sequences=8, length=64, seed=0
        )
    with pytest.raises(UserError, match=r"the text a\+b gives 1 blocks of 64 tokens, 2 are needed"):
        training_blocks({"a": ["c" * 100], "b": ["short"]}, byte_tokenizer(), length=64, seed=0)
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


def test_a_mix_names_its_parts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b+c.txt").write_text("two")
    a, plus = str(tmp_path / "a.txt"), str(tmp_path / "b+c.txt")
    assert load_mix(plus, "text", "train") == {plus: ["two"]}
    mix = load_mix(f"sotu-since-2009+{a}", "text", "train")
    assert list(mix) == ["sotu-since-2009", a]
    assert mix[a] == ["one"]
    with pytest.raises(UserError, match=r"text source 'stou' is none of: sotu-1960-2004"):
        load_mix(f"{a}+stou", "text", "train")


def test_what_is_reported_is_never_calibrated_on() -> None:
    """No document of a text that standard evaluation reports, or of a held-out part, is in the
    default mix, nor in another packaged text that may be added to it."""
    settings = compose_settings(["recipe=awq-int4"])
    assert settings.eval is not None
    mix = load_mix(settings.data.source, "text", "train")
    assert len(mix) > 1
    held_out = {*settings.eval.texts, "xsum-news-held-out", "python-networkx"}
    calibration = {text for name in PACKAGED if name not in held_out for text in _texts(name)}
    assert calibration >= {text for texts in mix.values() for text in texts}
    for name in held_out:
        assert len(_texts(name)) >= 10
        assert not calibration & set(_texts(name)), name


def _texts(name: str) -> list[str]:
    return load_texts(name, "text", "train")


def test_interleaved_rows() -> None:
    a, b = torch.arange(4).view(2, 2), 100 + torch.arange(8).view(4, 2)
    assert interleave(a, b)[:, 0].tolist() == [100, 0, 102, 104, 2, 106]
    assert interleave(b, a)[:, 0].tolist() == [100, 0, 102, 104, 2, 106]
    assert interleave(a, a + 50)[:, 0].tolist() == [0, 50, 2, 52]
    assert interleave(a, b, a + 50)[:, 0].tolist() == [100, 0, 50, 102, 104, 2, 52, 106]
