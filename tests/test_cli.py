"""The command line as a person meets it: whole runs on a tiny model, and mistakes in one sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compress.__main__ import main, run_name
from compress.commands import VERBS
from compress.model.folder import ModelFolder
from tests.exported import checkpoint_bytes

QUICK = [
    "data.sequences=4",
    "data.length=64",
    "eval.tokens=512",
    "eval.window=128",
    "eval.tasks=[]",
    "speed.patterns=[[8,4]]",
    "speed.repeats=2",
]


def compress(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "compress", *words], cwd=cwd, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def sweep(
    tiny: ModelFolder, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One sweep over two recipes, shared by the tests below."""
    cwd = tmp_path_factory.mktemp("sweep")
    done = compress(
        "-m",
        "recipe=rtn-int3,awq-int3",
        f"model={tiny.path}",
        f"data={text_file}",
        f"eval.texts=[{text_file}]",
        "scheme.group_size=32",
        # Three bits cost far more, and everything is written all the same.
        "gate.kl=0.0001",
        *QUICK,
        cwd=cwd,
    )
    assert done.returncode == 1, done.stderr
    return cwd, done


def test_the_gate_sets_the_exit_code(
    sweep: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    cwd, done = sweep
    for recipe in ("rtn-int3", "awq-int3"):
        assert f"compress: {recipe} scheme.group_size=32" in done.stderr
        (run,) = (cwd / "outputs" / "model" / recipe).iterdir()
        metrics = json.loads((run / "metrics.json").read_text())
        gate = metrics["candidate"]["verdict"]["gate"]
        assert (gate["limits"], gate["passed"]) == ({"kl": 0.0001}, False)
        assert gate["failed"][0] in done.stderr
    assert done.stdout.count("gate FAILED: kl") == 2
    assert "None of 2 passes the gate (KL at most 0.0001 on every text)." in done.stdout
    for limit, code in (("0.0001", 1), ("90", 0)):
        again = compress("compare", "outputs", f"gate.kl={limit}", cwd=cwd)
        assert again.returncode == code, again.stdout


def test_a_sweep_ends_in_a_table(sweep: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    cwd, done = sweep
    _, end = done.stdout.split("\nmodel (original) ", 1)
    changed = "scheme.group_size=32 data.sequences=4 data.length=64"
    names = [f"{recipe} {changed}" for recipe in ("rtn-int3", "awq-int3")]
    first, second = end.splitlines()[1:3]
    assert first.startswith(names[0])
    assert second.startswith(names[1])
    again = compress("compare", "outputs", "gate.kl=0", "--out", "report", cwd=cwd)
    assert again.returncode == 1
    rows = [line for line in again.stdout.splitlines() if line.startswith(tuple(names))]
    assert len(rows) == 2
    assert all(row.endswith("FAILED: kl") for row in rows)
    assert "None of 2 passes the gate (KL at most 0 on every text)." in again.stdout
    files = {"report.html", "table.csv", "table.md", "table.tex"}
    assert {file.name for file in (cwd / "report").iterdir()} == files


def test_a_run_folder_holds_what_it_should(
    sweep: tuple[Path, subprocess.CompletedProcess[str]], tiny: ModelFolder
) -> None:
    cwd, _ = sweep
    for recipe in ("rtn-int3", "awq-int3"):
        (run,) = (cwd / "outputs" / "model" / recipe).iterdir()
        assert {"checkpoint", "quantize", "metrics.json", "table.md", "compress.log", ".hydra"} <= {
            f.name for f in run.iterdir()
        }
        metrics = json.loads((run / "metrics.json").read_text())
        assert metrics["model"]["fingerprint"] == tiny.fingerprint
        candidate, base = metrics["candidate"], metrics["base"]
        assert candidate["predicted"]["hardware"] == "cpu"
        assert candidate["predicted"]["bytes"] < base["predicted"]["bytes"]
        (text,) = candidate["texts"].values()
        assert text["kl"] > 0.001, "three bits on a random model must show"
        assert 0 < text["top1"] < 1
        # 3 bits + (16 + 3) / 32 for scale and zero, and 16 bytes of shape a linear.
        linears = 3 * (128 * 128 * 2 + 2 * 64 * 128 + 3 * 256 * 128)
        assert candidate["size"]["bits_linears"] == pytest.approx(
            3 + 19 / 32 + 21 * 16 * 8 / linears, rel=1e-6
        )
        assert base["size"]["bits_linears"] == 16
        weights = (run / "checkpoint" / "model.safetensors").stat().st_size
        assert candidate["size"]["bytes"] == weights < base["size"]["bytes"]
        assert candidate["size"]["bits_file"] == pytest.approx(
            8 * weights / base["size"]["parameters"]
        )
        (ours,), (theirs,) = candidate["speed"]["points"], base["speed"]["points"]
        # 21 linears, the head, and attention in 3 blocks, by whatever runs on this machine.
        assert sum(ours["kernels"].values()) == 25
        assert (ours["batch"], ours["input_length"], ours["output_length"]) == (1, 8, 4)
        assert len(theirs["rounds"]["tokens_per_s"]) == 2
        assert candidate["speed"]["checkpoint_bytes"] == weights
        assert metrics["compression"]["seconds"] > 0
        assert metrics["compression"]["audit"]["linears"] == 21
        assert (metrics["compression"]["calibration_tokens"] is None) == recipe.startswith("rtn")


def test_a_checkpoint_verifies_until_it_is_touched(
    sweep: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    cwd, _ = sweep
    (checkpoint,) = cwd.glob("outputs/model/rtn-int3/*/checkpoint")
    done = compress("verify", str(checkpoint), cwd=cwd)
    assert (done.returncode, done.stdout) == (0, f"{checkpoint}: verified\n")
    extra = checkpoint / "extra.txt"
    extra.write_text("x")
    done = compress("verify", str(checkpoint), cwd=cwd)
    assert done.returncode == 1
    assert "extra.txt is not in the manifest" in done.stdout
    extra.unlink()


def test_evaluate_any_folder(
    sweep: tuple[Path, subprocess.CompletedProcess[str]], tiny: ModelFolder, text_file: Path
) -> None:
    cwd, _ = sweep
    (checkpoint,) = cwd.glob("outputs/model/awq-int3/*/checkpoint")
    run = json.loads((checkpoint.parent / "metrics.json").read_text())
    done = compress(
        "evaluate",
        str(checkpoint),
        "--base",
        str(tiny.path),
        f"eval.texts=[{text_file}]",
        "gate.top1=0.999",
        *QUICK[2:5],
        cwd=cwd,
    )
    assert done.returncode == 1, done.stderr
    assert f"compress: {checkpoint} is outside the gate: top-1 agreement" in done.stderr
    found = json.loads(done.stdout)
    assert found["candidate"]["texts"] == run["candidate"]["texts"], "to the last bit"
    assert found["size"] == run["candidate"]["size"]


def test_bench_measures_every_point_by_every_engine(
    sweep: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    cwd, _ = sweep
    (checkpoint,) = cwd.glob("outputs/model/awq-int3/*/checkpoint")
    mix = ["speed=mix", "speed.mix.input=[8,64]", "speed.mix.output=[8,16]"]
    words = [*mix, "engine=compress,transformers", "speed.batches=[2,1]", *QUICK[5:]]
    done = compress("bench", str(checkpoint), *words, "--out", "found.json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "batch 2, 8/4, tokens/s: checkpoint (compress)" in done.stderr
    assert (cwd / "found.md").read_text() == done.stdout[:-1]
    rows = [line.split("|")[1:5] for line in done.stdout.splitlines() if line.startswith("|")]
    names = [[cell.strip() for cell in row] for row in rows]
    assert names[2:6] == [
        [batch, "8/4", "checkpoint", engine]
        for batch in ("1", "2")
        for engine in ("compress", "transformers")
    ]
    found = json.loads((cwd / "found.json").read_text())
    assert found["command"] == " ".join(["compress bench checkpoint", *words])
    assert str(cwd) not in json.dumps(found)
    speed = found["folders"]["checkpoint"]["compress"]
    assert [point["batch"] for point in speed["points"]] == [2, 1, 2, 1]
    # After the patterns the mix: shorter prompts padded, by both engines the same.
    ours, theirs = (engine["points"][2] for engine in found["folders"]["checkpoint"].values())
    assert (ours["least_input"], ours["input_length"], ours["least_output"]) == (8, 64, 8)
    assert ours["rounds"]["inputs"] == theirs["rounds"]["inputs"]
    assert len(set(ours["rounds"]["inputs"][0])) == 2, "nothing was padded"
    assert (cwd / "found.png").read_bytes().startswith(b"\x89PNG")
    assert sum(speed["points"][0]["kernels"].values()) == 25
    assert speed["load"]["engines"] == ["compress", "transformers"]


def test_bench_measures_a_shape_without_a_folder(tiny: ModelFolder, tmp_path: Path) -> None:
    config = f"shape:{tiny.path / 'config.json'}"
    quantized = f"{config},scheme=int4,scheme.group_size=32,head=int8,kv_cache=int8"
    done = compress("bench", config, quantized, *QUICK[5:], "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)["folders"].values()
    dense, packed = (found["compress"]["points"][0] for found in (first, second))
    assert packed["bytes_per_step"] < 0.5 * dense["bytes_per_step"]
    assert sum(packed["kernels"].values()) == 25


def test_bench_over_a_traffic_ends_in_a_weighted_row(
    sweep: tuple[Path, subprocess.CompletedProcess[str]], tiny: ModelFolder
) -> None:
    cwd, _ = sweep
    (cwd / "asked.csv").write_text("isl,osl\n8,3\n8,3\n8,3\n40,5\n500,300\n")
    folders = [str(tiny.path), str(next(cwd.glob("outputs/model/awq-int3/*/checkpoint")))]
    words = ["speed.repeats=2", "speed.limits={ttft_ms: 60000}", "traffic=asked.csv"]
    short = ["traffic.longest=45", "traffic.patterns=2"]
    done = compress("bench", *folders, *words, *short, "--out", "traffic.json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    found = json.loads((cwd / "traffic.json").read_text())
    mixture = found["traffic"]
    assert mixture["patterns"] == [
        {"input_length": 8, "output_length": 3, "weight": 0.75},
        {"input_length": 40, "output_length": 5, "weight": 0.25},
    ]
    assert found["speed"]["patterns"] == [[8, 3], [40, 5]]
    (row,) = mixture["weighted"]["checkpoint"]["compress"]
    points = found["folders"]["checkpoint"]["compress"]["points"]
    times = [point["rounds"]["e2e_ms"] for point in points]
    assert row["rounds"]["time_per_request_ms"] == pytest.approx(
        [0.75 * short + 0.25 * long for short, long in zip(*times, strict=True)]
    )
    assert [point["meets_limits"] for point in points] == [1, 1]
    assert "(left out: 1 (20.0%) of more than 45 tokens) as 2 sizes" in done.stdout
    assert "- checkpoint: 8/3 batch 1, " in done.stdout
    assert (cwd / "traffic.png").read_bytes().startswith(b"\x89PNG")


def test_traffic_tells_of_a_log_and_invents_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def told(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["compress", "traffic", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        return capsys.readouterr().out

    for name in ("a.jsonl", "b.jsonl"):
        told("--sample", name, "--requests", "50", "--mix", "chat", "--seed", "3")
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    assert "- a.jsonl: 50 requests." in told("a.jsonl", "traffic.patterns=2", "--out", "a.json")
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["requests"], len(found["patterns"])) == (50, 2)
    assert sum(map(sum, found["heat_map"]["requests"])) == 50
    assert json.loads(told("a.jsonl", "traffic.patterns=2", "--json", "--out", "a.png")) == found
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_bench_prints_json_for_programs(
    sweep: tuple[Path, subprocess.CompletedProcess[str]], tiny: ModelFolder
) -> None:
    cwd, _ = sweep
    folders = [str(tiny.path), str(next(cwd.glob("outputs/model/awq-int3/*/checkpoint")))]
    done = compress("bench", *folders, *QUICK[5:], "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)["folders"]) == ["model", "checkpoint"]


MISTAKES = [
    (["bench", "shape:llama-2-7b", "speed.patterns=[32,16]"], "has another form than its key"),
    (["bench", "shape:llama-2-7b", "speed.patterns=[[200000,16]]"], "takes 131072: choose less"),
    (["bench", "shape:gpt-9"], "shape:gpt-9 is not known: known are llama-3.2-1b"),
    (["bench", "shape:llama-2-7b,data=x"], "a shape takes scheme=, head= and kv_cache="),
    (["recipe=awq-int5"], "recipe=awq-int5 is not known: known are awq-int3, awq-int4"),
    (["recipe=rtn-int4", "scheme.gruop_size=3"], "known are bits, group_size, inputs, symmetric"),
    (
        ["recipe=rtn-int4", "data.lenght=3"],
        "data.lenght is not a known key: known are all_experts, field, generated",
    ),
    (["recipe=rtn-int4", "scheme.bits=9"], "scheme.bits=9 is not allowed: choose 2 to 8"),
    (["recipe=rtn-int4", "data.length=abc"], "data.length: Value 'abc'"),
    (["recipe=rtn-int4", "data.sequences=0"], "data.sequences=0 is not allowed"),
    (["recipe=rtn-int4", "model=./nope"], "model './nope' is neither"),
    (["recipe=rtn-int4", "model=nope"], "model=nope is not known: known are folder, smollm2"),
    (["recipe=rtn-int4", "export=nope"], "export=nope is not known: known are awq, bitsandbytes"),
    (["recipe=rtn-int4", "device=tpu"], "device=tpu is not known: choose auto, cpu, or cuda"),
    (
        ["recipe=rtn-int4", "stages=[shrink]"],
        "stages=shrink is not known: known are prune, distill, rotate, quantize, repair",
    ),
    (["recipe=rtn-int4", "stages=[]"], "stages=[] is not allowed: choose from prune, distill"),
    (
        ["recipe=rtn-int4", "stages=[quantize,rotate]"],
        "stages=['quantize', 'rotate'] is not allowed: choose from prune, distill (directly after prune)",
    ),
    (["recipe=rtn-int4", "repair=kl"], "repair=kl needs repair among the stages"),
    (["recipe=rtn-int4", "rounding=[learned,gptq]"], "rounding.gptq starts anew, so it must come"),
    (["recipe=gptq-int4", "rounding.gptq.damping=0"], "rounding.gptq.damping=0.0 is not allowed"),
    (
        ["recipe=fp8", "scheme.bits=6"],
        "scheme.bits=6 is not allowed with type=float: choose 4 or 8",
    ),
    (["recipe=fp8", "scheme.symmetric=false"], "set scheme.symmetric=true"),
    (["recipe=nvfp4", "scheme.group_size=64"], "choose 16 (NVFP4) or 32 (MXFP4)"),
    (
        ["recipe=fp8", "scheme.group_size=row"],
        "choose a number of columns, auto, channel, tensor, block",
    ),
    (
        ["recipe=w8a16-int8", "scheme.group_size=block", "scheme.symmetric=false"],
        "block needs scheme.symmetric=true",
    ),
    (
        ["recipe=w8a8-int8", "scheme.inputs.per=row"],
        "scheme.inputs.per=row is not allowed: choose token",
    ),
    (
        ["recipe=w8a8-int8", "search=average"],
        "search works on integers in groups or rows with 16-bit",
    ),
    (
        ["recipe=w8a8-int8", "stages=[quantize,repair]", "repair=kl"],
        "repair works on integers in groups or rows with 16-bit inputs, not on int8-channel-sym+int8",
    ),
    (
        ["recipe=w8a8-int8", "scheme.inputs=int8"],
        "scheme.inputs=int8 is not allowed: set its parts",
    ),
    (
        ["recipe=llm-int8-static", "rounding=gptq"],
        "rounding=gptq would make up for errors of columns that outliers=static keeps",
    ),
    (
        ["recipe=w8a8-int8", "scheme.inputs.per=group"],
        "no engine runs int8-channel-sym+int8-group from export=compressed-tensors",
    ),
    (
        ["recipe=w8a8-int8", "scheme.inputs.bits=4"],
        "scheme.inputs.bits is not a known key: known are outliers, per, ratio",
    ),
    (
        ["recipe=llm-int8", "scheme.inputs.threshold=0"],
        "threshold=0.0 is not allowed: choose more than 0",
    ),
    (
        ["recipe=llm-int8", "export=compressed-tensors"],
        "has no place for outlier columns: choose export=b",
    ),
    (
        ["recipe=w8a8-int8", "export=bitsandbytes"],
        "holds scheme=llm-int8 alone, not int8-channel-sym+int8",
    ),
    (
        ["recipe=llm-int8", "head=int8"],
        "head works on integers in groups or rows with 16-bit inputs",
    ),
    (
        ["recipe=fp8", "rounding=gptq"],
        "rounding=gptq works on integers in groups or rows, not on fp8",
    ),
    (
        ["recipe=fp8", "transforms=[opt]"],
        "transforms=opt works on integers in groups or rows, not on fp8",
    ),
    (["recipe=w8a8-int8", "transforms.smooth.alpha=2"], "choose 0 to 1, or null"),
    (["recipe=fp8-block"], "which do not divide the"),
    (["recipe=prune-width", "prune.mlp=64"], "prune.mlp is set and among prune.axes too"),
    (["recipe=prune-width", "prune=sizes", "prune.mlp=100"], "prune.mlp=100 is no multiple of 32"),
    (["recipe=prune-width", "data.sequences=16"], "raise data.sequences from 16"),
    (
        ["recipe=prune-width", "stages=[prune,quantize]", "scheme.group_size=64"],
        "scheme.group_size=64 does not divide the 1120 inputs of model.layers.0.mlp.down_proj",
    ),
    (
        ["recipe=prune-width-distill", "distill.optimizer=adamw8bit", "device=cpu"],
        "needs a CUDA device",
    ),
    (
        ["recipe=minitron-awq", "distill.batch=0"],
        "distill.batch=0 is not allowed: choose more than 0",
    ),
    (["recipe=rtn-int4,rtn-int3"], "add -m"),
    (["-m", "recipe=awq-int4", "data.source=gone.txt"], "text file gone.txt does not exist"),
    (["recipe=rtn-int4", "eval.texts=[gone.txt]"], "text file gone.txt does not exist"),
    (["recipe=rtn-int4", "eval.tasks=[nope]"], "eval.tasks=nope is not known to lm-eval"),
    (["recipe=awq-int4", "data.length=1"], "data.length=1 is not allowed: choose 2 or more"),
    (["recipe=rtn-int4", "eval.block_tokens=1"], "eval.block_tokens=1 is not allowed: choose 2 or"),
    (["recipe=best-int3", "data.generated=-1"], "data.generated=-1 is not allowed: choose 0 or"),
    (
        ["recipe=awq-int4", "data.source=sotu-1960-2004+sotu-1960-2004"],
        "names sotu-1960-2004 twice",
    ),
    (
        ["recipe=awq-int4", "data=sotu", "data.sequences=100000"],
        "blocks of 512 tokens, 100000 are needed: lower data.sequences or data.length",
    ),
    (["recipe=best-int3", "data.sequences=1"], "set data.sequences to 2 or more"),
    (["eval=none"], "recipe= is missing: choose one of awq-int3"),
    (["-m", "recipe=rtn-int4", "scheme.bits=4,9"], "scheme.bits=9 is not allowed"),
    (
        ["compares", "outputs"],
        f"compares is neither a verb ({', '.join(VERBS)}) nor",
    ),
    (["recipe=rtn-int4", "scheme.bits=four"], "scheme.bits: Value 'four'"),
    (
        ["recipe=rtn-int4", f"hydra.run.dir={__file__}/x"],
        "cannot be written (Not a directory): choose another",
    ),
    (["compare", "nowhere"], "there is no folder nowhere"),
    (["compare", "."], "no finished run below ."),
    (["compare", ".", "gate.kl=small"], "gate.kl=small is not allowed: choose a number"),
    (["compare", ".", "gate.bits=3"], "choose KEY=VALUE of gate.kl, gate.perplexity, gate.top1, "),
    (["compare", ".", "gate.top1=70"], "gate.top1=70 is not allowed: choose 0 to 1"),
    (["compare", "gate.kl=0.1"], "compare needs at least one DIR"),
    (["compare", ".", "--out", "nowhere/report"], "cannot be written: there is no folder nowhere"),
    (["compare", ".", "--out", __file__], "test_cli.py is not allowed: choose a folder"),
    (["verify", "nowhere"], "there is no folder nowhere"),
    (["evaluate", "./nowhere"], "model './nowhere' is neither"),
    (["bench", "./nowhere"], "model './nowhere' is neither"),
    (["bench", "speed.repeats=2"], "bench needs at least one FOLDER"),
    (
        ["bench", ".", "speed.output_length=8"],
        "known are batches, engines, limits, mix, patterns, repeats, scale, seed",
    ),
    (
        ["bench", ".", "speed.patterns=[[128,1]]"],
        "speed.patterns=[[128, 1]] is not allowed: choose pairs",
    ),
    (["bench", ".", "speed.patterns=[[128,8,1]]"], "is not allowed: choose pairs of tokens in"),
    (["bench", ".", "speed.patterns=[]"], "speed.patterns=[] is not allowed: choose pairs"),
    (
        ["bench", ".", "speed.batches=[8,0]"],
        "speed.batches=[8, 0] is not allowed: choose sizes of 1 or",
    ),
    (["bench", ".", "speed.batches=[]"], "speed.batches=[] is not allowed"),
    (["bench", ".", "speed.repeats=0"], "speed.repeats=0 is not allowed: choose 1 or more"),
    (
        ["bench", ".", "engine=sglang"],
        "speed.engines=sglang is not known: known are compress, transf",
    ),
    (["bench", ".", "speed.engines=[]"], "speed.engines=[] is not allowed: choose from compress"),
    (
        ["bench", ".", "--out", "x.txt"],
        "--out x.txt is not allowed: choose a name that ends in .json",
    ),
    (
        ["bench", ".", "speed=mix", "speed.mix.input=[9]"],
        "speed.mix.input=[9] is not allowed: choose the least and the most tokens, 1 or more",
    ),
    (["bench", ".", "speed=mix", "speed.mix.output=[1,9]"], "tokens, 2 or more, as in speed.mix.o"),
    (["bench", ".", "speed=mix", "speed.mix.output=[9,8]"], "speed.mix.output=[9, 8] is not allow"),
    (["bench", ".", "speed.scale=0"], "speed.scale=0.0 is not allowed: choose a number above 0"),
    (["bench", ".", "speed.limits.itl_ms=0"], "speed.limits.itl_ms=0.0 is not allowed: choose mil"),
    (
        ["bench", ".", "speed.limits={tpot_ms: 1}"],
        "speed.limits.tpot_ms is not a known key: known are itl_ms, ttft_ms",
    ),
    (
        ["bench", "shape:llama-2-7b", "speed=mix", "speed.scale=200"],
        "speed.mix needs 409600 tokens",
    ),
    (["bench", ".", "traffic=gone.csv"], "there is no file gone.csv"),
    (["bench", ".", "traffic.longest=9"], "traffic.longest needs a log: add traffic=FILE"),
    (["bench", ".", "traffic=x.csv", "traffic.most=9"], "traffic.most is not known: known are"),
    (["bench", ".", "traffic=x.csv", "traffic.patterns=0"], "traffic.patterns=0 is not allowed"),
    (
        ["bench", ".", "traffic=x.csv", "speed.patterns=[[8,8]]"],
        "traffic=x.csv and speed.patterns=[[8,8]] both say the sizes: leave one of them out",
    ),
    (["traffic"], "traffic needs a LOG, or --sample FILE"),
    (["traffic", "gone.csv"], "there is no file gone.csv"),
    (["traffic", "a.csv", "b.csv"], "traffic reads one log, not a.csv, b.csv"),
    (["traffic", "a.csv", "speed.batches=[1]"], "speed.batches=[1] is not known to traffic"),
    (["traffic", "a.csv", "--out", "x.svg"], "--out x.svg is not allowed: choose a name that ends"),
    (["traffic", "--sample", "x.txt"], "--sample x.txt is not allowed: choose a name that ends in"),
    (["traffic", "--sample", "x.csv", "--requests", "0"], "--requests=0 is not allowed: choose 1"),
    (["traffic", "--sample", "x.csv", "--rate", "0"], "--rate=0.0 is not allowed: choose a number"),
    (
        ["bench", ".", "--out", "no/x.json"],
        "--out no/x.json cannot be written: there is no folder no",
    ),
]


def test_requests_that_a_model_does_not_take_are_not_dropped_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("isl,osl\n131000,72\n131000,73\n8,8\n8,8\n")
    words = ["bench", "shape:llama-2-7b", f"traffic={tmp_path / 'a.csv'}"]
    monkeypatch.setattr(sys, "argv", ["compress", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "compress: 1 of 4 requests of a.csv (25.0%) need more tokens than the 131072 that shape:llama-2-7b "
        "takes: leave them out with traffic.longest=131072\n"
    )


@pytest.mark.parametrize(("words", "sentence"), MISTAKES, ids=lambda v: " ".join(v)[:40])
def test_mistakes_end_in_one_sentence(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compress", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert len(said.err.splitlines()) == 1, said.err
    assert said.err.startswith("compress: ")
    assert sentence in said.err
    assert said.out == ""
    assert not list(tmp_path.iterdir()), "a mistake must leave nothing behind"


def test_an_engine_that_is_not_there_ends_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    for words in (["bench", ".", "engine=vllm"], ["recipe=rtn-int4", "speed.engines=[vllm]"]):
        monkeypatch.setattr(sys, "argv", ["compress", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        assert (stopped.value.code, said.out) == (2, "")
        assert said.err == (
            "compress: speed.engines=vllm needs the package vllm in this environment: install it, or leave "
            "it out\n"
        )


def test_a_finished_folder_is_not_touched_by_a_refused_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "metrics.json").write_text("{}")
    words = ["recipe=rtn-int4", f"hydra.run.dir={tmp_path / 'done'}"]
    monkeypatch.setattr(sys, "argv", ["compress", *words])
    with pytest.raises(SystemExit):
        main()
    assert "holds a finished run: choose another hydra.run.dir" in capsys.readouterr().err
    assert [f.name for f in (tmp_path / "done").iterdir()] == ["metrics.json"]


def started(words: list[str], cwd: Path, until: str) -> subprocess.Popen[str]:
    """A run in a process of its own that has just said ``until``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "compress", *words], cwd=cwd, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if until in line:
            break
    return process


def test_an_interrupt_ends_in_one_line_and_leaves_no_result(
    tiny: ModelFolder, text_file: Path, tmp_path: Path
) -> None:
    words = ["recipe=awq-int4", f"model={tiny.path}", f"data={text_file}", "eval=none"]
    words += ["data.sequences=4", "data.length=64", "scheme.group_size=32"]
    words += ["speed.patterns=[[128,100]]", "speed.repeats=1000", "hydra.run.dir=out"]
    process = started(words, tmp_path, "measuring decode speed")
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    rest = process.stderr.read()
    assert process.wait(60) == 143
    assert "Traceback" not in rest
    stopped = [line for line in rest.splitlines() if "compress: stopped" in line]
    assert stopped == [
        f"compress: stopped; the same command with hydra.run.dir={tmp_path / 'out'} goes on from there"
    ]
    assert not (tmp_path / "out" / "metrics.json").exists()


PROGRAM = """
import os, signal, sys
from compress import saved
from compress.__main__ import main

# Tests that are started in the background are deaf to it.
signal.signal(signal.SIGINT, signal.default_int_handler)
saved.TIMES, save, left = 0, saved.Saved.save, [int(os.environ["SAVES"])]

def deadly(self, *words):
    save(self, *words)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))

saved.Saved.save = deadly
main()
"""


def program(
    words: list[str], cwd: Path, saves: int = 0, by: str = "SIGKILL"
) -> subprocess.CompletedProcess[str]:
    """The command line, in a process that gets a signal after so many saves."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=cwd,
        env={**os.environ, "SAVES": str(saves), "SIGNAL": by},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_killed_and_interrupted_run_goes_on_to_the_same_bytes(
    tiny: ModelFolder, text_file: Path, tmp_path: Path
) -> None:
    """By SIGKILL after a block, then by Ctrl-C after the next."""
    words = ["recipe=awq-int4", f"model={tiny.path}", f"data={text_file}", "eval=none"]
    words += ["data.sequences=4", "data.length=64", "scheme.group_size=32", "speed=none"]
    words += ["stages=[rotate,quantize]"]
    assert program(words, tmp_path, 4).returncode == -signal.SIGKILL
    (out,) = (tmp_path / "outputs" / "model" / "awq-int4").iterdir()
    assert (out / "rotate").is_dir()
    assert (out / "quantize.state" / "blocks" / "position-1").is_dir()
    stopped = program(words, tmp_path, 1, "SIGINT")
    assert stopped.returncode == 130
    assert f"compress: goes on in {out.relative_to(tmp_path)}, which was left" in stopped.stderr
    assert "rotate: taken over from an earlier start" in stopped.stderr
    assert "quantize goes on after block 1 of 3" in stopped.stderr
    (line,) = [line for line in stopped.stderr.splitlines() if "compress: stopped" in line]
    assert (
        line == f"compress: stopped; the same command with hydra.run.dir={out} goes on from there"
    )
    assert not list(out.glob("*.partial"))
    once = tmp_path / "once"
    for folder, more in ((out, []), (once, [f"hydra.run.dir={once}"])):
        done = program([*words, *more], tmp_path)
        assert done.returncode == 0, done.stderr
        assert ("quantize goes on after block 2 of 3" in done.stderr) == (folder == out)
    assert checkpoint_bytes(out) == checkpoint_bytes(once)
    assert {file.name for file in out.iterdir()} == {file.name for file in once.iterdir()}
    found = json.loads((out / "metrics.json").read_text())["compression"]
    assert found["resumed"] == ["rotate"]
    assert list(found["stage_seconds"]) == ["rotate", "quantize"]
    # Of rotate all three blocks, of quantize those of the last start.
    assert found["state"]["saves"] == 3 + 1
    assert found["state"]["bytes"] > 0
    assert 0 < found["state"]["share"] < 1


def test_a_killed_sweep_goes_on(tiny: ModelFolder, text_file: Path, tmp_path: Path) -> None:
    """By the same command: what is finished stays, what is begun goes on, and all are in the table."""
    words = ["-m", "recipe=rtn-int3,rtn-int4", f"model={tiny.path}", f"data={text_file}"]
    words += ["scheme.group_size=32", "eval=none", "context=none", "speed=none"]
    # Three blocks of the first run, one of the second.
    assert program(words, tmp_path, 4).returncode == -signal.SIGKILL
    (first,) = (tmp_path / "outputs" / "model" / "rtn-int3").iterdir()
    (second,) = (tmp_path / "outputs" / "model" / "rtn-int4").iterdir()
    assert (second / "quantize.state" / "blocks" / "position-1").is_dir()
    before = {file: file.stat().st_mtime_ns for file in [*first.glob("*"), *first.glob("*/*")]}
    done = program(words, tmp_path)
    assert done.returncode == 0, done.stderr
    began = first.name.removesuffix("-0")
    assert f"compress: goes on with the sweep of {began}: 1 of 2 runs are finished" in done.stderr
    assert f"{first}: taken over from an earlier start" in done.stderr
    assert "quantize goes on after block 1 of 3" in done.stderr
    changed = {file for file, time in before.items() if file.stat().st_mtime_ns != time}
    assert {file.name for file in changed if file.parent != first / ".hydra"} <= {
        "compress.log",
        ".hydra",
    }
    for run in (first, second):
        assert list(run.parent.iterdir()) == [run]
        assert (run / "metrics.json").exists()
        assert f"{run.parent.name} scheme.group_size=32" in done.stdout
    # Once more it is a new one: this one is finished. Another version of the program would make it otherwise.
    (second / "metrics.json").unlink()
    known = json.loads((first / "run.json").read_text())
    (first / "run.json").write_text(json.dumps(known | {"code": "0" * 64}))
    assert program(words, tmp_path, 1).returncode == -signal.SIGKILL
    assert len(list(first.parent.iterdir())) == 2


def test_help_explains_groups_and_shows_examples(tmp_path: Path) -> None:
    done = compress("--help", cwd=tmp_path)
    assert done.returncode == 0
    for words in ("recipe: awq-int3", "compress -m recipe=", "compress compare", "scheme.bits"):
        assert words in done.stdout


def test_where_and_how_well_are_no_part_of_a_name() -> None:
    words = ["context=long", "context.text=/home/me/x.txt", "data.source=a.txt", "eval.texts=[a]"]
    assert run_name("rtn-int4", [*words, "scheme.bits=3"]) == "rtn-int4 scheme.bits=3"
