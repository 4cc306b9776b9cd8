"""What an unknown architecture is made of, found by running it, and runs on it without a line of code."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.stablelm.modeling_stablelm import StableLmDecoderLayer

from compress.commands.families import main
from compress.errors import UserError
from compress.export.formats import FORMATS
from compress.model.added import families_dir, read_family, write_family
from compress.model.families import FAMILIES, OF_LOGITS, family_of, has_logits_of_head
from compress.model.folder import SINGLE, ModelFolder
from compress.model.skeleton import empty_model
from compress.quantize.probe import probe
from compress.quantize.rounding import Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.search import Search, choose
from compress.quantize.stage import quantize
from compress.quantize.transforms import AwqScale
from compress.runtime.load import load_dense
from eval.engines.family_models import COMMON, KINDS, LLAMA, ROUTED
from eval.faults.tiny import byte_tokenizer

CPU = torch.device("cpu")
# Types that no family here has: LayerNorms and partial rotation; norms that add one; attention and MLP beside
# each other behind one norm; experts.
UNKNOWN: dict[str, dict[str, Any]] = {
    "stablelm": LLAMA,
    "gemma": {**LLAMA, "head_dim": 16},
    "phi": LLAMA,
    "olmoe": {**LLAMA, **ROUTED},
}


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))


def folder_of(kind: str, settings: dict[str, Any], path: Path) -> tuple[Any, ModelFolder]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
        elif parameter.dim() > 1:
            parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return model, ModelFolder(path)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_family_that_was_probed_runs(
    kind: str, tokens: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kind not in {name for family in FAMILIES for name in family.model_types}
    model, folder = folder_of(kind, UNKNOWN[kind], tmp_path / "model")
    with pytest.raises(UserError, match=f"'{kind}' is not known here"):
        family_of(folder.config)
    assert main(["--probe", str(folder.path), "--add"]) == 0
    assert f"filed as {families_dir() / kind}.json" in capsys.readouterr().out
    assert family_of(folder.config).inputs
    quantize(
        folder, tmp_path / "record", tokens=tokens, schemes=Schemes(Scheme(8, 32)),
        transforms=[AwqScale(4)], roundings=[Nearest()], device=CPU,
    )  # fmt: skip
    FORMATS["compressed-tensors"].write(ModelFolder(tmp_path / "record"), tmp_path / "out")
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits.log_softmax(-1)
        ours = load_dense(ModelFolder(tmp_path / "out"), CPU, torch.float32)
        found = ours(tokens, use_cache=False).logits.log_softmax(-1)
    assert (expected.exp() * (expected - found)).sum(-1).mean() < (
        0.05 if kind == "olmoe" else 1e-3
    )


def config_of(kind: str, settings: dict[str, Any], path: Path) -> ModelFolder:
    """A folder of config.json alone."""
    AutoConfig.for_model(kind, **settings).save_pretrained(path)
    return ModelFolder(path)


# Of families that know variants: linears of others than the one that is probed here.
ABSENT = {
    "deepseek_v3": {"self_attn.q_proj"},
    "qwen3_next": {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
}


# That a cache is not one of keys and values, and a class that a library does not replace, are not seen from
# outside.
UNSEEN = (
    ("deepseek_v3", "kv_cache"),
    ("deepseek_v3", "plan"),
    ("falcon-7b", "bitsandbytes"),
)


@pytest.mark.parametrize(
    "kind",
    ["gpt2", "gemma2", "falcon-7b", "gpt_oss", "deepseek_v3", "jamba", "qwen3_next", "mamba2"],
)
def test_known_families_are_found_again(kind: str, tmp_path: Path) -> None:
    folder = config_of(*KINDS[kind], tmp_path)
    known, found = family_of(folder.config), probe(folder)
    for field in (
        "blocks", "embedding", "final_norm", "norm_shift", "transposed", "tuples", "attention_output",
        "experts", "plain_logits",
    ):  # fmt: skip
        assert getattr(found, field) == getattr(known, field), field
    # A block's kind decides its order: those of several kinds stand one behind the other.
    absent = ABSENT.get(kind, set())
    assert set(found.linears) == set(known.linears) - absent
    assert len(found.linears) == len(set(found.linears))
    by_linear = {linear: shared for shared in known.inputs for linear in shared.linears}
    sources: dict[str | None, set[str]] = {}
    for shared in known.inputs:
        sources.setdefault(shared.source, set()).update(shared.others)
    for shared in found.inputs:
        expected = by_linear[shared.linears[0]]
        assert shared.linears == tuple(n for n in expected.linears if n not in absent)
        if shared.linears == ("self_attn.o_proj",):
            # Heads of these configs share values, of which then nothing takes a scale; a family says what
            # holds where they do not.
            assert shared.source is None
            continue
        assert shared.source == expected.source
        # Routers are named with all of their block that reads their norm; a family names them once, with the
        # experts. Blocks with one MLP have none.
        routed = "expert" in shared.linears[0]
        assert set(shared.others) == (sources[shared.source] if routed else set())
    for what in (*OF_LOGITS, "gptaq", "bitsandbytes", "kv_cache", "plan"):
        assert (kind, what) in UNSEEN or found.why_not(what) == known.why_not(what), what


@pytest.mark.parametrize(
    ("kind", "settings", "plain"),
    [
        ("cohere", {"logit_scale": 0.5}, False),
        ("granite", {"logits_scaling": 4.0}, False),
        # A head with a bias.
        ("phi", {}, False),
        ("stablelm", {}, True),
        # Its blocks return several things.
        ("mpt", {"d_model": 128, "n_heads": 4, "n_layers": 2}, True),
    ],
)
def test_whether_logits_are_the_heads_alone(
    kind: str, settings: dict[str, Any], plain: bool, tmp_path: Path
) -> None:
    common = {"vocab_size": 320} if kind == "mpt" else LLAMA
    found = probe(config_of(kind, {**common, **settings}, tmp_path))
    assert found.plain_logits == plain
    assert (found.why_not("search") is None) == plain
    assert found.tuples == (kind == "mpt")


def test_what_asks_for_the_head_alone_runs_on_a_probed_family(
    tokens: Tensor, tmp_path: Path
) -> None:
    _, folder = folder_of("stablelm", UNKNOWN["stablelm"], tmp_path / "model")
    assert main(["--probe", str(folder.path), "--add"]) == 0
    assert has_logits_of_head(folder.config)
    _, report = choose(folder, Search(average_bits=4.0), Schemes(Scheme(4, 32)), tokens, CPU)
    assert report["average_bits"] <= 4.0


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        # Its experts choose tokens by themselves.
        (
            "llama4_text",
            {**LLAMA, "head_dim": 32, "num_local_experts": 4, "intermediate_size_mlp": 96},
            r"its experts \(feed_forward\.experts\) are not one module named experts",
        ),
        # It hands its blocks values without names.
        (
            "recurrent_gemma",
            {**LLAMA, "head_dim": 32, "lru_width": 128, "attention_window_size": 8},
            r"TypeError: RecurrentGemmaDecoderLayer\.forward\(\) missing 2",
        ),
        # Its positions are numbers of every sequence.
        (
            "bloom",
            {"vocab_size": 320, "hidden_size": 128, "n_layer": 2, "n_head": 4},
            "what its blocks are handed for one sequence does not fit several",
        ),
        (
            "bert",
            {**COMMON, "intermediate_size": 96, "is_decoder": True},
            "its blocks do not run one behind the other: TypeError",
        ),
    ],
)
def test_what_cannot_be_probed_is_told(
    kind: str, settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = config_of(kind, settings, tmp_path)
    with pytest.raises(UserError, match=f"models of type {kind} cannot be probed: {reason}"):
        main(["--probe", str(folder.path), "--add"])
    assert not families_dir().exists()


@pytest.mark.parametrize(
    ("added", "reason"),
    [
        (lambda X: X.mean(0), "what its blocks are handed for one sequence does not fit several"),
        (lambda X: X.log(), "with random weights its blocks do not end in numbers"),
    ],
)
def test_blocks_that_cannot_be_compared_are_told(
    added: Callable[[Tensor], Tensor], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a block makes of two sequences is what it makes of each, or it cannot run as blocks are run."""
    forward = StableLmDecoderLayer.forward

    def changed(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(self, hidden_states, *args, **kwargs) + added(hidden_states)

    monkeypatch.setattr(StableLmDecoderLayer, "forward", changed)
    with pytest.raises(UserError, match=f"stablelm cannot be probed: {reason}"):
        probe(config_of("stablelm", LLAMA, tmp_path))


def test_experts_by_another_name_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would keep 16 bits, without a word."""
    init = OlmoeSparseMoeBlock.__init__

    def renamed(self: Any, config: Any) -> None:
        init(self, config)
        self.pool = self.experts
        del self.experts

    monkeypatch.setattr(OlmoeSparseMoeBlock, "__init__", renamed)
    with pytest.raises(UserError, match=r"its experts \(mlp\.pool\) are not one module named exp"):
        probe(config_of("olmoe", UNKNOWN["olmoe"], tmp_path))


def test_config_json_is_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = config_of("stablelm", LLAMA, tmp_path / "model")
    bucket = fsspec.filesystem("memory")
    bucket.pipe("/bucket/model/config.json", (folder.path / "config.json").read_bytes())
    # It is not fetched.
    bucket.pipe("/bucket/model/model.safetensors", b"x")
    told = []
    for where in (str(folder.path), "memory://bucket/model"):
        assert main(["--probe", where, "--add"]) == 0
        told.append(capsys.readouterr().out.splitlines()[-1])
        file = families_dir() / "stablelm.json"
        assert read_family(file).attention_output == "self_attn.o_proj"
        file.unlink()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert told[0] == told[1]
    assert told[0].endswith("the names of its tensors were not checked")


def test_a_file_that_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Edited, or of another name: neither overwritten nor, after a check that fails, deleted."""
    _, folder = folder_of("stablelm", UNKNOWN["stablelm"], tmp_path / "model")
    words = ["--probe", str(folder.path), "--add"]
    assert main(words) == 0
    file = families_dir() / "stablelm.json"
    assert main(words) == 0
    assert f"filed already as {file}" in capsys.readouterr().out
    stated = json.loads(file.read_text())
    for name in ("stablelm.json", "mine.json"):
        file = file.rename(families_dir() / name)
        file.write_text(json.dumps({**stated, "smooth_alpha": 0.3}))
        before = file.read_text()
        with pytest.raises(UserError, match=f"{name} is there and says something else: delete or"):
            main(words)
        assert file.read_text() == before
        assert [found.name for found in families_dir().iterdir()] == [name]


def test_a_check_that_fails_files_nothing(tmp_path: Path) -> None:
    _, folder = folder_of("stablelm", UNKNOWN["stablelm"], tmp_path / "model")
    tensors = load_file(folder.path / SINGLE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder.path / SINGLE, {"format": "pt"})
    with pytest.raises(UserError, match=r"holds no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        main(["--probe", str(folder.path), "--add"])
    assert not families_dir().exists()
    with pytest.raises(UserError, match="'stablelm' is not known here"):
        family_of(folder.config)


@pytest.mark.parametrize("kind", ["granitemoe", "phimoe"])
def test_names_that_are_others_in_checkpoints_are_told(kind: str, tmp_path: Path) -> None:
    settings = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
    _, folder = folder_of(kind, settings, tmp_path / "model")
    with pytest.raises(UserError, match="names these tensors otherwise in checkpoints") as told:
        main(["--probe", str(folder.path), "--add"])
    assert "block_sparse_moe" in str(told.value)
    assert not families_dir().exists()


def test_a_broken_file_is_no_matter_of_types_that_are_built_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = config_of(*KINDS["llama"], tmp_path / "model")
    with pytest.raises(UserError, match="model type 'llama' is built in"):
        main(["--probe", str(folder.path), "--add"])
    families_dir().mkdir(parents=True)
    file = families_dir() / "mine.json"
    file.write_text("{")
    assert family_of(folder.config) in FAMILIES
    with pytest.raises(UserError, match=r"mine\.json is not valid JSON"):
        family_of({"model_type": "stablelm"})
    write_family(file, replace(family_of(folder.config), twins={}))
    assert family_of(folder.config).file == ""
    assert main([]) == 0
    assert f"{file}: llama is built in, what the file says of it is not used" in (
        capsys.readouterr().out
    )


@pytest.fixture
def stablelm(tmp_path: Path) -> tuple[ModelFolder, Path, dict[str, Any]]:
    """A folder, the file of its family and what that says."""
    folder = config_of("stablelm", LLAMA, tmp_path / "model")
    assert main(["--probe", str(folder.path), "--add"]) == 0
    file = families_dir() / "stablelm.json"
    return folder, file, json.loads(file.read_text())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"blocks": "model.blocks"}, "blocks 'model.blocks' is no part of this model"),
        ({"blocks": "model.norm"}, "blocks 'model.norm' is no list of blocks of this model"),
        ({"final_norm": "norm"}, "final_norm 'norm' is no part of this model"),
        ({"embedding": "wte"}, "embedding 'wte' is no part of this model"),
        ({"rotary": "model.rope"}, "rotary 'model.rope' is no part of this model"),
        ({"head": "head", "head_module": "head"}, "head_module 'head' is no part of this model"),
        ({"transposed": ["mlp.up_proj"]}, "transposed 'mlp.up_proj' is no linear of every block"),
        ({"experts": {}}, "experts 'mlp' is no part of a block that has experts"),
        ({"writers": ["mlp.out"]}, "writers 'mlp.out' is no part of a block"),
        ({"attention": "attn"}, "attention 'attn' is no part of a block"),
    ],
)
def test_parts_that_a_model_has_not_are_told(
    changes: dict[str, Any],
    sentence: str,
    stablelm: tuple[ModelFolder, Path, dict[str, Any]],
) -> None:
    folder, file, stated = stablelm
    file.write_text(json.dumps({**stated, **changes}))
    with pytest.raises(UserError, match=f"{file}: {sentence}"):
        empty_model(folder, torch.float32)


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        ("linears", ["mlp.gate"], "linears 'mlp.gate' is no linear of a block"),
        ("linears", ["input_layernorm"], "linears 'input_layernorm' is no linear of a block"),
        ("source", "norm", "source 'norm' is no norm or linear beside its linears"),
        ("source", "mlp", "source 'mlp' is no norm or linear beside its linears"),
        ("others", ["router"], "others 'router' is no part of a block"),
        ("linears", [], "inputs: linears is empty"),
        ("linears", ["a.{}.{}"], r"inputs: 'a\.\{\}\.\{\}' has other braces than one"),
        ("linears", ["a.{}", "b"], "some are of experts"),
    ],
)
def test_inputs_that_a_model_has_not_are_told(
    place: str, value: Any, sentence: str, stablelm: tuple[ModelFolder, Path, dict[str, Any]]
) -> None:
    folder, file, stated = stablelm
    # Of gate and up.
    stated["inputs"][2][place] = value
    file.write_text(json.dumps(stated))
    with pytest.raises(UserError, match=f"{file}: .*{sentence}"):
        empty_model(folder, torch.float32)


def test_a_file_that_holds_no_family(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    cases = {
        '{"name": "x"}': "model_types is missing",
        '{"name": "x", "model_types": ["x"], "colour": "red"}': "colour is not known",
        '{"name": "x", "model_types": "x"}': "model_types='x' is not of its kind",
        '{"name": "x", "model_types": ["x"], "inputs": [{"linears": ["a"]}]}': "source is missing",
        '{"name": "x", "model_types": ["x"], "norm_shift": NaN}': "norm_shift=nan is not of its kind",
        '{"name": "x", "model_types": ["x"], "inputs": []}': "inputs is empty",
        '{"name": "x", "model_types": ["x"], "inputs": [{"linears": ["a"], "source": null}], '
        '"attention_output": "b"}': "attention_output='b' is not among the linears of inputs",
    }
    for text, sentence in cases.items():
        file.write_text(text)
        with pytest.raises(UserError, match=sentence):
            read_family(file)
