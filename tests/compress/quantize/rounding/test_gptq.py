"""GPTQ and GPTAQ: cases worked by hand, then textbooks that solve every step anew in float64.

W (out, in); X (tokens, in); H (in, in)
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention

from compress.errors import UserError
from compress.model.families import LLAMA, Input
from compress.model.folder import ModelFolder
from compress.quantize.block import Block, output_error
from compress.quantize.qtensor import QTensor
from compress.quantize.rounding import Gptaq, Gptq, Nearest
from compress.quantize.rounding.gptq import COLUMNS, damped_inverse, solve
from compress.quantize.scheme import Grid, Scheme, make_grid, to_codes
from tests.blocks import pair_block, quantized_blocks, stacked

# More columns than are handled at once, no multiple of them, six groups.
IN, GROUP = 192, 32


def hand(W: list[float], H: list[list[float]], order: list[int], grid: Grid) -> list[int]:
    taken = torch.tensor(order)
    inverse = torch.tensor(H, dtype=torch.float64).inverse()[taken][:, taken]
    U = torch.linalg.cholesky(inverse, upper=True)
    return solve(torch.tensor([W]), U, grid, 2, taken).tolist()[0]


def test_feedback_worked_by_hand() -> None:
    # Levels -1 0 1 2. The error e of the first column moves the second by e * H12 / H22.
    one = Grid(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.uint8))
    H = [[2.0, 1.0], [1.0, 2.0]]
    # 0.4 -> 0, so 0.4 + 0.4 / 2 = 0.6 -> 1.
    assert hand([0.4, 0.4], H, [0, 1], one) == [1, 2]
    assert hand([0.4, 0.4], H, [1, 0], one) == [2, 1]
    # The columns differ in energy: 0.46 + 0.4 / 8 = 0.51 -> 1; the other way 0.4 + 0.46 / 2 = 0.63.
    H = [[1.0, 0.5], [0.5, 4.0]]
    assert hand([0.4, 0.46], H, [0, 1], one) == [1, 2]
    assert hand([0.4, 0.44], H, [0, 1], one) == [1, 1]
    assert hand([0.4, 0.46], H, [1, 0], one) == [2, 1]
    # What is beyond the range is an error too: 3 -> 2, so 0.1 + 1 / 2 = 0.6 -> 1.
    assert hand([3.0, 0.1], [[2.0, 1.0], [1.0, 2.0]], [0, 1], one) == [3, 2]


def test_each_column_keeps_the_grid_of_its_group() -> None:
    H = [[2.0, 1.0], [1.0, 2.0]]
    grid = Grid(torch.tensor([[1.0, 0.5]]), torch.tensor([[1, 0]], dtype=torch.uint8))
    # 0.4 -> 0; 0.1 + 0.2 = 0.3 -> 0.5, code 1 of the second grid.
    assert hand([0.4, 0.1], H, [0, 1], grid) == [1, 1]
    # 0.1 -> 0; 0.4 + 0.05 -> 0, code 1 of the first grid.
    assert hand([0.4, 0.1], H, [1, 0], grid) == [1, 0]
    # Symmetric: the centre is code 2 in both.
    assert hand([0.4, 0.1], H, [0, 1], Grid(grid.scale, None)) == [2, 3]


def inputs(seed: int, sequences: int = 6, length: int = 50, features: int = IN) -> Tensor:
    """Tokens whose columns are correlated and of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    X = torch.randn(sequences, length, features, generator=generator)
    return (X + 2 * X @ mixing) * torch.randn(features, generator=generator).exp()


def by_energy(H: Tensor) -> list[int]:
    return sorted(range(len(H)), key=lambda i: -float(H[i, i]))


def round_column(w: Tensor, q: QTensor, column: int) -> tuple[Tensor, Tensor]:
    """Codes of a column, and the values they stand for, on the grid of its group."""
    scale = q.scale[:, column // GROUP].double()
    zero = 2 ** (q.bits - 1) if q.zero is None else q.zero[:, column // GROUP].double()
    codes = (w / scale + zero).round().clamp(0, 2**q.bits - 1)
    return codes, (codes - zero) * scale


def textbook(W: Tensor, H: Tensor, grid: QTensor) -> Tensor:
    """Codes by optimal brain quantization: round a column, then set all that are free to the best
    they can be given those that are fixed, the minimum of (w - W) H (w - W)^T, solved anew."""
    order, codes, D = by_energy(H), torch.zeros_like(W), torch.zeros_like(W)
    for step, column in enumerate(order):
        fixed, free = order[:step], order[step:]
        moved = -torch.linalg.solve(H[free][:, free], H[free][:, fixed] @ D[:, fixed].T).T
        codes[:, column], value = round_column(W[:, column] + moved[:, 0], grid, column)
        D[:, column] = value - W[:, column]
    return codes


def assert_same(found: QTensor, codes: Tensor, target: Tensor, H: Tensor) -> None:
    """Equal codes but for ties, which float32 may break the other way, and then equal errors."""
    assert (found.codes == codes).double().mean() > 0.995
    expected = QTensor(codes.to(torch.uint8), found.scale, found.zero, found.bits)
    errors = [output_error(q.dequantize(torch.float64) - target, H) for q in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_equals_solving_every_step_anew(symmetric: bool) -> None:
    scheme, X = Scheme(3, GROUP, symmetric), inputs(0)
    W = torch.randn(20, IN, generator=torch.Generator().manual_seed(1))
    block = pair_block(W, X, scheme, split=7)
    found = stacked(Gptq(damping=0.05)(block, {}))
    nearest = to_codes(W, make_grid(W, scheme, W.dtype), scheme)
    assert torch.equal(found.scale, nearest.scale)
    tokens = X.flatten(0, 1).double()
    H = tokens.T @ tokens / len(tokens)
    damped = H + 0.05 * H.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    assert_same(found, textbook(W.double(), damped, found), W.double(), damped)
    # The test shows something only if feedback reaches the columns beyond the first product.
    late = by_energy(H)[COLUMNS:]
    assert (found.codes[:, late] != nearest.codes[:, late]).double().mean() > 0.2
    placed = torch.cat([block.part(name).weight for name in "ab"])
    assert torch.equal(placed, found.dequantize(torch.float32)), "the next linears must see it"


def test_grids_of_a_transform_are_kept() -> None:
    X, scheme = inputs(0, features=64), Scheme(3, GROUP)
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    block = pair_block(W, X, scheme)
    chosen = make_grid(W[:4] * 0.8, scheme, W.dtype)
    block.grids["a"] = chosen
    found = Gptq()(block, {})
    assert torch.equal(found["a"].scale, chosen.scale)
    assert torch.equal(found["b"].scale, make_grid(W[4:], scheme, W.dtype).scale)


@pytest.mark.parametrize("correction", [1.0, 0.25])
def test_gptaq_equals_solving_every_step_anew(correction: float) -> None:
    """After each column the free ones are fitted to what it lost: its rounding error on the inputs as
    they are, and (of the weight as it was) the difference of its input from the original's."""
    scheme, original = Scheme(3, GROUP), inputs(2, sequences=4)
    generator = torch.Generator().manual_seed(3)
    # An error that the remaining inputs explain in part, as that of the blocks before does.
    X = original + 0.2 * original @ torch.randn(IN, IN, generator=generator) / IN**0.5
    W = torch.randn(12, IN, generator=generator)
    block = pair_block(W, X, scheme, original, split=5)
    found = stacked(Gptaq(damping=0.05, correction=correction)(block, {}))

    x, before = X.flatten(0, 1).double(), original.flatten(0, 1).double()
    H = x.T @ x / len(x)
    damped = H + 0.05 * H.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    order, codes, w = by_energy(H), torch.zeros(12, IN, dtype=torch.float64), W.double()
    for step, column in enumerate(order):
        free = order[step + 1 :]
        codes[:, column], value = round_column(w[:, column], found, column)
        lost = (w[:, column] - value).outer(damped[column, free])
        gone = (before - x)[:, column] @ x[:, free] / len(x)
        lost += correction * w[:, column].outer(gone)
        w[:, free] += torch.linalg.solve(damped[free][:, free], lost.T).T
    assert (found.codes == codes).double().mean() > 0.995
    plain = stacked(Gptq(damping=0.05)(pair_block(W, X, scheme, split=5), {}))
    assert (plain.codes != found.codes).double().mean() > 0.1, "the correction must matter here"
    assert torch.equal(plain.scale, found.scale)
    assert block.original is None


def test_gptaq_without_an_error_to_correct_is_gptq() -> None:
    X, scheme = inputs(4, features=64), Scheme(3, GROUP)
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(5))
    blocks = [pair_block(W, X, scheme, X) for _ in range(2)]
    corrected, plain = stacked(Gptaq()(blocks[0], {})), stacked(Gptq()(blocks[1], {}))
    assert torch.equal(corrected.codes, plain.codes)


@pytest.mark.parametrize("method", [Gptq(), Gptaq()])
def test_dead_columns_are_rounded_to_nearest_and_touch_nothing(method: Gptq | Gptaq) -> None:
    dead = [3, 40, 41]
    X, scheme = inputs(6, features=96), Scheme(3, GROUP)
    original = X + 0.1 * inputs(7, features=96)
    X[..., dead] = original[..., dead] = 0
    W = torch.randn(10, 96, generator=torch.Generator().manual_seed(8))
    grid = make_grid(W, scheme, W.dtype)
    assert grid.zero is not None
    found = []
    # The second time other weights stand in the dead columns, on the same grids.
    for rows in (W, W.index_copy(1, torch.tensor(dead), W[:, dead] * 0.3)):
        block = pair_block(rows, X, scheme, original)
        block.grids = {
            "a": Grid(grid.scale[:5], grid.zero[:5]),
            "b": Grid(grid.scale[5:], grid.zero[5:]),
        }
        found.append(stacked(method(block, {})).codes)
        assert block.notes == {"dead_columns.a+b": 3}
        assert torch.equal(found[-1][:, dead], to_codes(rows, grid, scheme).codes[:, dead])
    alive = [i for i in range(96) if i not in dead]
    assert not torch.equal(found[0][:, dead], found[1][:, dead])
    assert torch.equal(found[0][:, alive], found[1][:, alive])


def test_all_inputs_dead_is_rounding_to_nearest() -> None:
    scheme, W = Scheme(3, GROUP), torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    found = stacked(Gptq()(pair_block(W, torch.zeros(2, 5, 64), scheme), {}))
    assert torch.equal(found.codes, to_codes(W, make_grid(W, scheme, W.dtype), scheme).codes)


def indefinite(lowest: float, size: int = 64) -> Tensor:
    """A symmetric matrix with this lowest eigenvalue and a diagonal of mean 1."""
    generator = torch.Generator().manual_seed(9)
    Q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    values = torch.full((size,), (size - lowest) / (size - 1), dtype=torch.float64)
    values[0] = lowest
    return (Q * values) @ Q.T


@pytest.mark.parametrize(
    ("lowest", "damping", "used"), [(0.1, 0.01, 0.01), (-0.05, 0.01, 0.1), (-0.5, 0.03, 1.0)]
)
def test_damping_is_raised_as_far_as_needed(lowest: float, damping: float, used: float) -> None:
    H = indefinite(lowest)
    inverse, found = damped_inverse(H, damping)
    assert found == pytest.approx(used)
    damped = H + used * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    assert torch.allclose(inverse @ damped, torch.eye(len(H), dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("H", [indefinite(-1.5), torch.full((4, 4), torch.nan)])
def test_what_no_damping_helps_is_an_error(H: Tensor) -> None:
    with pytest.raises(RuntimeError, match="cannot be factored"):
        damped_inverse(H, 0.01)


def test_raised_damping_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    block = pair_block(torch.randn(4, 64), inputs(0, features=64), Scheme(3, GROUP))
    block.observe(*block.family.inputs)
    block.moments["a"].second.copy_(indefinite(-0.05))
    monkeypatch.setattr(Block, "observe", lambda *_: None)
    with caplog.at_level(logging.WARNING):
        Gptq()(block, {})
    assert block.notes == {"damping_raised.a+b": pytest.approx(0.1)}
    assert "a+b: damping had to be raised to 0.1" in caplog.text


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gptq(damping=0),
        lambda: Gptq(damping=1.5),
        lambda: Gptaq(damping=0),
        lambda: Gptaq(correction=1.1),
        lambda: Gptaq(correction=-0.1),
    ],
)
def test_wrong_knobs_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UserError, match=r"rounding.gpta?q.* is not allowed: choose"):
        make()


@pytest.mark.parametrize("method", [Gptq(), Gptaq()])
def test_linears_see_inputs_from_what_is_quantized_before_them(
    tiny: ModelFolder,
    tokens: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    method: Gptq | Gptaq,
) -> None:
    """Each input is observed when those before it compute with their integers, later ones do not."""
    seen: list[tuple[tuple[str, ...], dict[str, Tensor]]] = []
    observe = Block.observe

    def noting(block: Block, *asked: Input) -> None:
        if len(asked) == 1:
            weights = {name: block.part(name).weight.clone() for name in block.weights}
            seen.append((asked[0].linears, weights))
        observe(block, *asked)

    monkeypatch.setattr(Block, "observe", noting)
    block, quantized, _ = next(quantized_blocks(tiny, tokens, [method], Scheme(3, 32)))
    assert [names for names, _ in seen] == [shared.linears for shared in LLAMA.inputs]
    before: list[str] = []
    for names, weights in seen:
        for name, weight in weights.items():
            W = block.weights[name].to(block.dtype)
            expected = quantized[name].dequantize(block.dtype) if name in before else W
            assert torch.equal(weight, expected), (names, name)
        before += names


def test_attention_runs_once_and_as_it_would_every_time(
    tiny: ModelFolder, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the passes through a block (four inputs and the outputs) only one computes attention."""
    calls = 0
    forward = LlamaAttention.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", counting)
    found = list(quantized_blocks(tiny, tokens, [Gptq()], Scheme(3, 32)))
    # The first pass ends at q_proj, just inside.
    assert calls == 2 * len(found)
    monkeypatch.setattr(Block, "attention_once", lambda _: nullcontext())
    plain = list(quantized_blocks(tiny, tokens, [Gptq()], Scheme(3, 32)))
    assert calls == 2 * len(found) + 5 * len(plain)
    for (_, ours, Y), (_, theirs, Z) in zip(found, plain, strict=True):
        assert torch.equal(Y, Z)
        assert all(torch.equal(q.codes, theirs[name].codes) for name, q in ours.items())


def test_gptq_costs_less_than_nearest_on_the_same_grids(tiny: ModelFolder, tokens: Tensor) -> None:
    scheme = Scheme(3, 32)
    block, quantized, _ = next(quantized_blocks(tiny, tokens, [Gptq()], scheme))
    nearest = Nearest()(block, {})
    for name, W in block.weights.items():
        assert torch.equal(quantized[name].scale, nearest[name].scale)
        H = block.moments[name].second
        ours, theirs = (
            output_error(q.dequantize(block.dtype).float() - W, H)
            for q in (quantized[name], nearest[name])
        )
        assert ours < 0.8 * theirs, name


def test_gptaq_ends_nearer_to_the_original(tiny: ModelFolder, tokens: Tensor) -> None:
    """Distance of the last block's outputs from the original's."""
    distances = []
    for method in (Gptq(), Gptaq()):
        for block, _, Y in quantized_blocks(tiny, tokens, [method], Scheme(3, 32), original=True):
            assert block.activations is not None
            assert block.activations.targets is not None
            distance = (Y.float() - block.activations.targets.float()).norm()
        distances.append(float(distance))
    assert distances[1] < distances[0]
