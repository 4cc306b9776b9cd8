"""Model folders and texts from strangers: nothing in them runs, leads elsewhere, or takes the memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from calibration.texts import load_texts
from compress import pipeline
from compress.commands import evaluate
from compress.compose import compose_settings
from compress.config import parse
from compress.errors import UserError, one_line
from compress.model.card import CARD, licence_of
from compress.model.folder import DEEPEST_JSON, INDEX, SINGLE, ModelFolder, read_json
from compress.model.sources import open_tokenizer, resolve_model
from compress.report.table import KEYS
from compress.runtime.load import load_dense
from compress.serve.command import served_name
from eval.memory import rss
from tests.conftest import write_model

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TINY |= {"num_key_value_heads": 1}


class Canary:
    """Unpickled, it writes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("original") / "model", **TINY)


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.model.sources.cache_dir", lambda: tmp_path / "cache")


def check(folder: Path, *words: str) -> None:
    """What a run does before it reads a weight."""
    quick = ["recipe=rtn-int4", "scheme.group_size=32", "eval=none", "speed=none", "model.name=x"]
    pipeline.check(parse(compose_settings([*quick, f"model.source={folder}", *words])))


def opened(folder: Path) -> None:
    check(folder)
    open_tokenizer(ModelFolder(folder))


def pickled(folder: Path, content: Any = None) -> Path:
    """The folder with its weights, or ``content``, in pytorch_model.bin alone."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    torch.save(tensors if content is None else content, folder / "pytorch_model.bin")
    return folder


# Pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_refused_with_what_to_do(copy: Path, name: str) -> None:
    (copy / SINGLE).rename(copy / name)
    with pytest.raises(
        UserError, match=rf"{name}.*pickle.*save_pretrained.*model.allow_pickle=true"
    ):
        check(copy)
    with pytest.raises(UserError, match="pickle"):
        evaluate.main([str(copy), "eval.texts=[]", "eval.tasks=[]"])


def test_beside_safetensors_pickles_are_not_looked_at(copy: Path, tmp_path: Path) -> None:
    with (copy / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Canary(tmp_path / "ran"), file)
    (copy / "training_args.bin").write_bytes(b"x")
    for words in ([], ["model.allow_pickle=true"]):
        check(copy, *words)
    assert resolve_model(str(copy), None, allow_pickle=True) == copy
    assert not (tmp_path / "ran").exists()


def test_allowed_pickles_give_the_same_tensors_once(copy: Path, original: Path) -> None:
    """Tied ones share memory in the pickle; half are in a file as of before torch 1.6: not mapped."""
    tensors = load_file(copy / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    (copy / SINGLE).unlink()
    names = sorted(tensors)
    torch.save({n: tensors[n] for n in names[::2]}, copy / "pytorch_model-00001-of-00002.bin")
    torch.save(
        {n: tensors[n] for n in names[1::2]},
        copy / "pytorch_model-00002-of-00002.bin",
        _use_new_zipfile_serialization=False,
    )
    check(copy, "model.allow_pickle=true")
    found = resolve_model(str(copy), None, allow_pickle=True)
    assert found != copy
    folder, plain = ModelFolder(found), ModelFolder(original)
    assert set(folder.names) == set(names)
    assert all(torch.equal(folder.tensor(n), tensors[n]) for n in names)
    assert {f.name for f in folder.companions()} == {f.name for f in plain.companions()}
    assert folder.config == plain.config
    made = (found / "config.json").stat().st_mtime_ns
    assert resolve_model(str(copy), None, allow_pickle=True) == found
    assert (found / "config.json").stat().st_mtime_ns == made
    # Another content is another folder.
    torch.save({n: tensors[n] + 1 for n in names}, copy / "pytorch_model-00001-of-00002.bin")
    (copy / "pytorch_model-00002-of-00002.bin").unlink()
    assert resolve_model(str(copy), None, allow_pickle=True) != found


def test_code_in_an_allowed_pickle_does_not_run(copy: Path, tmp_path: Path) -> None:
    pickled(copy, {"model.norm.weight": Canary(tmp_path / "ran")})
    with pytest.raises(
        UserError, match=r"pytorch_model.bin holds more than tensors \(\w+\), which may run code"
    ):
        check(copy, "model.allow_pickle=true")
    assert not (tmp_path / "ran").exists()
    # With pickle itself it would.
    with (tmp_path / "x").open("wb") as file:
        pickle.dump(Canary(tmp_path / "ran"), file)
    pickle.loads((tmp_path / "x").read_bytes())
    assert (tmp_path / "ran").exists()
    assert not list((tmp_path / "cache").rglob("*.partial"))


@pytest.mark.parametrize(
    "content", [{"state": {"a": torch.ones(2)}}, [torch.ones(2)], {1: torch.ones(2)}, 5]
)
def test_an_allowed_pickle_of_something_else_is_refused(copy: Path, content: Any) -> None:
    with pytest.raises(UserError, match=r"pytorch_model.bin holds"):
        check(pickled(copy, content), "model.allow_pickle=true")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("billions", r"says that it holds \d+ bytes of weights, it has \d+$"),
        ("shared", r"says that it holds \d+ bytes of weights, it has \d+$"),
        ("sparse", "holds model.norm.weight in another form"),
        ("meta", "holds model.norm.weight in another form"),
    ],
)
def test_an_allowed_pickle_is_no_larger_than_its_file(copy: Path, kind: str, said: str) -> None:
    """One number may be said to be billions, and one storage the memory of any number of tensors."""
    tensors = load_file(copy / SINGLE)
    if kind == "billions":
        tensors["model.norm.weight"] = torch.zeros(1).expand(10**12)
    elif kind == "shared":
        tensors |= {f"x.{i}": tensors["model.embed_tokens.weight"] for i in range(100)}
    elif kind == "sparse":
        tensors["model.norm.weight"] = torch.eye(4).to_sparse()
    else:
        tensors["model.norm.weight"] = torch.zeros(32, device="meta")
    with pytest.raises(UserError, match=said):
        check(pickled(copy, tensors), "model.allow_pickle=true")


# Code of a model's own


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_model_is_refused_and_not_run(copy: Path, tmp_path: Path, file: str) -> None:
    ran = tmp_path / "ran"
    (copy / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass A: pass\n")
    settings = read_json(copy / file)
    settings["auto_map"] = {
        "AutoConfig": "evil.A",
        "AutoModelForCausalLM": "evil.A",
        "AutoTokenizer": ["evil.A", None],
    }
    (copy / file).write_text(json.dumps(settings))
    with pytest.raises(UserError, match=rf"{file} asks for code of its own \(auto_map: .*evil"):
        open_tokenizer(ModelFolder(copy))
    with pytest.raises(UserError, match="never run here"):
        pipeline.run_recipe(
            parse(
                compose_settings(
                    [
                        "recipe=rtn-int4",
                        f"model.source={copy}",
                        "model.name=x",
                        "eval=none",
                        "speed=none",
                    ]
                )
            ),
            "x",
            tmp_path / "out",
        )
    assert not ran.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"]
)
def test_attention_from_the_hub_is_refused(copy: Path, original: Path, key: str) -> None:
    """transformers would fetch and load a compiled library of that name."""
    settings = read_json(copy / "config.json")
    (copy / "config.json").write_text(json.dumps(settings | {key: "someone/evil-attention"}))
    with pytest.raises(UserError, match=f"{key}: someone/evil-attention"):
        check(copy)
    # What the library has is not taken from a file either: it may not be installed.
    (copy / "config.json").write_text(json.dumps(settings | {key: "flash_attention_2"}))
    model = load_dense(ModelFolder(copy), torch.device("cpu"), torch.float32)
    assert model.config._attn_implementation != "flash_attention_2"


def test_unknown_models_are_refused_though_they_bring_code(copy: Path) -> None:
    (copy / "config.json").write_text(
        json.dumps(read_json(copy / "config.json") | {"model_type": "evil"})
    )
    with pytest.raises(UserError, match="'evil' is not known here"):
        check(copy)


# Paths and links


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/model.safetensors",
        "..",
        ".",
        "",
        "x\x00",
        "n" * 5000,
        3,
        None,
        [],
    ],
)
def test_an_index_leads_nowhere_else(copy: Path, file: Any) -> None:
    names = ModelFolder(copy).names
    (copy / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
    with pytest.raises(UserError, match=r"points outside the folder|is missing|no file of weights"):
        check(copy)


def test_links_to_secrets_do_not_travel_into_an_export(copy: Path, tmp_path: Path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("a key")
    for name in ("LICENSE", "tokenizer_extra.json", "vocab.json", "NOTICE"):
        (copy / name).symlink_to(secret)
        with pytest.raises(UserError, match=rf"{name} is a link to {secret}, outside the folder"):
            check(copy)
        target = tmp_path / f"to-{name}"
        target.mkdir()
        with pytest.raises(UserError, match="outside the folder"):
            ModelFolder(copy).copy_companions(target)
        assert not (target / name).exists()
        (copy / name).unlink()


def test_links_that_people_make_are_followed(original: Path, tmp_path: Path) -> None:
    """The hub's cache, a folder of links to another one's files, a link to a folder, one within it."""
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    farm = tmp_path / "farm"
    farm.mkdir()
    for i, file in enumerate(original.iterdir()):
        shutil.copyfile(file, cache / "blobs" / f"{i:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:064x}")
        (farm / file.name).symlink_to(file)
    (farm / "LICENSE").write_text("words")
    (farm / "LICENSE.txt").symlink_to("LICENSE")
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    for folder in (snapshot, farm, linked):
        check(folder)
        assert len(list(ModelFolder(folder).companions())) >= 2
    # From the cache's blobs, not from beside them.
    (cache / "blobs.txt").write_text("x")
    (snapshot / "LICENSE").symlink_to("../../blobs.txt")
    with pytest.raises(UserError, match="outside the folder"):
        check(snapshot)


@pytest.mark.parametrize("name", ["config.json", SINGLE, INDEX, "tokenizer_config.json"])
def test_a_pipe_does_not_hold_a_run(copy: Path, name: str) -> None:
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    with pytest.raises(UserError, match=r"is not a file|holds neither"):
        opened(copy)


# Sizes


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**12, 99_999_999])
def test_an_absurd_header_takes_no_memory(copy: Path, length: int) -> None:
    file = copy / SINGLE
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    before = rss()
    with pytest.raises(UserError, match=r"model.safetensors is not a readable safetensors file"):
        check(copy)
    assert rss() - before < 50e6


def test_a_header_that_is_mostly_hole_is_refused(copy: Path) -> None:
    """A sparse file of a terabyte with a header of 99 MB in it."""
    file = copy / SINGLE
    with file.open("r+b") as out:
        out.write(struct.pack("<Q", 99_000_000))
        out.truncate(2**40)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        check(copy)


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer_config.json"])
@pytest.mark.parametrize("depth", [DEEPEST_JSON + 2, 900, 100_000])
def test_nested_json_is_refused(copy: Path, name: str, depth: int) -> None:
    (copy / name).write_text('{"a": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(UserError, match=r"nested more than|is not valid JSON"):
        opened(copy)


def test_json_of_a_gigabyte_is_not_read(copy: Path) -> None:
    with (copy / "config.json").open("r+b") as file:
        file.truncate(2**30)
    before = rss()
    with pytest.raises(UserError, match="has 1073741824 bytes"):
        check(copy)
    assert rss() - before < 50e6


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"vocab_size": 2**62},
        {"hidden_size": 2**40},
        {"num_attention_heads": 0},
        {"head_dim": 2**40},
        {"intermediate_size": True},
        {"num_key_value_heads": -1},
        {"num_hidden_layers": "9" * 10**6},
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_made_of_them(
    copy: Path, change: dict[str, Any]
) -> None:
    (copy / "config.json").write_text(json.dumps(read_json(copy / "config.json") | change))
    with pytest.raises(UserError, match=next(iter(change))) as told:
        check(copy)
    assert len(one_line(told.value)) < 500


@pytest.mark.parametrize("text", ["---\na: " + "[" * 100_000, "---\n" + "a: {" * 50_000])
def test_a_nested_card_is_none(copy: Path, text: str) -> None:
    """Its licence is looked for in YAML."""
    (copy / CARD).write_text(f"{text}\n---\n")
    assert licence_of(copy) == {}
    with (copy / CARD).open("r+b") as file:
        file.truncate(2**32)
    before = rss()
    assert licence_of(copy) == {}
    assert rss() - before < 50e6


@pytest.mark.parametrize(
    "metrics", ['{"a": ' * 5000 + "1" + "}" * 5000, "[]", dict.fromkeys(sorted(KEYS), 5)]
)
def test_metrics_beside_a_checkpoint_name_it_or_nothing(copy: Path, metrics: Any) -> None:
    """Whoever hands on a checkpoint may have put any file beside it."""
    text = metrics if isinstance(metrics, str) else json.dumps(metrics)
    (copy.parent / "metrics.json").write_text(text)
    assert served_name(copy) == "model"


# GGUF


def gguf_header(**values: tuple[str, int]) -> bytes:
    """A file with these keys, (struct letter, number) each, and no tensors."""
    kinds = {"I": 4, "Q": 10}

    def text(said: str) -> bytes:
        return struct.pack("<Q", len(said)) + said.encode()

    stored = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    for name, (letter, value) in values.items():
        key = name.replace("__", ".")
        stored += text(key) + struct.pack(f"<I{letter}", kinds[letter], value)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1 + len(values)) + stored


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"llama__attention__head_count": ("I", 4)}, "head_count 4, its config.json asks for 2"),
        ({"llama__attention__head_count": ("I", 0)}, "head_count 0, its config.json asks for 2"),
        (
            {
                "llama__attention__head_count": ("I", 2),
                "llama__attention__head_count_kv": ("Q", 2),
            },
            "head_count_kv 2, its config.json asks for 1",
        ),
        (
            {"llama__attention__head_count": ("I", 2), "general__alignment": ("I", 0)},
            "is not a readable GGUF file",
        ),
    ],
)
def test_a_gguf_of_another_model_is_refused(
    copy: Path, keys: dict[str, tuple[str, int]], said: str
) -> None:
    """By the heads rows are put in another order: wrong ones would give another model without a word."""
    (copy / SINGLE).unlink()
    (copy / "model.gguf").write_bytes(gguf_header(**keys))
    with pytest.raises(UserError, match=rf"model.gguf .*{said}"):
        check(copy)


# Texts


def packed(tmp_path: Path, kind: str) -> bytes:
    bomb = tmp_path / "inside.txt"
    bomb.write_text("a" * 10_000)
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as file:
            file.write(bomb, "../../outside.txt")
    elif kind == "tar":
        with tarfile.open(tmp_path / "x", "w") as tar:
            tar.add(bomb, "../../outside.txt")
    else:
        module = __import__({"gzip": "gzip", "xz": "lzma", "bz2": "bz2"}[kind])
        (tmp_path / "x").write_bytes(module.compress(bomb.read_bytes()))
    return (tmp_path / "x").read_bytes()


@pytest.mark.parametrize("kind", ["zip", "tar", "gzip", "xz", "bz2"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_packed_texts_are_not_unpacked(tmp_path: Path, kind: str, suffix: str) -> None:
    """datasets would unpack them, whatever their names say."""
    file = tmp_path / f"text{suffix}"
    file.write_bytes(packed(tmp_path, kind))
    with pytest.raises(UserError, match=rf"text{suffix} is packed \({kind}\): unpack it first"):
        load_texts(str(file), "text", "train")


# What a terminal sees


def test_names_cannot_command_a_terminal(copy: Path) -> None:
    evil = "a\nb\x1b]0;owned\x07\u202e\ud800"
    (copy / INDEX).write_text(json.dumps({"weight_map": {evil: SINGLE}}))
    with pytest.raises(UserError) as told:
        check(copy)
    sentence = one_line(told.value)
    assert sentence.isprintable()
    assert r"a b\x1b]0;owned\x07\u202e\ud800" in sentence


def test_every_name_of_the_folder_is_that_of_the_sentence(copy: Path) -> None:
    """File and tensor are both named."""
    faults: dict[str, Callable[[dict[str, Any]], Any]] = {
        "shape": lambda t: t.update({"model.norm.weight": torch.ones(5, dtype=torch.bfloat16)}),
        "stored as I64": lambda t: t.update(
            {"model.norm.weight": torch.ones(32, dtype=torch.int64)}
        ),
        "stored as F8_E4M3": lambda t: t.update(
            {"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}
        ),
    }
    from safetensors.torch import save_file

    stored = load_file(copy / SINGLE)
    for said, fault in faults.items():
        tensors = dict(stored)
        fault(tensors)
        save_file(tensors, copy / SINGLE)
        with pytest.raises(UserError, match=rf"{copy / SINGLE}: model.norm.weight .*{said}"):
            check(copy)
