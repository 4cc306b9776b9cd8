"""Damaged folders, recipes and texts, a few hundred by the dozen: each ends well, or in one sentence.

Case i of a kind is drawn from the seed, the kind and i. ``--fuzz-cases N`` runs N cases in all instead of
those below, ``--fuzz-seed S`` others.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pytest
import torch

from calibration.texts import load_mix
from calibration.tokens import calibration_blocks
from compress import pipeline
from compress.__main__ import USER_ERROR, _code
from compress.commands import compare, traffic
from compress.compose import compose_settings
from compress.config import RecipeConfig, parse
from compress.errors import UserError, one_line
from compress.export.audit import verify
from compress.export.formats import Weights
from compress.kv_cache.folder import scales_of, scheme_of
from compress.measure.size import measure_size
from compress.model.folder import ModelFolder
from compress.model.sources import open_tokenizer
from compress.runtime.build import build
from compress.runtime.load import load_dense, load_packed
from eval.faults.tiny import byte_tokenizer
from tests.conftest import write_model
from tests.fuzz.mutations import HOSTILE, change_json, change_text, damage, flip_bytes, truncate
from tests.report_runs import run_of

# How many of each kind there are; with --fuzz-cases they are shared out alike.
CASES = {"model": 220, "formats": 130, "words": 35, "texts": 50, "reports": 35, "logs": 40}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
QUICK = [
    "eval=none",
    "context=none",
    "speed=none",
    "device=cpu",
    "data.sequences=2",
    "data.length=32",
]
GROUPS, NAMED = "scheme.group_size=32", ["model.name=x", "data=text"]
RECIPES = {
    "rtn": ["recipe=rtn-int4", GROUPS],
    "kv": ["recipe=kv-fp8"],
    "awq": ["recipe=awq-int4", GROUPS],
    "rotate": ["recipe=rtn-int4", GROUPS, "stages=[rotate,quantize]"],
}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Originals:
    """What is damaged: models, finished runs in every format, settings that compress the former."""

    models: dict[str, Path]
    folders: dict[str, Path]
    settings: dict[str, RecipeConfig]
    text: Path


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    root = tmp_path_factory.mktemp("originals")
    models = {
        "tied": write_model(root / "tied", **TINY),
        "apart": write_model(root / "apart", "qwen2", tie_word_embeddings=False, **TINY),
    }
    text = root / "text.txt"
    text.write_text("A small bird stood under many old trees near the water. " * 60)
    named = [*NAMED, "model.source=x", f"data.source={text}"]
    settings = {name: compose_settings([*words, *QUICK, *named]) for name, words in RECIPES.items()}
    formats = {
        "packed": ["recipe=rtn-int4", "export=[compressed-tensors,gptq,awq,gguf,dense]", GROUPS],
        "fp8": ["recipe=fp8"],
        "llm-int8": ["recipe=llm-int8"],
        "llm-int8-static": ["recipe=llm-int8-static"],
        "kv": ["recipe=kv-fp8"],
        "kv-int4": ["recipe=kv-int4"],
    }
    folders = {}
    for name, words in formats.items():
        run = compose_settings([*words, *QUICK, *named, f"model.source={models['tied']}"])
        pipeline.run_recipe(parse(run), name, root / name)
        for folder in (root / name).iterdir():
            if (folder / "config.json").exists():
                folders[f"{name}/{folder.name}"] = folder
    return Originals(models, folders, settings, text)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Runs file their outputs here, and what Hydra does to logging is undone. What is in memory by now is
    left out when a run collects garbage, which would take most of its time."""
    gc.freeze()
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, logging.root.manager.disable
    monkeypatch.chdir(tmp_path)
    logging.disable(logging.ERROR)
    yield
    gc.unfreeze()
    logging.disable(disabled)
    root.handlers[:], root.level = handlers, level


Case = Callable[[Originals, Path, Random], str]


def model_case(originals: Originals, place: Path, chance: Random) -> str:
    """A damaged model is checked, and compressed if that finds nothing."""
    name = chance.choice(sorted(originals.models))
    folder = shutil.copytree(originals.models[name], place / "model", symlinks=True)
    recipe = chance.choice(["rtn"] * 7 + ["kv", "awq", "rotate"])
    said = f"{recipe} of {name}: {damage(folder, chance)}"
    settings = deepcopy(originals.settings[recipe])
    settings.model.source = str(folder)
    out = place / "out"

    def run() -> None:
        checked = parse(settings)
        pipeline.check(checked, out)
        assert not out.exists(), "the check wrote something"
        pipeline.run_recipe(checked, "fuzz", out)
        assert verify(out / "checkpoint") == []

    if chance.random() < 0.1:
        words = [*RECIPES[recipe], *QUICK, *NAMED, f"data.source={originals.text}"]
        _judge_command(
            said, lambda: _code([*words, f"model.source={folder}", f"hydra.run.dir={out}"])
        )
    else:
        _judge(said, run, names=[str(place / "model")])
    left = [f.name for f in out.rglob("*") if ".partial" in f.name] if out.exists() else []
    assert not left, (said, left)
    finished = (out / "metrics.json").exists()
    assert finished or not (out / "checkpoint").exists(), (said, "a checkpoint of a failed run")
    return "compressed" if finished else "refused"


def formats_case(originals: Originals, place: Path, chance: Random) -> str:
    """A damaged record or export is read as evaluation, serving and verify read it."""
    name = chance.choice(sorted(originals.folders))
    folder = shutil.copytree(originals.folders[name], place / "folder", symlinks=True)
    reader = chance.choice(["dense", "packed", "engine"])
    said = f"{reader} of {name}: {damage(folder, chance)}"

    def read() -> None:
        opened = ModelFolder(folder)
        open_tokenizer(opened)
        measure_size(opened)
        scheme = scheme_of(opened)
        if scheme is not None:
            scales_of(opened, scheme, CPU)
        if reader == "engine":
            build(Weights(opened), CPU)
            return
        model = load_dense(opened, CPU, torch.float32)
        if reader == "packed":
            model, _ = load_packed(opened, CPU)
        with torch.no_grad():
            model(input_ids=torch.arange(8).unsqueeze(0), use_cache=False)

    found = _judge(said, read, names=[str(folder)])
    if (folder / "manifest.json").exists():
        problems: list[str] = []
        if _judge(said, lambda: problems.extend(verify(folder))) == "fine" and not problems:
            # Only what hardly matters may go unseen: a byte that was drawn as it is.
            same = all(
                (folder / file.name).read_bytes() == file.read_bytes()
                for file in originals.folders[name].iterdir()
                if file.name != "manifest.json"
            )
            assert same, (said, "verify saw nothing")
    return found


WORDS = [
    "recipe", "model.name", "model.source", "model.revision", "model.allow_pickle", "data.source",
    "data.field", "data.split", "data.sequences", "data.length", "data.seed", "data.generated",
    "scheme", "scheme.bits", "scheme.group_size", "scheme.symmetric", "scheme.type",
    "scheme.inputs", "transforms", "rounding", "rounding.gptq.damping", "head", "search",
    "search.average_bits", "repair", "prune", "prune.share", "distill", "kv_cache",
    "kv_cache.keys.bits", "kv_cache.window", "stages", "export", "eval", "eval.texts",
    "eval.tokens", "eval.window", "eval.tasks", "context", "speed", "speed.patterns",
    "speed.batches", "gate.kl", "serve.engines", "serve.tp", "hardware", "plan.batches", "device",
    "hydra.run.dir", "hydra.job.name", "+hydra.callbacks.x", "hydra/launcher", "+unknown",
    "++scheme._target_", "_target_", "~scheme", "--config-dir", "-m", "--cfg",
]  # fmt: skip
VALUES = [
    "null", "", "-1", "0", "1", "3", "1e400", "nan", "x", "[]", "[x]", "[[1]]", "{}", "{a:1}",
    "{_target_:os.system}", "'", "\"", "[", "{", "${x}", "${oc.env:HOME}", "${eval:1+1}", "a,b",
    "range(1,3)", "int4", "rtn-int4", "../x", "true", "\n", "\x1b[0m", "é", "9" * 30, "a=b",
    "/proc/x", "/etc/passwd", "/dev/null/x", "n" * 300,
]  # fmt: skip


def words_case(originals: Originals, place: Path, chance: Random) -> str:
    """The command line itself, with words that mean nothing."""
    source = originals.models["tied"]
    words = ["recipe=rtn-int4", f"model.source={source}", "model.name=x", GROUPS, *QUICK]
    for _ in range(chance.choice([1, 1, 2])):
        key = chance.choice(WORDS)
        word = f"{key}={chance.choice(VALUES)}" if chance.random() < 0.95 else key
        words.insert(chance.randrange(len(words) + 1), word)
    return _judge_command(repr(words), lambda: _code(words))


def texts_case(originals: Originals, place: Path, chance: Random) -> str:
    """A text that is none, or less than is asked for."""
    file = place / f"text{chance.choice(['.txt', '.json', '.jsonl', '.csv', '.parquet'])}"
    text = originals.text.read_text()
    if file.suffix == ".parquet":
        datasets.Dataset.from_dict({"text": [text, text]}).to_parquet(file)
    elif file.suffix == ".txt":
        file.write_text(text)
    else:
        line = f"text\n{text}\n" if file.suffix == ".csv" else json.dumps({"text": text}) + "\n"
        file.write_text(line)
    said = chance.choice([change_text, change_text, change_text, truncate, flip_bytes])(
        file, chance
    )
    tokenizer = byte_tokenizer()

    def draw() -> None:
        mix = load_mix(str(file), "text", "train")
        calibration_blocks(mix, tokenizer, sequences=2, length=32, seed=0)

    return _judge(f"{file.suffix}: {said}", draw, names=[str(file)])


def reports_case(originals: Originals, place: Path, chance: Random) -> str:
    """A run of others whose metrics.json says something else."""
    for i, name in enumerate(("awq-int4", "rtn-int4")):
        (place / str(i)).mkdir()
        file = place / str(i) / "metrics.json"
        file.write_text(json.dumps(run_of(name)))
    said = change_json(file, chance)
    words = [str(place), *(["--out", str(place / "report")] if chance.random() < 0.2 else [])]
    return _judge_command(said, lambda: compare.main(words))


def logs_case(originals: Originals, place: Path, chance: Random) -> str:
    """A log of requests with values that are no counts."""
    rows = [{"input_tokens": 5, "output_tokens": 7, "time": 1.0 + i} for i in range(4)]
    for _ in range(chance.choice([1, 2])):
        chance.choice(rows)[chance.choice([*rows[0], "x"])] = chance.choice(HOSTILE)
    file = place / f"log{chance.choice(['.jsonl', '.csv', '.tsv'])}"
    lines = [json.dumps(row) for row in rows]
    if file.suffix != ".jsonl":
        between = "," if file.suffix == ".csv" else "\t"
        lines = [between.join(rows[0]), *(between.join(map(ascii, r.values())) for r in rows)]
    file.write_text("\n".join(lines))
    said = truncate(file, chance) if chance.random() < 0.2 else "values"
    if chance.random() < 0.2:
        file.write_bytes(
            chance.choice([b"[" * 50_000, b"\xff\xfe", b'{"input_tokens": ' + b"9" * 5000 + b"}"])
        )
    return _judge_command(f"{said}: {lines}", lambda: traffic.main([str(file)]))


def _judge(said: str, run: Callable[[], Any], names: list[str] | None = None) -> str:
    """Whether it ended well; anything but success and a UserError, one line that names the file, is a
    fault."""
    try:
        run()
    except UserError as error:
        sentence = one_line(error)
        assert sentence, said
        assert len(sentence) < 3000, (said, sentence)
        assert names is None or any(n in sentence for n in names), (said, sentence)
        return "refused"
    return "fine"


def _judge_command(said: str, command: Callable[[], int]) -> str:
    """The same of a command; a gate's 1 is success too."""
    code: object
    try:
        code = command()
    except UserError:
        return "refused"
    except SystemExit as stop:
        # argparse, of options.
        code = stop.code
    assert code in (0, 1, USER_ERROR), (said, code)
    return "refused" if code == USER_ERROR else "fine"


@pytest.mark.parametrize("kind", CASES)
def test_faults_end_in_one_sentence(
    kind: str,
    originals: Originals,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run: Case = globals()[f"{kind}_case"]
    seed, asked = request.config.getoption("fuzz_seed"), request.config.getoption("fuzz_cases")
    cases = CASES[kind] if asked is None else -(-asked * CASES[kind] // sum(CASES.values()))
    outcomes: Counter[str] = Counter()
    faults = []
    for i in range(cases):
        place = tmp_path / str(i)
        place.mkdir()
        try:
            outcomes[run(originals, place, Random(f"{seed} {kind} {i}"))] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            told = "".join(traceback.format_exception(error)[-3:])
            faults.append(f"--fuzz-seed {seed}, {kind} case {i}:\n{told}")
        printed = capsys.readouterr().err.strip()
        # One line, but of argparse.
        if "Traceback" in printed or (
            kind == "words" and "\n" in printed and not printed.startswith("usage:")
        ):
            faults.append(f"--fuzz-seed {seed}, {kind} case {i} printed:\n{printed[-1500:]}")
        shutil.rmtree(place)
    said = f"{kind} {cases} cases, {dict(outcomes)}, {len(faults)} faults"
    with capsys.disabled():
        sys.stdout.write(f"\nfuzz, --fuzz-seed {seed}: {said}\n")
    assert not faults, f"{len(faults)} of {cases}\n" + "\n".join(faults[:30])
    # If nothing were refused nothing would have been damaged; if all is, it may be for one and the same
    # reason. Words that mean nothing hardly ever pass.
    assert outcomes["refused"] > cases / 10
    assert outcomes["refused"] < cases or kind == "words"
