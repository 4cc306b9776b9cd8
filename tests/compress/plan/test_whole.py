"""A model that does not fit is refused where it would be held as a whole, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from compress.compose import compose_settings
from compress.config import parse
from compress.errors import UserError
from compress.model.folder import ModelFolder
from compress.model.shapes import ShapeFolder
from compress.plan import whole
from compress.plan.whole import check_memory, held, memory_of

SHAPE = ShapeFolder("llama-3.1-8b")
# 8,030,261,248 weights.
GB_16 = 16.060522496
NOTHING = ["eval=none", "speed=none"]


def needs(*words: str) -> dict[str, float]:
    run = parse(compose_settings(["device=cpu", *words]))
    return {part.what: part.bytes / 1e9 for part in held(run, SHAPE)}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (NOTHING, {}),
        (
            ["eval=standard", "speed=none"],
            {"eval, with the original beside the candidate,": 4 * GB_16, "eval.tasks": GB_16},
        ),
        (
            ["eval=standard", "speed=standard", "eval.dtype=bfloat16", "eval.tasks=[boolq]"],
            {
                "eval, with the original beside the candidate,": 2 * GB_16,
                "eval.tasks": GB_16,
                "speed": GB_16,
            },
        ),
        ([*NOTHING, "context=standard"], {"context": 4 * GB_16}),
        ([*NOTHING, "data.generated=4"], {"data.generated": GB_16}),
    ],
)
def test_what_is_held(words: list[str], expected: dict[str, float]) -> None:
    assert needs("recipe=awq-int4", *words) == pytest.approx(expected)


def test_what_trains_or_searches_is_held() -> None:
    assert needs("recipe=mixed-3.5", *NOTHING) == pytest.approx({"search": GB_16})
    repaired = needs("recipe=best-int3", *NOTHING, "data.generated=0")
    assert repaired["the stage repair"] == pytest.approx(2 * GB_16)
    pruned = needs("recipe=prune-width-distill", "eval=standard", "speed=none")
    assert pruned["the stage distill"] == pytest.approx(GB_16)
    assert pruned["eval, with the original beside the candidate,"] == pytest.approx(2 * GB_16)


def test_the_refusal_names_what_to_turn_off(
    tiny: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["recipe=awq-int4", "device=cpu", "eval=standard", "speed=none"]
    run = parse(compose_settings(words))
    check_memory(run, tiny)
    monkeypatch.setattr(whole, "memory_of", lambda _: 1_000_000)
    with pytest.raises(
        UserError, match=r"eval, .* holds .* GB of weights of .*this machine has 0\.0 GB.*eval=none"
    ):
        check_memory(run, tiny)
    check_memory(parse(compose_settings([*words, "eval=none"])), tiny)


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    cpu = torch.device("cpu")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(whole, "CGROUP_LIMIT", limit)
    machine = memory_of(cpu)
    limit.write_text("max\n")
    assert memory_of(cpu) == machine
    limit.write_text("1000000\n")
    assert memory_of(cpu) == 1_000_000
