"""What a run leaves behind when it does not end well, and the numbers of one seeded run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibration.tokens import calibration_blocks
from compress import pipeline, stages
from compress.compose import compose_settings
from compress.config import parse
from compress.errors import UserError
from compress.export.audit import verify
from compress.kv_cache.folder import scheme_of
from compress.model.families import LLAMA
from compress.model.folder import ModelFolder
from compress.prune.knobs import Prune
from compress.prune.stage import prune
from compress.quantize.record import read_linear
from compress.quantize.repair import Kl
from compress.quantize.rounding import Gptaq, Gptq, Learned, Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize, settle
from compress.quantize.transforms import AwqClip, AwqScale, Opt, Smooth
from compress.runtime.load import load_dense
from compress.saved import changes
from eval.faults.tiny import byte_tokenizer
from tests.conftest import write_model
from tests.exported import checkpoint_bytes

PLAIN: dict[str, Any] = {
    "tokens": None,
    "schemes": Schemes(Scheme(4, 32)),
    "transforms": [],
    "roundings": [Nearest()],
    "device": torch.device("cpu"),
}
GOLDEN = Path(__file__).parent / "golden" / "tiny_awq_int3.json"
GOLDEN_METHODS = GOLDEN.with_name("tiny_methods.json")


def run_of(tiny: ModelFolder, text_file: Path, *words: str) -> pipeline.Run:
    return parse(
        compose_settings(
            [
                *([] if any(word.startswith("recipe=") for word in words) else ["recipe=awq-int4"]),
                f"model.source={tiny.path}",
                "data=text",
                f"data.source={text_file}",
                "data.sequences=4",
                "data.length=64",
                "scheme.group_size=32",
                "eval=none",
                "speed=none",
                *words,
            ]
        )
    )


@pytest.mark.parametrize(
    "broken", ["compress.pipeline.audit", "compress.quantize.stage._copy_rest"]
)
def test_a_failed_run_leaves_nothing_that_looks_finished(
    tiny: ModelFolder,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(broken, fail)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run_recipe(run_of(tiny, text_file), "awq", tmp_path)
    left = {f.name for f in tmp_path.iterdir()}
    assert "checkpoint" not in left
    assert "metrics.json" not in left
    assert not any(name.endswith(".partial") for name in left)


def test_a_finished_run_is_not_overwritten(
    tiny: ModelFolder, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(UserError, match="is not empty: choose another"):
        pipeline.run_recipe(run_of(tiny, text_file), "awq", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


ALL_STAGES = [
    "stages=[rotate,quantize,repair,kv_cache]",
    "repair=kl",
    "repair.kl.epochs=1",
    "kv_cache=fp8",
    "data.generated=3",
]
STEPS = ["generate", "rotate", "quantize", "repair", "kv_cache", "checkpoint"]


def test_a_run_that_is_killed_in_every_step_ends_in_the_same_bytes(
    tiny: ModelFolder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tiny, text_file, *ALL_STAGES)
    once = pipeline.run_recipe(run, "once", tmp_path / "once")
    out = tmp_path / "killed"

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for i, name in enumerate(STEPS):
        with monkeypatch.context() as broken:
            if name in stages._STAGES:
                broken.setitem(stages._STAGES, name, fail)  # type: ignore[arg-type]
            else:
                broken.setattr(pipeline, {"generate": "_generate"}.get(name, "audit"), fail)
            with pytest.raises(KeyboardInterrupt):
                pipeline.run_recipe(run, "killed", out)
        assert {f.name for f in out.iterdir() if f.is_dir()} == set(STEPS[:i])
    metrics = pipeline.run_recipe(run, "killed", out)
    assert checkpoint_bytes(out) == checkpoint_bytes(tmp_path / "once")
    found, expected = metrics["compression"], once["compression"]
    assert expected["resumed"] == []
    assert found["resumed"] == STEPS[:-1]
    assert list(found["stage_seconds"]) == STEPS[:-1]
    assert found["seconds"] > sum(found["stage_seconds"].values())
    for key in ("repair", "rotate", "kv_cache", "scheme", "origin", "generated_tokens", "audit"):
        assert found[key] == expected[key], key


def test_after_compression_only_measuring_is_done_again(
    tiny: ModelFolder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What measures may be asked for otherwise: it changes no checkpoint."""
    measuring = ["eval=standard", f"eval.texts=[{text_file}]", "eval.tasks=[]", "eval.window=64"]
    with monkeypatch.context() as broken:
        broken.setattr(pipeline, "measure_size", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipeline.run_recipe(run_of(tiny, text_file), "awq", tmp_path)
    before = checkpoint_bytes(tmp_path)
    monkeypatch.setattr(stages, "_STAGES", {})
    run = run_of(tiny, text_file, *measuring, "eval.tokens=256")
    metrics = pipeline.run_recipe(run, "awq", tmp_path)
    assert metrics["compression"]["resumed"] == ["quantize", "checkpoint"]
    assert metrics["candidate"]["texts"][str(text_file)]["perplexity"] > 1
    assert len(metrics["compression"]["block_kl"][str(text_file)]) == 3
    assert checkpoint_bytes(tmp_path) == before
    with pytest.raises(UserError, match="holds a finished run: choose another"):
        pipeline.run_recipe(run, "awq", tmp_path)


def test_another_recipe_starts_anew_where_it_differs(
    tiny: ModelFolder,
    make_model: Callable[..., ModelFolder],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And ends as if nothing had been there."""
    out, rotated = tmp_path / "out", "stages=[rotate,quantize]"

    def killed(recipe: pipeline.Run) -> list[str]:
        """What was said of a run that ends at the audit of its checkpoint."""
        caplog.clear()
        with monkeypatch.context() as broken:
            broken.setattr(pipeline, "audit", lambda *_: 1 / 0)
            pipeline.check(recipe, out)
            with pytest.raises(ZeroDivisionError):
                pipeline.run_recipe(recipe, "run", out)
        return [line for line in caplog.messages if "anew" in line]

    assert killed(run_of(tiny, text_file, rotated)) == []
    assert killed(run_of(tiny, text_file, rotated)) == []
    for word, said in (
        ("scheme.bits=3", "scheme.bits was 4, is 3"),
        (
            "transforms.awq_scale.grid=3",
            "scheme.bits was 3, is 4, transforms.awq_scale.grid was 20, is 3",
        ),
    ):
        (line,) = killed(run_of(tiny, text_file, rotated, word))
        assert line == f"quantize starts anew: {said}"
        assert (out / "rotate").exists()
    bigger = make_model(num_hidden_layers=4)
    (line,) = killed(run_of(bigger, text_file, rotated))
    assert line.startswith("rotate starts anew: model.fingerprint is another")
    with monkeypatch.context() as changed:
        changed.setattr(pipeline, "code", lambda: "0" * 64)
        (line,) = killed(run_of(bigger, text_file, rotated))
    assert line.startswith("rotate starts anew: code is another")
    recipe = run_of(tiny, text_file, "scheme.bits=3")
    for folder in (out, tmp_path / "once"):
        metrics = pipeline.run_recipe(recipe, "run", folder)
        assert metrics["compression"]["resumed"] == []
    assert checkpoint_bytes(out) == checkpoint_bytes(tmp_path / "once")
    names = [{file.name for file in path.iterdir()} for path in (out, tmp_path / "once")]
    assert names[0] == names[1]


def test_what_decides_a_step(
    make_model: Callable[..., ModelFolder], text_file: Path, tmp_path: Path
) -> None:
    """A manifest names the whole recipe; a checkpoint has the tokenizer's files."""
    model = make_model()

    def of(*words: str) -> dict[str, Any]:
        recipe = run_of(model, text_file, "rounding=nearest", "transforms=[]", *words)
        assert not recipe.needs_data
        return pipeline._fingerprints(recipe, pipeline._decisive(recipe, model))

    asked, other = of("export=[gptq,gguf]"), of("export=[gptq,gguf]", "data.sequences=3")
    assert list(asked) == ["quantize", "checkpoint", "checkpoint-gguf"]
    assert asked["quantize"] == other["quantize"]
    for name in ("checkpoint", "checkpoint-gguf"):
        assert changes(asked[name], other[name]) == "data.sequences was 4, is 3"
    file = model.path / "tokenizer_config.json"
    file.write_text(file.read_text() + " ")
    for name, known in asked.items():
        said = changes(known, of("export=[gptq,gguf]")[name])
        assert said.startswith("model.files.tokenizer_config.json is another")


DISTILLED = ["stages=[quantize,distill]", "distill=kl", "distill.length=32"]


def test_what_may_change_in_a_distillation_that_goes_on(tiny: ModelFolder, text_file: Path) -> None:
    """How often it saves and logs; the minutes only where they are the budget."""

    def asked(*words: str) -> pipeline.Run:
        return run_of(tiny, text_file, *DISTILLED, *words)

    def of(recipe: pipeline.Run) -> dict[str, Any]:
        return pipeline._fingerprints(recipe, pipeline._decisive(recipe, tiny))

    free = ["distill.save_every=3", "distill.log_every=7"]
    for budget, may_change in (("distill.steps=4", True), ("distill.minutes=30", False)):
        asked_for = of(asked(budget))
        assert of(asked(budget, *free)) == asked_for
        assert pipeline._recipe_hash(asked(budget, *free), None) == pipeline._recipe_hash(
            asked(budget), None
        )
        other = of(asked(budget, "distill.rate=0.1"))
        assert other["quantize"] == asked_for["quantize"]
        assert changes(asked_for["distill"], other["distill"]) == "distill.rate was 0.0002, is 0.1"
        assert other["checkpoint"] != asked_for["checkpoint"]
        assert (of(asked(budget, "distill.minutes=10")) == asked_for) == may_change


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill.teacher=cached", "distill.top_k=321"], r"top_k=321 .* at most the 320 of the"),
        (["distill.length=257"], r"length=257 is not allowed: .* takes 256"),
        (
            ["stages=[rotate,quantize,distill]", "distill.hidden=1"],
            r"leave out rotate or distill\.hidden",
        ),
    ],
)
def test_distillations_that_are_refused_before_anything_runs(
    tiny: ModelFolder, text_file: Path, words: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pipeline.check(run_of(tiny, text_file, *DISTILLED, "distill.steps=4", *words))


def test_states_are_compared_before_they_are_rotated(tiny: ModelFolder, text_file: Path) -> None:
    """A rotation after distillation does not matter to it."""
    words = ["recipe=minitron-awq", "prune=sizes", "prune.mlp=192", "distill=kl", "distill.steps=4"]
    words += ["stages=[prune,distill,rotate,quantize]", "distill.length=32", "distill.hidden=1"]
    pipeline.check(run_of(tiny, text_file, *words))


def test_a_distillation_is_given_the_text_it_may_see(tiny: ModelFolder, text_file: Path) -> None:
    """What a few steps see and 16 sequences held out; all of it where nobody knows the steps."""

    def blocks(*words: str) -> int:
        run = run_of(tiny, text_file, *DISTILLED, *words)
        return len(stages.training_text(run, tiny).tokens)

    few, whole = blocks("distill.steps=4"), blocks("distill.minutes=1")
    assert few == 256 < whole
    assert blocks("distill.steps=70") == 280 + 280 // 15 + 1


def tokens_seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Filled with the tokens that the quantize stage is given."""
    seen: list[Tensor] = []

    def quantize(*args: Any, **kwargs: Any) -> dict[str, Any]:
        seen.append(kwargs["tokens"])
        return stage_quantize(*args, **kwargs)

    stage_quantize = stages.quantize
    monkeypatch.setattr(stages, "quantize", quantize)
    return seen


def test_stages_follow_each_other_and_leave_their_folders(
    tiny: ModelFolder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tokens_seen(monkeypatch)
    words = ["stages=[quantize,repair]", "repair=kl", "repair.kl.epochs=1"]
    words += ["data.generated=3", "data.generated_before_repair=2"]
    metrics = pipeline.run_recipe(run_of(tiny, text_file, *words), "repaired", tmp_path)
    found = metrics["compression"]
    assert set(found["stage_seconds"]) == {"generate", "quantize", "repair"}
    assert found["calibration_tokens"] == [4, 64]
    assert found["generated_tokens"] == [3, 64]
    # Repair sees all that the original wrote but for the sequence that is held out, rounding what it
    # was told to.
    assert found["repair"]["tokens"] == 6 * 64
    assert seen[0].shape == (6, 64)
    text = pipeline._calibration(run_of(tiny, text_file), tiny)
    assert text is not None
    assert {tuple(row) for row in text.tokens.tolist()} <= {tuple(r) for r in seen[0].tolist()}
    decided, repaired = ModelFolder(tmp_path / "quantize"), ModelFolder(tmp_path / "repair")
    checkpoint = ModelFolder(tmp_path / "checkpoint")
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(decided.tensor(f"{name}.codes"), repaired.tensor(f"{name}.codes"))
    # What is exported is what the last stage left.
    scale = checkpoint.tensor(f"{name}.weight_scale")
    assert torch.equal(scale, repaired.tensor(f"{name}.scale"))
    assert not torch.equal(scale, decided.tensor(f"{name}.scale"))


def test_without_repair_rounding_sees_all_that_was_written(
    tiny: ModelFolder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tokens_seen(monkeypatch)
    words = ["data.generated=3", "data.generated_before_repair=2"]
    pipeline.run_recipe(run_of(tiny, text_file, *words), "plain", tmp_path)
    assert seen[0].shape == (7, 64)


def test_written_text_joins_as_far_as_it_is_told_to() -> None:
    """Rows of calibration are 0, written ones 1, 2, 3."""
    tokens = torch.zeros(4, 1, dtype=torch.int64)
    written = torch.tensor([[1], [2], [3]])
    assert sorted(_rows(pipeline._seen(tokens, written, 2))) == [0, 0, 0, 0, 1, 2]
    assert sorted(_rows(pipeline._seen(tokens, written, None))) == [0, 0, 0, 0, 1, 2, 3]
    assert _rows(pipeline._seen(tokens, written, 0)) == [0, 0, 0, 0]
    assert pipeline._seen(tokens, None, None) is tokens
    assert pipeline._seen(None, None, None) is None


def _rows(tokens: Tensor | None) -> list[int]:
    assert tokens is not None
    return [int(value) for value in tokens.squeeze(1)]


def changed(
    tiny: ModelFolder, path: Path, config: dict[str, object], tensors: dict[str, Any]
) -> ModelFolder:
    """A copy of the tiny model with other config entries and tensors; None takes one away."""
    path.mkdir()
    stored = load_file(tiny.path / "model.safetensors") | tensors
    save_file({n: t for n, t in stored.items() if t is not None}, path / "model.safetensors")
    merged = {k: v for k, v in {**tiny.config, **config}.items() if v is not None}
    (path / "config.json").write_text(json.dumps(merged))
    return ModelFolder(path)


def test_sources_that_cannot_be_quantized_are_refused(tiny: ModelFolder, tmp_path: Path) -> None:
    fp8 = changed(tiny, tmp_path / "a", {"quantization_config": {"quant_method": "fp8"}}, {})
    with pytest.raises(UserError, match="is quantized already"):
        settle(fp8, LLAMA, Schemes(Scheme(4, 32)))
    bias = {"model.layers.1.self_attn.q_proj.bias": torch.zeros(128)}
    with pytest.raises(
        UserError,
        match=r"q_proj.bias, which its config.json has no place for",
    ):
        quantize(changed(tiny, tmp_path / "b", {}, bias), tmp_path / "r1", **PLAIN)
    none = {"model.layers.1.input_layernorm.weight": None}
    with pytest.raises(UserError, match=r"holds no tensor model.layers.1.input_layernorm.weight"):
        quantize(changed(tiny, tmp_path / "c", {}, none), tmp_path / "r2", **PLAIN)


def test_files_older_and_wider_than_their_config(
    tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """float32 norms, stored rotary tables and a dead linear do not stop a run."""
    norms = ("model.norm.weight", "model.layers.0.input_layernorm.weight")
    tensors: dict[str, Any] = {name: tiny.tensor(name).float() for name in norms}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(256, 128, dtype=torch.bfloat16)
    odd = changed(tiny, tmp_path / "odd", {}, tensors)
    settings = {**PLAIN, "tokens": tokens, "transforms": [AwqScale(), AwqClip()]}
    report = quantize(odd, tmp_path / "record", **settings)
    assert report["blocks"][1]["linears"]["mlp.up_proj"]["relative_error"] == 0
    record = ModelFolder(tmp_path / "record")
    assert all(record.tensor(name).dtype == torch.bfloat16 for name in norms)
    load_dense(odd, torch.device("cpu"), torch.bfloat16)
    load_dense(record, torch.device("cpu"), torch.bfloat16)
    assert changed(tiny, tmp_path / "none", {"dtype": None}, {}).dtype == torch.bfloat16


def test_narrowing_before_scaling_is_refused(
    tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path
) -> None:
    settings = {**PLAIN, "tokens": tokens, "transforms": [AwqClip(), AwqScale()]}
    with pytest.raises(UserError, match=r"awq_scale.*before"):
        quantize(tiny, tmp_path / "record", **settings)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ],
)
def test_weights_that_are_no_numbers_are_refused_by_name(
    tiny: ModelFolder, tmp_path: Path, name: str, value: float
) -> None:
    tensor = tiny.tensor(name).clone()
    tensor.view(-1)[5] = value
    with pytest.raises(UserError, match=f"tensor {name} holds NaN or Inf"):
        quantize(changed(tiny, tmp_path / "odd", {}, {name: tensor}), tmp_path / "record", **PLAIN)
    assert not (tmp_path / "record" / "config.json").exists()


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(8, "channel", True),
        Scheme(8, "tensor", True),
        Scheme(8, "channel", True, "float"),
        Scheme(8, "tensor", True, "float"),
        Scheme(8, "block", True, "float"),
        Scheme(4, 16, True, "float"),
        Scheme(4, 32, True, "float"),
    ],
    ids=lambda scheme: scheme.name,
)
def test_rows_of_zeros_and_spikes_come_back_finite(
    tiny: ModelFolder, tmp_path: Path, scheme: Scheme
) -> None:
    """A row of zeros stays one; a weight far above the others, or at the end of bf16, saturates nothing."""
    name = "model.layers.1.mlp.up_proj"
    weight = tiny.tensor(f"{name}.weight").clone()
    weight[3], weight[5, 7], weight[6, 8] = 0, 1e4, -1e30
    odd = changed(tiny, tmp_path / "odd", {}, {f"{name}.weight": weight})
    quantize(odd, tmp_path / "record", **{**PLAIN, "schemes": Schemes(scheme)})
    W = read_linear(ModelFolder(tmp_path / "record"), name).dequantize(torch.float32)
    assert torch.isfinite(W).all()
    assert not W[3].any()
    assert W[6, 8] == pytest.approx(-1e30, rel=0.07)
    # Alone at its input, so that no other tensor lends it a scale.
    name = "model.layers.2.mlp.down_proj"
    for value in (0.0, 1e-38):
        dead = {f"{name}.weight": torch.full_like(tiny.tensor(f"{name}.weight"), value)}
        target = tmp_path / f"dead-{value}"
        quantize(
            changed(tiny, tmp_path / f"from-{value}", {}, dead),
            target,
            **{**PLAIN, "schemes": Schemes(scheme)},
        )
        W = read_linear(ModelFolder(target), name).dequantize(torch.float32)
        assert torch.allclose(W, torch.full_like(W, value), atol=1e-37)


def test_golden_errors_of_a_seeded_run(
    make_model: Callable[..., ModelFolder],
    text_file: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Relative output errors of every linear, to 2 %. In float32: processors multiply bf16 in other orders,
    and an integer that falls the other way moves those after it."""
    tiny = make_model(dtype="float32")
    blocks = calibration_blocks(
        {"text": [text_file.read_text()]}, byte_tokenizer(), sequences=8, length=64, seed=0
    )
    found = {}
    for name, transforms in (("rtn", []), ("awq", [AwqScale(), AwqClip()])):
        settings = {**PLAIN, "schemes": Schemes(Scheme(3, 32)), "transforms": transforms}
        report = quantize(tiny, tmp_path / name, **{**settings, "tokens": blocks.tokens})
        found[name] = [
            {linear: entry["relative_error"] for linear, entry in block["linears"].items()}
            for block in report["blocks"]
        ]
    if request.config.getoption("--golden"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    for name, blocks_found in found.items():
        for got, expected in zip(blocks_found, golden[name], strict=True):
            assert got == pytest.approx(expected, rel=0.02)
    # In the first block both see the same inputs: AWQ lowers the error of every linear it may
    # change.
    better = [found["awq"][0][k] < found["rtn"][0][k] for k in ("mlp.gate_proj", "mlp.down_proj")]
    assert all(better)


PRUNED: dict[str, dict[str, Any]] = {
    "prune width": {"heads": 2, "mlp": 160},
    "prune depth": {"layers": 2},
    "prune hidden": {"hidden": 96, "importance": "activation"},
    "merge kv_heads": {"kv_heads": 1, "kv": "principal"},
}
METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"roundings": [Gptq()]},
    "gptaq": {"roundings": [Gptaq()]},
    "learned": {"roundings": [Learned(iters=10, batch=4)]},
    "opt": {"transforms": [Opt()]},
    "opt+gptq": {"transforms": [Opt()], "roundings": [Gptq()]},
    "smooth": {"transforms": [Smooth()]},
}


def test_golden_numbers_of_every_method(
    make_model: Callable[..., ModelFolder],
    tokens: torch.Tensor,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Relative output errors of the linears to 3 %: of the first block, where all methods see the same
    inputs, and of the last. Repair's KL to 5 %. Errors of pruned blocks to 1 %. In float32, as above."""
    tiny = make_model(dtype="float32")
    found: dict[str, Any] = {}
    for name, methods in METHODS.items():
        settings = {**PLAIN, "schemes": Schemes(Scheme(3, 32)), **methods}
        report = quantize(tiny, tmp_path / name, **{**settings, "tokens": tokens})
        ends = (report["blocks"][0], report["blocks"][-1])
        found[name] = [
            {linear: entry["relative_error"] for linear, entry in block["linears"].items()}
            for block in ends
        ]
    repair = Kl(epochs=2, rate=5e-3)
    source = ModelFolder(tmp_path / "opt+gptq")
    device = PLAIN["device"]
    report = repair(source, tiny, tmp_path / "repaired", tokens, device)
    found["repair"] = report["kl"]
    for name, knobs in PRUNED.items():
        report = prune(tiny, tmp_path / name, Prune(**knobs), tokens=tokens, device=device)["prune"]
        found[name] = [block["errors"] for block in report["blocks"]]
    if request.config.getoption("--golden"):
        GOLDEN_METHODS.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN_METHODS.read_text())
    assert found.keys() == golden.keys()
    for name in METHODS:
        for got, expected in zip(found[name], golden[name], strict=True):
            assert got == pytest.approx(expected, rel=0.03), name
    assert found["repair"] == pytest.approx(golden["repair"], rel=0.05)
    for name in PRUNED:
        for got, expected in zip(found[name], golden[name], strict=True):
            assert got == pytest.approx(expected, rel=0.01), name


def test_linears_that_saw_too_few_tokens_are_named(
    tiny: ModelFolder, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """192 tokens cannot show all of down_proj's 256 inputs; the other linears have 128."""
    settings = {**PLAIN, "tokens": tokens, "transforms": [AwqScale()]}
    report = quantize(tiny, tmp_path / "record", **settings)
    assert report["few_tokens"] == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert report["damping_raised"] == 0


def test_repair_refuses_float16_before_anything_runs(
    make_model: Callable[..., ModelFolder], text_file: Path
) -> None:
    half = make_model(dtype="float16")
    words = [
        "recipe=best-int4",
        f"model.source={half.path}",
        "data=text",
        "eval=none",
        "speed=none",
    ]
    run = parse(compose_settings([*words, f"data.source={text_file}"]))
    with pytest.raises(UserError, match="repair=kl trains in bfloat16 or float32"):
        pipeline.check(run)


def test_bitsandbytes_refuses_float32_before_anything_runs(
    make_model: Callable[..., ModelFolder],
) -> None:
    """Its row maxima are 127 times a scale, which float32 does not hold exactly."""
    source = make_model("llama", dtype="float32")
    words = ["recipe=llm-int8", f"model.source={source.path}", "eval=none", "speed=none"]
    with pytest.raises(UserError, match=r"export=bitsandbytes holds models of bfloat16 or float16"):
        pipeline.check(parse(compose_settings(words)))


AT_LENGTH = [
    "eval.texts=[]",
    "eval.tasks=[]",
    "eval=standard",
    "context.tokens=128",
    "context.windows=2",
    "context.lengths=[]",
    "context.prompts=2",
    "context.prompt_tokens=60",
    "context.generated=16",
]


@pytest.mark.parametrize("recipe", ["kv-fp8", "awq-int4-kv-int4"])
def test_a_run_with_a_cache(
    tiny: ModelFolder, text_file: Path, tmp_path: Path, recipe: str
) -> None:
    """From the recipe to the report: the checkpoint's own cache is what is measured."""
    words = [*AT_LENGTH, f"recipe={recipe}", f"context.text={text_file}"]
    if "int4" in recipe:
        words += ["kv_cache.window=16", "kv_cache.keys.group_size=16"]
    run = run_of(tiny, text_file, *words)
    pipeline.check(run)
    metrics = pipeline.run_recipe(run, recipe, tmp_path)
    found = metrics["candidate"]["context"]
    scheme = scheme_of(ModelFolder(tmp_path / "checkpoint"))
    assert scheme == run.cache
    assert found["positions"]["windows"] == 2
    share = (
        found["positions"]["cache_bytes"] / metrics["base"]["context"]["positions"]["cache_bytes"]
    )
    assert share == pytest.approx(scheme.share(128, 32), rel=1e-6)
    assert found["positions"]["kl"] > 0
    assert len(found["agreement"]["lengths"]) == 2
    assert len(found["heads"]["output"]) == 3
    for file in ("context.md", "heads.png", "table.md", "kv_cache/kv_cache.json"):
        assert (tmp_path / file).exists(), file
    assert "0-31" in (tmp_path / "context.md").read_text()
    assert f"{share:.3f}x" in (tmp_path / "table.md").read_text()
    assert metrics["compression"]["kv_cache"]["name"] == scheme.name
    assert ("blocks" in metrics["compression"]) == recipe.startswith("awq")


def test_a_context_too_long_for_the_model_is_refused(tiny: ModelFolder, text_file: Path) -> None:
    words = [*AT_LENGTH, "recipe=kv-int8", f"context.text={text_file}"]
    for word in ("context.tokens=512", "context.prompt_tokens=250", "context.lengths=[512]"):
        run = run_of(tiny, text_file, *words, word)
        key = word.partition("=")[0]
        with pytest.raises(UserError, match=rf"{key}.* needs .* takes 256"):
            pipeline.check(run)


def narrowed(work: stages.Work) -> dict[str, Any]:
    """A stage that leaves a plain folder of another shape."""
    write_model(work.target, intermediate_size=192, num_key_value_heads=1)
    return {"narrowed": True}


@pytest.mark.parametrize("after", [[], ["quantize"], ["kv_cache"]])
def test_a_stage_may_leave_a_plain_model_of_another_shape(
    tiny: ModelFolder,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: list[str],
) -> None:
    """It is exported, audited, verified and measured, alone or with other stages behind it."""
    words = ["recipe=rtn-int4", *AT_LENGTH, "context.windows=1", f"context.text={text_file}"]
    words += [f"eval.texts=[{text_file}]", "eval.tokens=256", "eval.window=128"]
    words += ["context=standard", "eval.block_tokens=128"]
    if after:
        words.append(f"stages=[{','.join(after)}]")
    if "kv_cache" in after:
        words.append("kv_cache=int8")
    run = run_of(tiny, text_file, *words)
    run = replace(run, settings=replace(run.settings, stages=["narrow", *after]))
    monkeypatch.setitem(stages._STAGES, "narrow", narrowed)
    monkeypatch.setitem(pipeline.KNOBS_OF, "narrow", ())
    metrics = pipeline.run_recipe(run, "narrow", tmp_path)
    assert verify(tmp_path / "checkpoint") == []
    base, candidate = metrics["base"], metrics["candidate"]
    assert candidate["size"]["parameters"] < base["size"]["parameters"]
    assert candidate["texts"][str(text_file)]["kl"] > 0
    assert candidate["context"]["positions"]["kl"] > 0
    # Only what was quantized can be compared block by block, with what it was.
    assert ("block_kl" in metrics["compression"]) == ("quantize" in after)
    if not after:
        assert candidate["size"]["bits_linears"] == 16
        assert candidate["size"]["kept"] == ["all weights"]
        assert metrics["compression"]["audit"]["linears"] == 0
        config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
        assert config["intermediate_size"] == 192
        assert "quantization_config" not in config
