"""Recipes from strangers, and words from scripts: settings are data, and name no code, file or secret."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from compress import compose
from compress.__main__ import USER_ERROR, _code
from compress.compose import RECIPES, compose_settings
from compress.config import parse
from compress.errors import UserError

EVIL = "{_target_: os.mkdir, path: ran}"


@pytest.fixture
def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Adds a file to a copy of recipes/."""
    folder = shutil.copytree(RECIPES, tmp_path / "recipes")
    monkeypatch.setattr(compose, "RECIPES", folder)
    monkeypatch.chdir(tmp_path)

    def add(file: str, text: str) -> None:
        (folder / file).write_text(text)

    return add


@pytest.mark.parametrize(
    "word",
    [
        f"+x={EVIL}",
        "++_target_=os.mkdir",
        "++model._target_=os.mkdir",
        "+scheme._target_=os.mkdir",
        "transforms.awq_scale={_target_: os.mkdir}",
        f"rounding={{nearest: {EVIL}}}",
        f"kv_cache={EVIL}",
        f"prune={EVIL}",
        f"head={EVIL}",
        f"export={{gptq: {EVIL}}}",
        "transforms=[os.system]",
        "rounding=subprocess.Popen",
    ],
)
def test_a_word_names_no_code(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        parse(compose_settings(["recipe=awq-int4", word]))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "word",
    [
        "+hydra.callbacks.x._target_=os.mkdir",
        "hydra.sweeper._target_=os.mkdir",
        "+hydra.job_logging.handlers.x={class: subprocess.Popen, args: [touch, ran]}",
        "hydra/job_logging=none",
        "hydra.searchpath=[file:///tmp]",
        "hydra.job.name=../../x",
        "+hydra.job.env_set.LD_PRELOAD=x.so",
        "hydra.output_subdir=/tmp/x",
        "~hydra.callbacks",
    ],
)
def test_what_hydra_runs_is_not_to_be_set(word: str) -> None:
    with pytest.raises(UserError, match=r"of Hydra's own settings hydra.run.dir"):
        compose_settings(["recipe=rtn-int4", word])


RAY, SLURM = "hydra/launcher=ray", "hydra/launcher=submitit_slurm"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["hydra/launcher=joblib"], "known are hydra/launcher=basic, ray, submitit_local, subm"),
        (["+hydra/launcher=ray"], "known are hydra/launcher=basic"),
        (["~hydra/launcher"], "known are hydra/launcher=basic"),
        (["hydra/launcher={_target_: os.mkdir}"], "known are hydra/launcher=basic"),
        (["hydra.launcher={_target_: os.mkdir}"], "of Hydra's own settings hydra.run.dir"),
        (["hydra.launcher._target_=os.mkdir"], "is a key of other launchers"),
        ([RAY, "hydra.launcher._target_=os.mkdir"], "is not a key of hydra/launcher=ray"),
        ([RAY, "hydra.launcher.ray={_target_: os.mkdir}"], "is not a key of hydra/launcher=ray"),
        ([RAY, "+hydra.launcher.ray.init.runtime_env={}"], "is not a key of hydra/launcher=ray"),
        ([RAY, "+hydra.launcher.ray.remote.resources._target_=x"], "'x' of type 'str'"),
        ([RAY, "hydra.launcher.ray.init.address=${oc.env:A_SECRET}"], "is not allowed: in it"),
        ([RAY, "hydra.launcher.partition=x"], "is not a key of hydra/launcher=ray"),
        ([SLURM, "hydra.launcher.setup=[reboot]"], "is not a key of hydra/launcher=submitit_slurm"),
        # Of a batch file the next line would be a command.
        ([SLURM, "hydra.launcher.comment='a\nreboot'"], "and no line breaks"),
    ],
)
def test_a_launcher_is_one_of_ours_with_its_own_keys(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as told:
        compose_settings(["recipe=rtn-int4", *words])
    assert sentence in str(told.value)


def test_launchers_compose() -> None:
    for words in (
        ["hydra/launcher=basic"],
        [RAY, "hydra.launcher.ray.remote.num_gpus=0.5", "+hydra.launcher.ray.remote.resources.a=1"],
        [SLURM, "hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=600"],
    ):
        parse(compose_settings(["recipe=rtn-int4", *words]))


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("callbacks: {x: {_target_: os.mkdir, path: ran}}", "callbacks"),
        ("launcher: {_target_: os.mkdir}", "launcher"),
        ("sweeper: {_target_: os.mkdir}", "sweeper"),
        ("job_logging: {handlers: {x: {(): os.mkdir, path: ran}}}", "job_logging"),
        ("hydra_logging: {handlers: {x: {class: subprocess.Popen}}}", "hydra_logging"),
        ("job: {env_set: {PATH: ran}}", "job.env_set"),
        ("output_subdir: ../../x", "output_subdir"),
    ],
)
def test_a_recipe_changes_nothing_that_hydra_runs(
    strange: Callable[[str, str], None], tmp_path: Path, section: str, key: str
) -> None:
    strange("recipe/evil.yaml", f"# @package _global_\nstages: [quantize]\nhydra:\n  {section}\n")
    with pytest.raises(UserError, match=rf"a recipe changes hydra.{key}"):
        compose_settings(["recipe=evil"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:A_SECRET}",
        "${oc.env:NOTHING,${oc.env:A_SECRET}}",
        "${eval:1+1}",
        "${python:os.getcwd}",
    ],
)
def test_settings_do_not_read_the_environment(
    strange: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    strange(
        "recipe/evil.yaml", f'# @package _global_\nstages: [quantize]\ndata:\n  source: "{value}"\n'
    )
    for words in (["recipe=evil"], ["recipe=rtn-int4", f"data.source={value}"]):
        with pytest.raises(UserError) as told:
            compose_settings(words)
        assert "hunter2" not in str(told.value)
    with pytest.raises(UserError, match=r"hydra.run.dir.*is not allowed"):
        compose_settings(["recipe=rtn-int4", f"hydra.run.dir={value}"])
    # What recipes/config.yaml itself uses is.
    compose_settings(["recipe=rtn-int4", "hydra.run.dir=outputs/${model.name}/${now:%Y}"])


@pytest.mark.parametrize(
    "words",
    [
        ["--config-dir", "."],
        ["--config-path", "."],
        ["--config-name", "evil"],
        ["--experimental-rerun", "config.pickle"],
        ["--package", "hydra"],
    ],
)
def test_settings_come_from_nowhere_else(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Hydra's rerun would unpickle the file it is given."""
    monkeypatch.chdir(tmp_path)

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, ("ran",))

    (tmp_path / "config.pickle").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "evil.yaml").write_text(f"hydra: {{callbacks: {{x: {EVIL}}}}}\n")
    for more in ([], ["--cfg", "job"], ["--info"], ["--help"]):
        assert _code(["recipe=rtn-int4", *words, *more]) == USER_ERROR
        assert f"{words[0]} is not allowed" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_looking_at_settings_runs_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "recipe=rtn-int4",
        "+hydra.callbacks.x._target_=os.mkdir",
        "+hydra.callbacks.x.path=ran",
    ]
    for flags in (["--cfg", "job"], ["--cfg", "hydra"], ["--info", "all"], ["-m"]):
        assert _code([*words, *flags]) == USER_ERROR
        assert "hydra.run.dir" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../x", "/etc", "a/b", "..", ".", "", "a\nb", "\x1b[31m"])
def test_outputs_are_filed_in_one_folder(name: str) -> None:
    with pytest.raises(UserError, match=r"model.name=.* is not allowed"):
        compose_settings(["recipe=rtn-int4", f"model.name='{name}'"])


@pytest.mark.parametrize("folder", ["/proc/x", "/dev/null/x", "n" * 300])
def test_where_nothing_can_be_written_is_told_before_anything_runs(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        _code(["recipe=rtn-int4", "model.source=/nowhere", f"hydra.run.dir={folder}"]) == USER_ERROR
    )
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot be written" in said
