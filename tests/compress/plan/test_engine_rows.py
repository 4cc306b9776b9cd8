"""The engine matrix: what the command line refuses, with the rule named, and what each recipe gives."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path

import pytest

from compress import engines
from compress.commands.plan import main
from compress.compose import compose_settings, options
from compress.config import Run, parse
from compress.engines import ENGINES, GGUF, PROOFS, ROWS, VLLM_CPU, proof_of
from compress.errors import UserError
from compress.export import formats
from compress.model.folder import ModelFolder
from compress.model.shapes import ShapeFolder
from compress.pipeline import check
from compress.plan.loadable import refusals, warnings
from compress.plan.rows import engines_of, loadable_folder
from compress.prune.preview import previews
from compress.quantize.scheme import Scheme
from tests.exported import exported

DEMO = "model=shape:smollm2-135m"
LLAMA, LARGE = "model=shape:llama-3.1-8b", "model=shape:llama-2-13b"
QKV = "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj"
FOUR, SYM = "recipe=rtn-int4", "scheme.symmetric=true"

# Words of the command, the engine, devices, and all that it says.
REFUSED = {
    "three bits": (
        [LLAMA, "recipe=rtn-int3", SYM], "sglang", 1,
        ["sglang 0.5.23 loads compressed-tensors integers of 4 or 8 bits, this has 3: scheme.bits=4 or 8"],
    ),
    "two faults": (
        [LLAMA, "recipe=rtn-int3", "scheme.group_size=256", SYM], "sglang", 1,
        ["of 4 or 8 bits, this has 3", "scales for 32, 64, 128 or channel, this has 256: scheme.group_size="],
    ),
    "int4 in tensorrt-llm": (
        [LLAMA, FOUR], "tensorrt-llm", 1,
        ["tensorrt-llm main 2026 loads FP8 in compressed-tensors, not integers"],
    ),
    "int8 inputs in tensorrt-llm": (
        [LLAMA, "recipe=w8a8-int8"], "tensorrt-llm", 1,
        ["takes 8 bits by row and token for FP8 whatever their type, and would compute nonsense"],
    ),
    "one scale a tensor in tensorrt-llm": (
        [LLAMA, "recipe=fp8-static"], "tensorrt-llm", 1,
        ["with inputs fp8-token or fp8-group, this has fp8-tensor",
         "with scales for channel or block, this has tensor"],
    ),
    "query heads": (
        [DEMO, FOUR], "vllm-cpu", 4,
        ["cannot share the 9 query heads out over 4 devices: serve.tp=1, 3 or 9"]
    ),
    "heads of keys and values": (
        [LLAMA.replace("llama-3.1-8b", "qwen2.5-7b"), "recipe=kv-int8"], "vllm", 7,
        ["cannot share the 4 heads of keys and values out over 7 devices"],
    ),
    "groups after sharing": (
        [LARGE, FOUR], "vllm", 8,
        ["groups of 128 do not divide the 1728 inputs of mlp.down_proj (5120 x 1728)"],
    ),
    "blocks after sharing": (
        [LLAMA, "recipe=fp8-block"], "vllm", 32,
        ["do not divide the 448 inputs of mlp.down_proj", "do not divide the 448 outputs of mlp.gate_proj"],
    ),
    "bitsandbytes": (
        [LLAMA, "recipe=llm-int8"], "vllm", 1, ["does not read bitsandbytes", "vllm-bnb-plugin"],
    ),
    "quantized head": (
        [LLAMA, FOUR, SYM, "head=int8"], "vllm", 1,
        ["does not run a quantized embedding and head: leave head out"],
    ),
    "zero points in gptq": (
        [LLAMA, FOUR, "export=gptq"], "vllm", 1,
        ["vllm 0.33 loads gptq integers without zero points, this has them at 4: scheme.symmetric=true"],
    ),
    "weights of 8 bits": (
        [DEMO, "recipe=w8a16-int8"], "vllm-cpu", 1,
        ["vllm-cpu 0.32.0 loads compressed-tensors integers of 4 bits, this has 8: scheme.bits=4"],
    ),
    "AMX": ([DEMO, "recipe=fp8-static"], "vllm-cpu", 1, ["needs a CPU with AMX"]),
    "gguf": ([LLAMA, FOUR, "export=gguf"], "vllm", 1, ["vllm 0.33 does not read gguf any more"]),
    "compressed-tensors": (
        [LLAMA, FOUR], "llama.cpp", 1, ["reads gguf, not compressed-tensors: export=gguf"],
    ),
    "Marlin's tiles": (
        [DEMO, FOUR, SYM], "sglang", 1,
        [f"needs N x K in multiples of 64 x 128 or 128 x 64, and on a device {QKV} is 960 x 576 and "
         "self_attn.o_proj is 576 x 576"],
    ),
    "tiles of a share": (
        [DEMO, FOUR], "vllm-cpu", 9, ["do not divide the 170 inputs", "cannot share the 1536 outputs"]
    ),
    "zero points of 8 bits": (
        [LLAMA, "recipe=w8a16-int8", "scheme.symmetric=false"], "sglang", 1,
        ["with zero points at 4 bits alone, this has them at 8: scheme.symmetric=true"],
    ),
    "scales of the cache": (
        [LLAMA, "recipe=kv-fp8", "kv_cache=fp8-head"], "sglang", 1,
        ["reads scales of the cache as fp8-tensor, not fp8-head"],
    ),
    "nvfp4": ([LLAMA, "recipe=nvfp4"], "tensorrt-llm", 1, ["with inputs in NVFP4 too"]),
    "hardware": (
        [LLAMA, "recipe=fp8", "hardware=a100"], "tensorrt-llm", 1,
        ["needs CUDA of compute capability 8.9 or more, this hardware has 8.0"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("words", "engine", "tp", "told"), REFUSED.values(), ids=list(REFUSED))
def test_refused_at_plan_time(
    words: list[str], engine: str, tp: int, told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["hardware=h100", *words, f"serve.engines=[{engine}]", f"serve.tp={tp}"]
    assert main([*asked, "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert not found["engines"][engine]["loads"]
    # A sentence for each broken rule, and every one that was expected in one of them.
    assert len(found["unserved"]) == len(found["engines"][engine]["reasons"])
    for sentence in found["unserved"]:
        assert sentence.startswith(f"{engine} {ENGINES[engine].version} ")
    for part in told:
        assert any(part in sentence for sentence in found["unserved"]), found["unserved"]


def test_a_format_is_advised_where_the_rest_would_load_in_it() -> None:
    run = parse(compose_settings([FOUR, "export=gptq"]))
    given = engines_of(run, ShapeFolder("llama-3.1-8b"))["gptq"]
    reasons = {name: [r["text"] for r in given[name]["reasons"]] for name in given}
    assert reasons["tensorrt-llm"] == ["reads compressed-tensors or dense, not gptq"]
    assert reasons["llama.cpp"] == ["reads gguf, not gptq: export=gguf"]


def test_refused_by_the_recipe_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        ([FOUR, "scheme.group_size=128"], "group_size=128 does not divide the 576 inputs"),
        (["recipe=fp8-block"], "works in blocks of 128, which do not divide the 576 x 576"),
    ):
        assert main([DEMO, "hardware=h100", *words, "serve.engines=[vllm]"]) == 2
        assert said in capsys.readouterr().out


def test_nothing_else_changes(capsys: pytest.CaptureFixture[str]) -> None:
    words = [DEMO, FOUR, SYM, "hardware=h100"]
    assert main([*words, "serve.engines=[vllm,vllm-cpu,transformers]"]) == 0
    served = capsys.readouterr().out
    assert "vllm-cpu 0.32.0: yes (loaded with 0.32.0 on CPU, 2026-11-27)" in served
    assert "vllm 0.33: yes (by its source), slower: it needs N x K" in served
    assert main([*words, "serve.engines=[vllm,sglang]"]) == 2
    printed = capsys.readouterr().out
    assert printed.index("serve.engines would not load it:\nsglang 0.5.23 needs N x K") > 0
    assert served.splitlines()[:20] == printed.splitlines()[:20]
    # Of a model as it is as well.
    assert main([DEMO, "hardware=h100", "serve.engines=[vllm]", "serve.tp=2"]) == 2
    assert "9 query heads" in capsys.readouterr().out
    assert main([DEMO, "hardware=cpu", "hardware.gigabytes=8", "hardware.gigabytes_per_second=9",
                 "+hardware.teraflops.bf16=1", "serve.engines=[vllm]"]) == 2  # fmt: skip
    assert "vllm 0.33 needs CUDA of compute capability 7.5 or more, this hardware has none" in (
        capsys.readouterr().out
    )


def test_unknown_engines() -> None:
    with pytest.raises(
        UserError, match=r"serve.engines=vLLM is not known: known are vllm, vllm-cpu, sg"
    ):
        main([DEMO, FOUR, "hardware=h100", "serve.engines=[vLLM]"])
    with pytest.raises(UserError, match=r"serve.tp=0 is not allowed"):
        main([DEMO, FOUR, "hardware=h100", "serve.tp=0"])
    with pytest.raises(UserError, match=r"plan.tp is not a known key|Could not override"):
        main([DEMO, FOUR, "hardware=h100", "plan.tp=2"])


def test_a_run_refuses_or_warns_before_its_work(
    tiny: ModelFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["model=folder", f"model.source={tiny.path}", "recipe=rtn-int3", "eval=none", "speed=none",
             "scheme.group_size=32", SYM]  # fmt: skip

    def unread(self: ModelFolder, name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(ModelFolder, "tensor", unread)
    for engine in ("sglang", "vllm-cpu"):
        with pytest.raises(UserError, match=rf"{engine} .*loads .*this has 3: scheme.bits=4"):
            check(parse(compose_settings([*words, f"serve.engines=[vllm,{engine}]"])))
    with caplog.at_level(logging.WARNING):
        check(parse(compose_settings([*words, "serve.engines=[vllm]"])))
        assert not caplog.messages
        check(parse(compose_settings(words)))
    lines = [line.removeprefix("not for every engine: ") for line in caplog.messages]
    # transformers loads it, llama.cpp reads another format; of several reasons the first.
    assert [line.split()[0] for line in lines] == ["vllm-cpu", "sglang", "tensorrt-llm"]
    assert all(len(line) < 200 for line in lines)


def test_one_format_of_several_is_enough() -> None:
    run = parse(compose_settings([FOUR, SYM, "export=[compressed-tensors,gguf]"]))
    given = engines_of(run, ShapeFolder("llama-3.1-8b"))
    assert refusals(given, ["vllm", "llama.cpp"]) == []
    assert len(refusals(given, ["tensorrt-llm"])) == 2
    assert [line.split()[0] for line in warnings(given)] == ["tensorrt-llm"]


def test_a_folder_on_disk(tiny: ModelFolder, tmp_path: Path) -> None:
    plain = loadable_folder(tiny)
    assert plain["vllm"]["loads"]
    record = loadable_folder(
        ModelFolder(exported(tiny, Scheme(3, 32), tmp_path).path.parent / "record")
    )
    assert "not record" in record["vllm"]["reasons"][0]["text"]
    three = loadable_folder(ModelFolder(tmp_path / "out"))
    assert three["vllm"]["loads"]
    assert refusals({"": three}, [VLLM_CPU])
    # Four query heads.
    assert (
        "query heads out over 3 devices"
        in (loadable_folder(ModelFolder(tmp_path / "out"), tp=3)["vllm"]["reasons"][0]["text"])
    )
    assert not loadable_folder(tiny, capability=7.0)["vllm"]["loads"]


@functools.cache
def run_of(*words: str) -> Run:
    return parse(compose_settings([*words]))


# What loads the demo model by every recipe: + a load of this kind was run, y by the source, . no.
EXPECTED = """
                    vllm vllm-cpu sglang tensorrt-llm transformers llama.cpp
awq-int3            y    .        .      .            y            .
awq-int4            y    +        .      .            +            .
awq-int4-kv-fp8     y    +        .      .            +            .
awq-int4-kv-int4    y    y        .      .            y            .
best-int2           y    .        .      .            y            .
best-int3           y    .        .      .            y            .
best-int4           y    +        .      .            +            .
fp8                 y    +        y      y            +            .
fp8-block           y    .        y      y            y            .
fp8-static          y    .        y      .            +            .
gptaq-int4          y    +        .      .            +            .
gptq-int3           y    .        .      .            y            .
gptq-int4           y    +        .      .            +            .
kv-fp8              y    +        y      y            +            .
kv-int2             y    y        y      y            y            .
kv-int4             y    y        y      y            y            .
kv-int8             y    y        y      y            y            .
learned-int3        y    .        .      .            y            .
learned-int4        y    +        .      .            +            .
llm-int8            .    .        y      .            +            .
llm-int8-static     .    .        y      .            y            .
minitron-awq        y    +        .      .            +            .
mixed-3.5           y    .        .      .            .            .
mxfp4               y    .        .      .            +            .
nvfp4               y    .        y      .            +            .
prune-depth         y    +        y      y            +            .
prune-depth-distill y    +        y      y            +            .
prune-heads         y    +        y      y            +            .
prune-kv-heads      y    +        y      y            +            .
prune-width         y    +        y      y            +            .
prune-width-distill y    +        y      y            +            .
rotate-int4-channel y    y        .      .            y            .
rtn-int3            y    .        .      .            y            .
rtn-int4            y    +        .      .            +            .
w8a16-int8          y    .        .      .            +            .
w8a8-int8           y    +        y      .            +            .
"""


def table() -> str:
    """The demo model's shapes by every recipe; of fp8-block, which does not fit it, Llama-3.1-8B's."""
    lines = ["                    " + " ".join(ENGINES)]
    for name in options("recipe"):
        run = run_of(f"recipe={name}")
        shapes = ShapeFolder("llama-3.1-8b" if name == "fp8-block" else "smollm2-135m")
        if run.prune is not None:
            shapes = next(previews(shapes, run.prune))
        (found,) = engines_of(run, shapes).values()
        marks = ["+" if e["proved"] else "y" if e["loads"] else "." for e in found.values()]
        cells = [mark.ljust(len(engine)) for mark, engine in zip(marks, ENGINES, strict=True)]
        lines.append(f"{name:<20}{' '.join(cells).rstrip()}")
    return "\n" + "\n".join(lines) + "\n"


def test_what_loads_each_recipe() -> None:
    assert table() == EXPECTED


def test_proofs_are_what_the_serve_check_found() -> None:
    """What servers answered is proved, and nothing that they were not asked."""
    results = Path(__file__).parents[3] / "eval" / "results" / "serve-check.json"
    served = json.loads(results.read_text())["served"]
    entries = [entry for row in served.values() for entry in row.values()]
    assert entries
    for entry in entries:
        proof = proof_of(entry["engine"], entry["format"], entry["kinds"], "llama")
        assert (proof is not None) == entry["agreement"]["agrees"], entry
        if proof is not None:
            assert entry["version"].startswith(proof.version)
            assert entry["date"].startswith(proof.date)
    found = {(e["engine"], e["format"], kind) for e in entries for kind in e["kinds"]}
    # The others are those of random models (test_family_check).
    for proof in (p for p in PROOFS if p.model_types == ("llama",)):
        for kind in proof.kinds:
            assert (proof.engine, proof.format, kind) in found, (proof, kind)


def test_the_document_is_what_the_rows_say() -> None:
    document = Path(__file__).parents[3] / "docs" / "engines.md"
    assert document.read_text(encoding="utf-8") == engines.markdown()


def test_rows_say_only_known_things() -> None:
    for row in ROWS:
        assert row.engine in ENGINES
        assert row.numbers in ("", *engines.KINDS)
        assert row.source
        assert not (row.refused and row.note)
    for proof in PROOFS:
        assert proof.version == ENGINES[proof.engine].version


def test_a_plain_model_in_gguf_is_for_readers_of_gguf(tiny: ModelFolder, tmp_path: Path) -> None:
    formats.FORMATS[GGUF].write(tiny, tmp_path / "gguf")
    found = loadable_folder(ModelFolder(tmp_path / "gguf"))
    assert found["llama.cpp"]["loads"]
    assert "does not read gguf" in found["vllm"]["reasons"][0]["text"]
    assert not found["vllm-cpu"]["loads"]
    assert not loadable_folder(tiny)["llama.cpp"]["loads"]
