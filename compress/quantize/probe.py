"""What an unknown architecture is made of, found by running it: a proposal of its family's data.

Blocks of each kind run with random weights. Linears that read one tensor are those that are handed it. What
makes that tensor is a norm or linear that takes a random scale of its channels out of them while the block's
outputs stay the same: nothing is taken from names.

X (sequences, length, hidden) float32; s (in,)
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.errors import UserError
from compress.model.experts import unpack
from compress.model.families import (
    FUSED,
    GPT2,
    GPT_OSS,
    RECURRENT,
    ROUTED,
    Experts,
    Family,
    Input,
)
from compress.model.folder import STUMBLES, ModelFolder
from compress.model.skeleton import OPTIONAL, REQUIRED, as_linear, bare_model
from compress.model.walk import NoteTaker, run

SEQUENCES, LENGTH = 2, 16
# Outputs of a block are the same up to what float32 rounds, of their mean size.
TOLERANCE = 1e-3
# Fewer rows are no linear of size: gates of one number.
ROWS = 8
CUTS = ("rotate", "prune")
UNKNOWN = "what belongs together in it is not known of a probed family"


@torch.no_grad()
def probe(folder: ModelFolder) -> Family:
    """The family of a model that transformers can run. Raises UserError, with the reason, where it does not,
    and for a model whose blocks are not one behind the other or cannot be run by themselves."""
    try:
        model = bare_model(folder.config, torch.float32)
    except ValueError as error:
        raise UserError(f"{folder.path}/config.json is not usable: {error}") from error
    try:
        return _family_of(model, folder.config)
    except STUMBLES as error:
        # Whatever a model of a type that nobody here has seen stumbles over when it is run in parts.
        reason = str(error).strip().partition("\n")[0]
        if not isinstance(error, UserError):
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(
            f"{folder.path}: models of type {folder.config['model_type']} cannot be probed: {reason}"
        ) from error


def _family_of(model: Any, config: dict[str, Any]) -> Family:
    torch.manual_seed(0)
    names = {module: name for name, module in model.named_modules()}
    blocks = max(
        (m for m in model.modules() if isinstance(m, nn.ModuleList)),
        key=lambda found: sum(p.numel() for p in found.parameters()),
        default=None,
    )
    if blocks is None:
        raise UserError(f"no list of blocks in {type(model).__name__}")
    path = names[blocks].rpartition(".")[0]
    decoder, embedding = model.get_submodule(path), model.get_input_embeddings()
    head = model.get_output_embeddings()
    if embedding not in names or head not in names:
        raise UserError(f"no embedding or no head in {type(model).__name__}")
    _fill(decoder, without=(blocks, embedding))
    notes, final = _called(decoder, blocks)
    found = Family(
        name=config["model_type"],
        model_types=(config["model_type"],),
        attention="",
        blocks=names[blocks],
        embedding=names[embedding],
        final_norm=names[final],
        head=names[head],
        head_module=names[head],
        rotary=next((names[m] for m in decoder.children() if hasattr(m, "inv_freq")), ""),
        tied=bool(model.config.tie_word_embeddings),
        plain_logits=_plain_logits(model, names[head], final, (decoder, blocks, notes)),
        settings=_settings(config, model.config),
        refuses=FUSED | dict.fromkeys(CUTS, UNKNOWN),
    )
    inputs: dict[tuple[str, ...], Input] = {}
    kinds: set[str] = set()
    attends = True
    for layer, note in zip(blocks, notes, strict=True):
        kind = repr([(name, type(m).__name__) for name, m in layer.named_modules()])
        if kind in kinds:
            continue
        kinds.add(kind)
        trial = _Trial(layer, note.arguments, decoder.config.hidden_size)
        for shared in trial.inputs():
            inputs.setdefault(shared.linears, shared)
        found = trial.told(found)
        attends = attends and trial.attention_output != ""
    if not attends:
        more = {what: RECURRENT[what] for what in ("kv_cache", "plan")}
        found = replace(found, refuses={**found.refuses, **more})
    elif not all(found.settings.get(key, key) for key in ("num_attention_heads", "hidden_size")):
        found = replace(found, refuses={**found.refuses, "plan": "its config names no heads"})
    return replace(found, inputs=tuple(inputs.values()))


def _settings(stated: dict[str, Any], config: Any) -> dict[str, str]:
    """The names that a config has for sizes, where those are not Llama's; "" for one it lacks."""
    named = {key: config.attribute_map.get(key, key) for key in REQUIRED | OPTIONAL}
    found = {key: own if isinstance(stated.get(own), int) else "" for key, own in named.items()}
    return {key: own for key, own in found.items() if own != key}


def _fill(module: nn.Module, without: Sequence[nn.Module] = ()) -> None:
    """Random weights that keep the size of what they read; of norms, numbers near 1."""
    inner = {p for skipped in without for p in skipped.parameters()}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None or parameter in inner or not parameter.is_meta:
                continue
            noise = torch.randn(parameter.shape)
            value = 0.3 * noise + 1 if parameter.dim() == 1 else noise / parameter.shape[-1] ** 0.5
            owner._parameters[name] = nn.Parameter(value, requires_grad=False)


def _called(decoder: Any, blocks: nn.ModuleList) -> tuple[list[NoteTaker], nn.Module]:
    """How the decoder calls each block for one sequence, as the walk asks it, and its final norm."""
    X = torch.randn(1, LENGTH, decoder.config.hidden_size)
    for tuples in (False, True):
        notes = [NoteTaker(layer, tuples) for layer in blocks]
        last: list[nn.Module] = []
        handles = [
            module.register_forward_hook(functools.partial(_add, last))
            for module in decoder.children()
            if not isinstance(module, nn.ModuleList)
        ]
        try:
            with _in_place(decoder, blocks, notes):
                found = decoder(inputs_embeds=X, use_cache=False).last_hidden_state
            if found.shape != X.shape:
                # A block's first output was taken, of one that has no other.
                raise ValueError(f"they end with states of shape {tuple(found.shape)}")
        except STUMBLES as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            continue
        finally:
            for handle in handles:
                handle.remove()
        if not last or not all(note.called for note in notes):
            raise UserError("its blocks do not run one behind the other")
        return notes, last[-1]
    raise UserError(f"its blocks do not run one behind the other: {reason}")


@contextmanager
def _in_place(
    decoder: nn.Module, blocks: nn.ModuleList, notes: Sequence[nn.Module]
) -> Iterator[None]:
    own = next(name for name, module in decoder.named_children() if module is blocks)
    setattr(decoder, own, nn.ModuleList(notes))
    try:
        yield
    finally:
        setattr(decoder, own, blocks)


def _plain_logits(
    model: Any,
    name: str,
    final: nn.Module,
    noting: tuple[nn.Module, nn.ModuleList, Sequence[nn.Module]],
) -> bool:
    """Whether logits are what a head makes of the final norm's outputs and nothing else: a small head without
    a bias, of numbers that a cap would change, in place of the model's own.

    name: of the head; noting: what ``_in_place`` takes
    """
    head = model.get_submodule(name)
    if head.bias is not None:
        return False
    small = nn.Linear(head.in_features, ROWS, bias=False)
    small.weight.data *= 1000
    normed: list[Tensor] = []
    handle = final.register_forward_hook(lambda _, args, out: normed.append(out))
    model.set_submodule(name, small)
    try:
        with _in_place(*noting):
            X = torch.randn(1, LENGTH, head.in_features)
            logits = model(inputs_embeds=X, use_cache=False).logits
        return torch.equal(logits, small(normed[-1]))
    except STUMBLES:
        # Not known to be: nothing that asks for it applies.
        return False
    finally:
        handle.remove()
        model.set_submodule(name, head)


def _add(found: list[nn.Module], module: nn.Module, *_: Any) -> None:
    found.append(module)


@dataclass
class _Group:
    """Linears that read one tensor, and other readers of it, in the order in which they run."""

    linears: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    source: str | None = None
    shift: float = 0.0

    @property
    def readers(self) -> list[str]:
        return [*self.linears, *self.others]


class _Trial:
    """A block of random weights that is run again and again."""

    def __init__(self, layer: nn.Module, arguments: dict[str, Any], hidden: int):
        self.layer, self.arguments = layer, arguments
        self.transposed = [n for n, m in layer.named_modules() if isinstance(m, Conv1D)]
        for name in self.transposed:
            layer.set_submodule(name, as_linear(layer.get_submodule(name)))
        owners = [n for n, m in layer.named_modules() if hasattr(m, "gate_up_proj")]
        packed = [n for n in owners if getattr(layer.get_submodule(n).gate_up_proj, "ndim", 0) == 3]
        self.experts = _experts(layer, packed[0]) if packed else None
        if self.experts is not None:
            _check_experts(layer, packed)
            unpack(layer, self.experts)
        _fill(layer)
        self.X = torch.randn(SEQUENCES, LENGTH, hidden)
        alone = torch.cat([run(layer, x, arguments) for x in self.X.split(1)])
        if not alone.isfinite().all():
            raise UserError("with random weights its blocks do not end in numbers")
        self.order: list[str] = []
        self.attention = self.attention_output = ""
        self.tuple = False
        try:
            self.groups = self._groups()
            self.expected = run(layer, self.X, arguments)
            same = self._is_expected(alone)
        except STUMBLES:
            same = False
        if not same:
            raise UserError("what its blocks are handed for one sequence does not fit several")

    def told(self, family: Family) -> Family:
        """The family with what this block says of it."""
        changes: dict[str, Any] = {"tuples": family.tuples or self.tuple}
        if self.attention_output:
            changes |= {"attention": self.attention, "attention_output": self.attention_output}
        refuses = dict(family.refuses)
        if self.transposed:
            changes["transposed"] = tuple(self.transposed)
            refuses["bitsandbytes"] = GPT2.refuses["bitsandbytes"]
        if self.experts is not None:
            changes["experts"] = self.experts
            refuses |= {what: ROUTED[what] for what in ("bitsandbytes", "gptaq")}
            if self.experts.packed:
                refuses["distill"] = GPT_OSS.refuses["distill"]
        changes["refuses"] = refuses
        if shifts := {group.shift for group in self.groups if group.shift}:
            changes["norm_shift"] = shifts.pop()
        return replace(family, **changes)

    def inputs(self) -> Iterator[Input]:
        """What linears share, and what makes it."""
        for group in self.groups:
            self._find_source([group])
        loose = [g for g in self.groups if g.source is None and _number(g) is not None]
        for pattern in dict.fromkeys(map(_pattern, loose)):
            # All experts read one norm, with a router and what runs beside them.
            own = [group for group in loose if _pattern(group) == pattern]
            rest = [g for g in self.groups if g.source is None and g not in loose]
            for others in [
                [],
                *([group] for group in rest),
                *map(list, itertools.combinations(rest, 2)),
            ]:
                if self._find_source([*own, *others]):
                    break
        told: set[tuple[str, ...]] = set()
        for group in self.groups:
            linears = _pattern(group)
            if linears and linears not in told:
                told.add(linears)
                source = group.source
                same = [g for g in self.groups if source is not None and g.source == source]
                beside = dict.fromkeys(name for g in same for name in g.others)
                yield Input(linears, None if source is None else _as_pattern(source), tuple(beside))

    def _groups(self) -> list[_Group]:
        """By the tensor that is read: the same memory, whatever its shape."""
        self._groups_seen: dict[tuple[int, int], _Group] = {}
        held: list[Tensor] = []
        handles = []
        for name, module in self.layer.named_modules():
            if name and isinstance(getattr(module, "weight", None), nn.Parameter):
                hook = functools.partial(self._note, name, held)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            elif name:
                ended = functools.partial(self._note_attention, name)
                handles.append(module.register_forward_hook(ended, with_kwargs=True))
        self.tuple = isinstance(self.layer(self.X, **self.arguments), tuple)
        for handle in handles:
            handle.remove()
        return list(self._groups_seen.values())

    def _note(
        self, name: str, held: list[Tensor], module: nn.Module, args: Any, kwargs: Any
    ) -> None:
        self.order.append(name)
        X = args[0] if args else next(iter(kwargs.values()))
        # As long as it is held no other tensor has its memory.
        held.append(X)
        if _is_reader(module):
            group = self._groups_seen.setdefault((X.data_ptr(), X.shape[-1]), _Group())
            wide = isinstance(module, nn.Linear) and module.out_features >= ROWS
            (group.linears if wide else group.others).append(name)

    def _note_attention(self, name: str, _: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """Attention is what is told which tokens to look at, and returns how much it did."""
        if self.attention or not isinstance(out, tuple):
            return
        linears = [n for g in self._groups_seen.values() for n in g.linears]
        inner = [n for n in self.order if n in linears and n.startswith(f"{name}.")]
        if inner and {"attention_mask", "past_key_values"} & kwargs.keys():
            self.attention, self.attention_output = name, inner[-1]

    def _find_source(self, groups: list[_Group]) -> bool:
        """Whether something makes what all these groups read; it is noted in them."""
        readers = [name for group in groups for name in group.readers]
        columns = self._weight(readers[0]).shape[1]
        if any(self._weight(name).shape[1] != columns for name in readers):
            return False
        before = self.order[: min(map(self.order.index, readers))]
        s = torch.rand(columns) + 0.5
        for name in reversed(before):
            weight = self._weight(name)
            rows = len(weight)
            if weight.dim() > 2 or name in readers or rows < columns:
                continue
            if weight.dim() == 1 and rows != columns:
                continue
            for shift in (0.0, 1.0) if weight.dim() == 1 else (0.0,):
                with self._scaled(name, readers, s, shift):
                    Y = run(self.layer, self.X, self.arguments)
                if self._is_expected(Y):
                    for group in groups:
                        group.source, group.shift = name, shift
                    return True
        return False

    def _is_expected(self, Y: Tensor) -> bool:
        return bool((Y - self.expected).abs().max() < TOLERANCE * self.expected.abs().mean())

    def _weight(self, name: str) -> Tensor:
        return self.layer.get_parameter(f"{name}.weight")

    @contextmanager
    def _scaled(self, source: str, readers: list[str], s: Tensor, shift: float) -> Iterator[None]:
        module: Any = self.layer.get_submodule(source)
        parts = [module.weight, getattr(module, "bias", None)]
        changed = [p for p in parts if p is not None] + [self._weight(name) for name in readers]
        kept = [(parameter, parameter.data.clone()) for parameter in changed]
        try:
            tail = module.weight.data[-len(s) :]
            tail.add_(shift).div_(s.view(-1, *[1] * (tail.dim() - 1))).sub_(shift)
            if parts[1] is not None:
                parts[1].data[-len(s) :] /= s
            for name in readers:
                self._weight(name).data *= s
            yield
        finally:
            for parameter, value in kept:
                parameter.data = value


def _experts(layer: nn.Module, path: str) -> Experts:
    """Experts at a path, all in two tensors: (expert, 2 * inner, hidden), or turned over, in turn."""
    module: Any = layer.get_submodule(path)
    mlp = path.rpartition(".")[0]
    return Experts(mlp, mlp, packed=module.gate_up_proj.shape[2] != module.down_proj.shape[1])


def _check_experts(layer: nn.Module, paths: Sequence[str]) -> None:
    """Raises UserError for experts that ``unpack`` has no stand-in for."""
    experts: Any = layer.get_submodule(paths[0])
    called = inspect.signature(experts.forward).parameters
    if len(paths) > 1 or not paths[0].endswith(".experts") or len(called) != 3:
        raise UserError(
            f"its experts ({', '.join(paths)}) are not one module named experts that is called with tokens, "
            "their experts, and weights of these"
        )


def _is_reader(module: nn.Module) -> bool:
    weight: Any = module.weight
    return weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _number(group: _Group) -> str | None:
    """Of an expert's input its number."""
    name = group.linears[0] if group.linears else ""
    rest = name.partition(".experts.")[2]
    return rest.partition(".")[0] if rest else None


def _pattern(group: _Group) -> tuple[str, ...]:
    return tuple(map(_as_pattern, group.linears))


def _as_pattern(name: str) -> str:
    head, found, rest = name.partition(".experts.")
    return f"{head}.experts.{{}}.{rest.partition('.')[2]}" if found else name
