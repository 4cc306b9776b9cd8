"""Two processes that share the calibration sequences decide what one alone does."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calibration.moments import Collector, Moments, Tokens
from compress import processes, saved, stages
from compress.compose import compose_settings
from compress.config import Run, parse
from compress.errors import UserError
from compress.model.folder import ModelFolder, save_tensors
from compress.model.states import States
from compress.processes import ALONE, Team
from compress.quantize.rounding import Nearest
from compress.quantize.transforms import AwqScale
from compress.saved import Saved
from compress.stages import Work, join, run_stage
from eval.engines.family_models import written_model
from tests.shared import CASES, FLOATS, forked, quantizing


@pytest.fixture(scope="module")
def text() -> Tensor:
    """Three batches of a walk, of which the second process gets two."""
    return torch.randint(256, (40, 256), generator=torch.Generator().manual_seed(2))


def tokens_of(case: str, text: Tensor) -> Tensor:
    return text[:3, :16] if case == "few" else text


def contents(folder: Path) -> dict[str, Tensor]:
    found = ModelFolder(folder)
    return {name: found.tensor(name) for name in found.names}


def errors_of(report: dict[str, Any]) -> list[float]:
    return [e["relative_error"] for b in report["blocks"] for e in b["linears"].values()]


@pytest.fixture(scope="module")
def exact(make_model: Callable[..., ModelFolder]) -> ModelFolder:
    """In 16 bits one that falls on the other side would hide what is compared."""
    return make_model(dtype="float32")


@pytest.fixture(scope="module")
def shared(
    tiny: ModelFolder, exact: ModelFolder, text: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """The folder and the report of a case that two processes shared."""
    out = tmp_path_factory.mktemp("shared")

    def work(team: Team) -> None:
        for name, stage in (CASES | FLOATS).items():
            source = exact if name in FLOATS else tiny
            report = stage(source, out / name, tokens_of(name, text), team)
            (out / f"{name}-{team.rank}.json").write_text(json.dumps(report))

    assert forked(work) == [0, 0]
    return lambda case: (out / case, json.loads((out / f"{case}-0.json").read_text()))


@pytest.mark.parametrize("case", ["awq", "gptq", "learned", "inputs", "cache"])
def test_two_processes_write_the_bytes_of_one(
    tiny: ModelFolder, text: Tensor, tmp_path: Path, shared: Any, case: str
) -> None:
    """Sums in another order differ in their last bits alone, and no decision here is that close."""
    folder, _ = shared(case)
    CASES[case](tiny, tmp_path / "one", tokens_of(case, text), ALONE)
    ours, theirs = contents(folder), contents(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("case", ["gptaq", "few"])
def test_where_a_rounding_falls_on_the_other_side_the_errors_are_those_of_one(
    tiny: ModelFolder, text: Tensor, tmp_path: Path, shared: Any, case: str
) -> None:
    """gptaq hands one flip on to every later column; few tokens are one batch, shared by sequences, whose
    products the kernels sum otherwise. What comes before the first flip is the same."""
    folder, report = shared(case)
    one = CASES[case](tiny, tmp_path / "one", tokens_of(case, text), ALONE)
    ours, theirs = contents(folder), contents(tmp_path / "one")
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(ours[f"{first}.codes"], theirs[f"{first}.codes"])
    assert torch.equal(ours[f"{first}.scale"], theirs[f"{first}.scale"])
    assert errors_of(report) == pytest.approx(errors_of(one), rel=0.1)
    assert report["few_tokens"] == one["few_tokens"]


@pytest.mark.parametrize("case", list(FLOATS))
def test_what_is_fitted_or_trained_is_that_of_one_but_for_the_order_of_sums(
    exact: ModelFolder, text: Tensor, tmp_path: Path, shared: Any, case: str
) -> None:
    folder, report = shared(case)
    one = FLOATS[case](exact, tmp_path / case, text, ALONE)
    ours, theirs = contents(folder), contents(tmp_path / case)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape
        lost = (ours[name].float() - tensor.float()).norm()
        assert lost <= 1e-3 * tensor.float().norm(), name
    if case == "repair":
        for name in ("kl", "held_out_kl"):
            assert report[name] == pytest.approx(one[name], rel=1e-2)
        assert min(one["held_out_kl"][1:]) < 0.9 * one["held_out_kl"][0]
        return
    # The same choices.
    note = "prune.json"
    assert json.loads((folder / note).read_text()) == json.loads(
        (tmp_path / case / note).read_text()
    )
    for key in ("influence", "channels", "drop_one"):
        if key in one["prune"]["survey"]:
            found, expected = (r["prune"]["survey"][key] for r in (report, one))
            assert found == pytest.approx(expected, rel=1e-4)
    assert len(report["prune"]["candidates"]) == (2 if case == "tried" else 0)
    for ours_, theirs_ in zip(report["prune"]["blocks"], one["prune"]["blocks"], strict=True):
        assert ours_["errors"] == pytest.approx(theirs_["errors"], rel=1e-2, abs=1e-4)
        assert ours_["drift"] == pytest.approx(theirs_["drift"], rel=1e-2, abs=1e-8)


def test_all_processes_report_the_same(shared: Any) -> None:
    for case in ("awq", "gptaq", "learned", "inputs"):
        folder, report = shared(case)
        other = json.loads((folder.parent / f"{case}-1.json").read_text())
        assert errors_of(other) == errors_of(report)
        drifts = [[b.get("drift") for b in r["blocks"]] for r in (report, other)]
        assert drifts[0] == drifts[1]
        assert other.get("outliers") == report.get("outliers")
    assert drifts[0] == [None] * len(drifts[0])


@pytest.mark.parametrize("tokens", [None, 30])
def test_moments_are_those_of_all_tokens(tmp_path: Path, tokens: int | None) -> None:
    """Squares to float32's last bits; kept tokens exactly, in order."""
    X, original = torch.randn(2, 5, 6, 128, generator=torch.Generator().manual_seed(0))
    linear = nn.Linear(128, 8)

    def moments(team: Team) -> Moments:
        collector = Collector(
            {"a": linear}, [("a",)], {"a": linear}, threshold=1.5, tokens=tokens, team=team
        )
        # One sequence a batch.
        rows = team.share(len(X), 1)
        with collector.hooks():
            for x, y in zip(X[rows], original[rows], strict=True):
                collector._seen[("a",)] = y
                try:
                    collector._sums[("a",)].add(x, y)
                finally:
                    collector._seen.clear()
        return collector.means()["a"]

    def numbers(found: Moments) -> dict[str, Tensor]:
        assert found.above is not None
        assert isinstance(found.H, Tokens) == (tokens is not None)
        whole = found.summed()
        assert isinstance(whole.H, Tensor)
        assert whole.cross is not None
        named = {"H": whole.H, "cross": whole.cross, "magnitude": found.magnitude}
        return named | {"largest": found.largest, "above": found.above}

    def work(team: Team) -> None:
        found = moments(team)
        assert found.tokens == 30
        save_tensors(tmp_path / f"{team.rank}.safetensors", numbers(found))

    assert forked(work) == [0, 0]
    from safetensors.torch import load_file

    expected = numbers(moments(ALONE))
    a, b = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, tensor in expected.items():
        assert torch.equal(a[name], b[name]), name
        if tokens is None:
            assert (a[name] - tensor).norm() < 1e-6 * tensor.norm(), name
        else:
            assert torch.equal(a[name], tensor), name


def test_rows_are_picked_from_the_process_that_has_them(tmp_path: Path) -> None:
    X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    X[0, 0] = -0.0
    rows = torch.tensor([4, 0, 2, 0])

    def work(team: Team) -> None:
        states = States(team=team)
        own = X[team.share(5, 2)]
        assert states.count(own) == 5
        found = states.pick(own, rows)
        assert torch.equal(found.view(torch.int16), X[rows].view(torch.int16))

    assert forked(work) == [0, 0]


def test_shares_are_whole_batches_where_there_are_enough() -> None:
    def shares(sequences: int, at_once: int, count: int) -> list[range]:
        found = (Team(r, count).share(sequences, at_once) for r in range(count))
        return [range(sequences)[part] for part in found]

    assert shares(40, 16, 2) == [range(16), range(16, 40)]
    assert shares(40, 16, 3) == [range(16), range(16, 32), range(32, 40)]
    # One batch would leave a process with nothing.
    assert shares(5, 8, 2) == [range(2), range(2, 5)]
    assert shares(7, 8, 1) == [range(7)]


@pytest.fixture
def run() -> Run:
    words = ["recipe=gptq-int4", "scheme.group_size=32", "eval=none", "speed=none"]
    return parse(compose_settings(words))


def in_stage(run: Run, model: ModelFolder, folder: Path, text: Tensor) -> Callable[[Team], None]:
    """Go through ``quantize`` as a run does; what the main process is told is in said.txt."""

    def work(team: Team) -> None:
        given = Work(run, model, model, folder / "out", folder / "out.state", {}, text)
        try:
            if not team.is_main:
                code = join()
                processes.release(code)
                raise SystemExit(code)
            report = run_stage("quantize", given)
            assert report["processes"] == 2
            processes.release(0)
        except UserError as error:
            name = "said" if team.is_main else "heard"
            (folder / f"{name}.txt").write_text(str(error))
            raise SystemExit(2) from None

    return work


def test_a_mistake_that_one_process_meets_ends_all_with_its_sentence(
    make_model: Callable[..., ModelFolder], text: Tensor, tmp_path: Path, run: Run
) -> None:
    """A token whose embedding is broken, in the text of the second process alone."""
    source = make_model(vocab_size=321)
    broken = tmp_path / "broken"
    broken.mkdir()
    source.copy_companions(broken)
    tensors = {name: source.tensor(name).clone() for name in source.names}
    tensors["model.embed_tokens.weight"][320] = torch.nan
    save_tensors(broken / "model.safetensors", tensors)
    (broken / "config.json").write_text(json.dumps(source.config))
    text = text.clone()
    text[-1, -1] = 320
    assert forked(in_stage(run, ModelFolder(broken), tmp_path, text)) == [2, 2]
    said = (tmp_path / "said.txt").read_text()
    assert "model.embed_tokens.weight" in said
    assert (tmp_path / "heard.txt").read_text() == said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_kill_of_one_ends_the_other_and_they_go_on(
    tiny: ModelFolder,
    text: Tensor,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    killed: int,
) -> None:
    """One that is killed has written its part of the second position, maybe without the other's."""
    monkeypatch.setattr(saved, "TIMES", 0)
    save, loaded = Saved.save, Saved.load

    def killing(self: Saved, *given: Any) -> None:
        if self._count == 1 and self.team.rank == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, *given)

    def noting(self: Saved) -> Any:
        found = loaded(self)
        done = None if found is None else len(found.facts["blocks"])
        (tmp_path / f"found-{self.team.rank}").write_text(str(done))
        return found

    work = in_stage(run, tiny, tmp_path, text)
    with monkeypatch.context() as patch:
        patch.setattr(Saved, "save", killing)
        ends = forked(work)
    assert ends[killed] == -signal.SIGKILL
    assert ends[1 - killed] == (2 if killed else 1)
    if killed:
        assert "another process of this run ended" in (tmp_path / "said.txt").read_text()
    monkeypatch.setattr(Saved, "load", noting)
    assert forked(work) == [0, 0]
    assert [(tmp_path / f"found-{rank}").read_text() for rank in range(2)] == ["1", "1"]
    alone = Work(run, tiny, tiny, tmp_path / "one", tmp_path / "one.state", {}, text)
    assert "processes" not in run_stage("quantize", alone)
    ours, theirs = contents(tmp_path / "out"), contents(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_one_process_does_not_go_on_from_the_state_of_two(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The order of sums is another one."""
    two = Saved(tmp_path / "quantize.state", {"processes": 2})
    two.save({"blocks": []})
    assert Saved(tmp_path / "quantize.state", {"processes": 1}).load() is None
    assert "quantize starts anew: processes was 2, is 1" in caplog.text


def test_more_processes_than_sequences_are_refused(
    tiny: ModelFolder, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.pipeline import check

    words = ["recipe=gptq-int4", "scheme.group_size=32", "data.sequences=1", "data.length=32"]
    words += ["eval=none", "speed=none", f"model.source={tiny.path}"]
    words += ["data=text", f"data.source={text_file}"]
    run = parse(compose_settings(words))
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(UserError, match=r"data.sequences=1 cannot be shared by 2 processes"):
        check(run)


def test_what_needs_no_data_is_the_main_processs_alone(
    tiny: ModelFolder, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    seen: list[Work] = []
    monkeypatch.setitem(stages._STAGES, "quantize", lambda work: seen.append(work) or {})
    given = Work(run, tiny, tiny, tmp_path / "out", tmp_path / "state", {}, None)
    assert run_stage("quantize", given) == {}
    assert not seen[0].shared


def test_experts_see_the_tokens_of_all(text: Tensor, tmp_path: Path) -> None:
    """Of each the tokens that both processes send to it, in the same order of batches."""
    _, folder = written_model("qwen3_moe", tmp_path / "model", torch.bfloat16)
    tokens = text[:, :128]
    stage = quantizing([AwqScale(4)], [Nearest()])

    def work(team: Team) -> None:
        report = stage(folder, tmp_path / "two", tokens, team)
        (tmp_path / f"{team.rank}.json").write_text(json.dumps(report))

    assert forked(work) == [0, 0]
    alone = stage(folder, tmp_path / "one", tokens, ALONE)
    counts = [block["expert_tokens"] for block in alone["blocks"]]
    assert all(len(set(seen.values())) > 1 for seen in counts)
    for rank in (0, 1):
        report = json.loads((tmp_path / f"{rank}.json").read_text())
        assert [block["expert_tokens"] for block in report["blocks"]] == counts
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys()
    codes = [name for name in one if name.endswith(".codes")]
    changed = sum(int((one[name] != two[name]).sum()) for name in codes)
    assert changed <= 1e-3 * sum(one[name].numel() for name in codes)
