"""The schema of a recipe: every key a YAML or the command line may set, its type and its default.

Hydra composes the YAML files under recipes/; ``parse`` turns the result into these dataclasses and
refuses what does not fit, before a weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ValidationError

from compress.device import device_named
from compress.distill.knobs import Distill
from compress.engines import ENGINES as SERVING
from compress.errors import UserError
from compress.export.formats import FORMATS
from compress.kv_cache.scheme import CacheScheme, StateScheme
from compress.order import STAGES, check_order
from compress.prune.knobs import Prune
from compress.quantize.block import Rounding, Transform
from compress.quantize.inputs import InputScheme
from compress.quantize.repair import REPAIRS, Kl
from compress.quantize.rounding import ROUNDINGS
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.search import Search
from compress.quantize.stage import needs_data
from compress.quantize.transforms import TRANSFORMS
from compress.report.gate import Gate, check_limit
from eval.retrieval import MOST_FACTS

# The engine that is chosen by the model.
AUTO = "auto"


@dataclass
class ModelConfig:
    """source: a folder, owner/name on the hub, a URL, or gguf-package:NAME; name: how outputs are filed.
    revision: of a name on the hub, a branch, tag or commit (null = main). allow_pickle: weights in .bin or
    .pt alone are read, as tensors and nothing else."""

    name: str = MISSING
    source: str = MISSING
    revision: str | None = None
    allow_pickle: bool = False


@dataclass
class DataConfig:
    """Calibration text: source (several joined by + get equal shares), its field and split;
    sequences x length tokens drawn with seed. generated: so many sequences more, which the original
    writes itself; they keep what is fitted to the text from fitting its domain alone. Repair sees all
    of them, the stages before it at most generated_before_repair (null = all). all_experts: every token
    runs through every expert while they are calibrated, not only those that it is sent to."""

    source: str = MISSING
    field: str = "text"
    split: str = "train"
    sequences: int = 64
    length: int = 512
    generated: int = 0
    generated_before_repair: int | None = None
    all_experts: bool = False
    seed: int = 0


@dataclass
class EvalConfig:
    """Accuracy: the first ``tokens`` tokens of each text in windows, lm-eval tasks on ``limit``
    questions each (null = all). text_field and split: where a text is in its source. dtype is for
    the texts; tasks run in the checkpoint's own. engine: what answers tasks, of TASK_ENGINES.
    fewshot: examples before a question (null = as many as its task asks for). block_tokens: tokens
    of each text on which the harm of every block alone is measured, in whole windows beyond the
    first; null leaves it out. generated: tokens that are written greedily from each of ``prompts``
    beginnings of windows, of at most prompt_tokens, to see how long the candidate agrees with the
    original; 0 leaves it out."""

    texts: list[str] = field(default_factory=list)
    text_field: str = "text"
    split: str = "train"
    tokens: int = 6144
    window: int = 1024
    block_tokens: int | None = None
    prompts: int = 4
    prompt_tokens: int = 256
    generated: int = 0
    dtype: str = "float32"
    tasks: list[str] = field(default_factory=list)
    limit: int | None = None
    fewshot: int | None = None
    chat_template: bool = False
    engine: str = "reference"
    batch_size: int = 16


@dataclass
class ContextConfig:
    """Accuracy at length, through the cache. text: as in eval, in ``windows`` of ``tokens`` each, reported by
    position in ``buckets`` equal parts. lengths: of the texts that facts are hidden in, ``facts`` in each of
    ``haystacks``. generated: tokens the original writes from each of ``prompts`` prompts of prompt_tokens,
    to see how long the candidate agrees. dtype is for all of it."""

    text: str = MISSING
    text_field: str = "text"
    split: str = "train"
    tokens: int = 4096
    windows: int = 2
    buckets: int = 4
    lengths: list[int] = field(default_factory=list)
    haystacks: int = 1
    facts: int = 8
    prompts: int = 4
    prompt_tokens: int = 1024
    generated: int = 128
    dtype: str = "float32"
    seed: int = 0


@dataclass
class MixConfig:
    """A batch of requests of many sizes: tokens in drawn for each sequence, tokens out for the batch, both
    log-uniformly between two bounds."""

    input: list[int] = field(default_factory=lambda: [16, 512])
    output: list[int] = field(default_factory=lambda: [8, 128])


@dataclass
class LimitsConfig:
    """What a request must keep, in milliseconds: TTFT, and its mean ITL. null = no limit."""

    ttft_ms: float | None = None
    itl_ms: float | None = None


@dataclass
class SpeedConfig:
    """Decode speed: every pattern [tokens in, tokens out], and the mix if there is one, at every batch size,
    by every engine of ENGINES; auto is compress, or transformers where compress does not run the blocks.
    scale: what all these lengths are multiplied by. limits: goodput counts the
    requests within. together: all candidates in memory at one time and in turns, one request a round; false:
    one after the other. tune: on CUDA, measure first how products of these sizes run best, and keep it for
    later runs. warmup: requests before ``repeats`` timed ones, at each point. threads null = torch's
    default."""

    patterns: list[list[int]] = field(default_factory=lambda: [[128, 32]])
    mix: MixConfig | None = None
    scale: float = 1.0
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    batches: list[int] = field(default_factory=lambda: [1])
    engines: list[str] = field(default_factory=lambda: [AUTO])
    together: bool = True
    tune: bool = False
    warmup: int = 1
    repeats: int = 5
    seed: int = 0
    threads: int | None = None


@dataclass
class PlanConfig:
    """What ``compress plan`` predicts for: batches; context: tokens of the prompt, and in the cache at the
    step whose time is told."""

    batches: list[int] = field(default_factory=lambda: [1, 64, 256])
    context: int = 1024


@dataclass
class ServeConfig:
    """What must load the result, or nothing is done: engines, of ``compress.engines``; tp: devices that share
    every linear and the heads of the cache."""

    engines: list[str] = field(default_factory=list)
    tp: int = 1


@dataclass
class RecipeConfig:
    """Everything of a run."""

    stages: list[str] = field(default_factory=list)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    # Checked against the dataclasses of the scheme and the methods, in parse().
    scheme: dict[str, Any] = field(default_factory=dict)
    transforms: dict[str, Any] = field(default_factory=dict)
    rounding: dict[str, Any] = field(default_factory=dict)
    # None: embedding and head stay in 16 bits.
    head: dict[str, Any] | None = None
    # None: every linear has scheme.bits.
    search: dict[str, Any] | None = None
    repair: dict[str, Any] = field(default_factory=dict)
    # What the stages prune and distill do.
    prune: dict[str, Any] | None = None
    distill: dict[str, Any] | None = None
    # None: the cache stays in 16 bits.
    kv_cache: dict[str, Any] | None = None
    # Names of formats, in their order: what engines are measured with is the first.
    export: dict[str, Any] = field(default_factory=dict)
    eval: EvalConfig | None = None
    context: ContextConfig | None = None
    speed: SpeedConfig | None = None
    gate: Gate = field(default_factory=Gate)
    # What compress plan predicts on; a run does not look at them.
    hardware: dict[str, Any] | None = None
    plan: PlanConfig = field(default_factory=PlanConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    device: str = "auto"
    # Hidden states between two blocks are kept in files of the run's folder, and not in memory.
    spill: bool = False


@dataclass(frozen=True)
class Run:
    """A checked recipe: settings, and the methods it named as objects. pins: what its sources that are
    elsewhere stand at, see compress.pins"""

    settings: RecipeConfig
    schemes: Schemes
    transforms: tuple[Transform, ...]
    roundings: tuple[Rounding, ...]
    search: Search | None
    repair: Kl | None
    cache: CacheScheme | None
    prune: Prune | None
    distill: Distill | None
    device: torch.device
    pins: dict[str, str] = field(default_factory=dict)

    @property
    def first_format(self) -> str:
        """The format of the checkpoint that is measured, the first of those named."""
        return next(iter(self.settings.export))

    @property
    def needs_data(self) -> bool:
        fitted = self.search is not None or self.repair is not None or self.prune is not None
        if self.cache is not None:
            fitted |= self.cache.static
        if "quantize" not in self.settings.stages:
            return fitted
        return fitted or needs_data(self.schemes, self.transforms, self.roundings)


def settings_of(config: DictConfig) -> RecipeConfig:
    """The settings of a composed config, counts checked. Raises UserError."""
    settings = OmegaConf.to_object(config)
    assert isinstance(settings, RecipeConfig), type(settings)
    _check_known(settings)
    _check_sizes(settings)
    return settings


def _check_known(section: Any, prefix: str = "") -> None:
    """Raises UserError for a key that the schema lacks: with a plus in front Hydra adds it all the same."""
    known = [f.name for f in fields(section)]
    for name, value in vars(section).items():
        if name not in known:
            raise UserError(f"{prefix}{name} is not a known key: known are {', '.join(known)}")
        if is_dataclass(value):
            _check_known(value, f"{prefix}{name}.")


def parse(settings: RecipeConfig) -> Run:
    """The checked run of a recipe.

    Raises UserError naming the key and the allowed values.
    """
    _check_names("stages", settings.stages, STAGES)
    check_exports(settings)
    _check_stages(settings)
    search = settings.search
    schemes = schemes_of(settings)
    if "quantize" in settings.stages:
        _check_numbers(settings, schemes)
        _check_rounding(settings, schemes.linears)
    cache = cache_scheme_of(settings)
    quantized = schemes if "quantize" in settings.stages else None
    searched = None if search is None else _build("search", Search, search)
    if quantized is not None and searched is not None:
        quantized = replace(quantized, exceptions=_choices(searched, schemes.linears))
    check_formats(list(settings.export), quantized, cache)
    repairs = _plugins("repair", settings.repair, REPAIRS)
    return Run(
        settings=settings,
        schemes=schemes,
        transforms=tuple(_plugins("transforms", settings.transforms, TRANSFORMS)),
        roundings=_roundings(settings),
        search=searched,
        repair=repairs[0] if repairs else None,
        cache=cache,
        prune=None if settings.prune is None else _build("prune", Prune, settings.prune),
        distill=None if settings.distill is None else _build("distill", Distill, settings.distill),
        device=device_of(settings),
    )


def schemes_of(settings: RecipeConfig) -> Schemes:
    """The numbers of linears and head that the settings name. Raises UserError."""
    head = settings.head
    return Schemes(
        _scheme("scheme", settings.scheme),
        head=None if head is None else _scheme("head", head),
    )


def _choices(search: Search, scheme: Scheme) -> dict[str, Scheme]:
    """The schemes that a search may give linears beside their own: a format must hold them all."""
    others = [bits for bits in search.bits if bits != scheme.bits]
    return {f"search.choices={bits}": replace(scheme, bits=bits) for bits in others}


def _check_numbers(settings: RecipeConfig, schemes: Schemes) -> None:
    """Raises UserError for a method that does not fit the numbers of the scheme."""
    scheme, head = schemes.linears, schemes.head
    if not scheme.grouped_integers:
        tables: dict[str, Mapping[str, Any]] = {"transforms": TRANSFORMS, "rounding": ROUNDINGS}
        for key, table in tables.items():
            for name in getattr(settings, key):
                if name in table and table[name].grouped_integers:
                    raise UserError(
                        f"{key}={name} works on integers in groups or rows, not on {scheme.name}: leave "
                        "it out"
                    )
    if not scheme.grouped_integers or scheme.inputs is not None:
        for key in ("search", "repair", "head"):
            if getattr(settings, key):
                raise UserError(
                    f"{key} works on integers in groups or rows with 16-bit inputs, not on "
                    f"{scheme.name}: leave it out"
                )
    if head is not None and (not head.grouped_integers or head.inputs is not None):
        raise UserError(f"head={head.name} is not allowed: choose integers in groups or rows")


def _check_rounding(settings: RecipeConfig, scheme: Scheme) -> None:
    """Raises UserError for a method that would make up for errors that are never made."""
    if scheme.inputs is not None and scheme.inputs.outliers == "static":
        for name in settings.rounding:
            if name != "nearest":
                raise UserError(
                    f"rounding={name} would make up for errors of columns that outliers=static keeps: "
                    "choose rounding=nearest"
                )


def check_exports(settings: RecipeConfig) -> None:
    """Raises UserError for no format, one that is not known, or knobs that none has."""
    if not settings.export:
        raise UserError(f"export=[] is not allowed: choose from {', '.join(FORMATS)}")
    _check_names("export", list(settings.export), tuple(FORMATS))
    for name, knobs in settings.export.items():
        if knobs:
            raise UserError(f"export.{name}.{next(iter(knobs))} is not known: it has no knobs")


def check_formats(names: list[str], schemes: Schemes | None, cache: CacheScheme | None) -> None:
    """Raises UserError for a format that does not hold weights of these schemes (None: of 16 bits) and this
    cache."""
    for name in names:
        if schemes is not None:
            FORMATS[name].check(schemes)
        elif not FORMATS[name].plain:
            raise UserError(
                f"export={name} holds quantized weights, and these stay in 16 bits: leave it out"
            )
        if cache is not None and cache.static and not FORMATS[name].cache_scales:
            raise UserError(
                f"export={name} has no place for the scales of the cache: choose "
                "compressed-tensors, or kv_cache=int8, int4 or int2"
            )


def _check_stages(settings: RecipeConfig) -> None:
    stages = settings.stages
    check_order(stages)
    if "quantize" not in stages:
        for key in ("search", "head", "transforms"):
            if getattr(settings, key):
                raise UserError(f"{key} needs quantize among the stages")
    if ("repair" in stages) != (len(settings.repair) == 1):
        raise UserError(
            f"the stage repair needs one method of: {', '.join(REPAIRS)}, as in repair=kl; and "
            "repair=kl needs repair among the stages"
        )
    _check_settings_of_stages(settings)


def _check_settings_of_stages(settings: RecipeConfig) -> None:
    """Raises UserError for a stage without its settings, and settings without their stage."""
    stages = settings.stages
    for key in ("prune", "distill"):
        if (key in stages) != (getattr(settings, key) is not None):
            raise UserError(
                f"the stage {key} and its settings go together: add {key} to the stages and choose "
                f"{key}=OPTION, or leave both out"
            )
    if "kv_cache" in stages and settings.kv_cache is None:
        raise UserError("the stage kv_cache needs a scheme: add one, as in kv_cache=int4")
    if settings.kv_cache is not None and "kv_cache" not in stages:
        wanted = ",".join([*stages, "kv_cache"])
        raise UserError(f"kv_cache is set, but no stage reads it: add stages=[{wanted}]")


def cache_scheme_of(settings: RecipeConfig) -> CacheScheme | None:
    """The scheme of the cache, those of keys and values built by themselves. Raises UserError."""
    values = settings.kv_cache
    if values is None:
        return None
    states = {
        name: _build(f"kv_cache.{name}", StateScheme, values.get(name) or {})
        for name in ("keys", "values")
    }
    rest = {name: v for name, v in values.items() if name not in states}
    scheme = _build("kv_cache", CacheScheme, rest)
    return replace(scheme, **states)


def _roundings(settings: RecipeConfig) -> tuple[Rounding, ...]:
    """The methods in their order; only one that refines may follow another."""
    methods = _plugins("rounding", settings.rounding, ROUNDINGS)
    if not methods:
        raise UserError(f"rounding must name a method of: {', '.join(ROUNDINGS)}")
    for name, method in list(zip(settings.rounding, methods, strict=True))[1:]:
        if not method.refines:
            refining = ", ".join(n for n, m in ROUNDINGS.items() if m.refines)
            raise UserError(
                f"rounding.{name} starts anew, so it must come first: only {refining} may follow "
                "another method"
            )
    return tuple(methods)


def _plugins(key: str, named: Mapping[str, Any], table: Mapping[str, type]) -> list[Any]:
    """The methods that a mapping {name: knobs} asks for, in its order."""
    _check_names(key, list(named), tuple(table))
    return [_build(f"{key}.{name}", table[name], knobs or {}) for name, knobs in named.items()]


def _scheme(key: str, values: Mapping[str, Any]) -> Scheme:
    """A scheme, that of its inputs built by itself."""
    inputs = values.get("inputs")
    scheme = _build(key, Scheme, {name: v for name, v in values.items() if name != "inputs"})
    if inputs is None:
        return scheme
    return replace(scheme, inputs=_build(f"{key}.inputs", InputScheme, inputs))


def _build(key: str, schema: type, values: Mapping[str, Any]) -> Any:
    """An object of a dataclass from the values a recipe gives it, types checked."""
    allowed = ", ".join(f.name for f in fields(schema)) or "none, it has no knobs"
    if not isinstance(values, Mapping):
        raise UserError(f"{key}={values} is not allowed: set its parts, {allowed}")
    for name in values:
        if name not in allowed.split(", "):
            raise UserError(f"{key}.{name} is not known: known are {allowed}")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except ValidationError as error:
        raise UserError(f"{key}.{error.full_key}: {str(error).splitlines()[0]}") from error


def _check_names(key: str, names: list[str], allowed: tuple[str, ...]) -> None:
    for name in names:
        if name not in allowed:
            raise UserError(f"{key}={name} is not known: known are {', '.join(allowed)}")


# Tokens of a text that still has room for many facts.
SHORTEST = 512
EVAL_DTYPES = ("float32", "bfloat16", "float16")
# What decodes: the runtime of this project, transformers' generate, vLLM.
ENGINES = ("compress", "transformers", "vllm")
# What answers tasks: our own reader, which computes with the weights that the codes stand for, and these.
TASK_ENGINES = ("reference", *ENGINES)
# The least value of a count, where it is not 1: in 2 tokens there is one to predict.
LEAST = {
    "length": 2,
    "prompt_tokens": 2,
    "block_tokens": 2,
    "generated": 0,
    "generated_before_repair": 0,
    "seed": 0,
    "warmup": 0,
    "fewshot": 0,
}


def _check_sizes(settings: RecipeConfig) -> None:
    """Every count of the recipe must be positive, and windows must hold something to predict."""
    sections = {
        "data": settings.data,
        "eval": settings.eval,
        "context": settings.context,
        "speed": settings.speed,
        "plan": settings.plan,
        "serve": settings.serve,
    }
    for section, config in sections.items():
        if config is None:
            continue
        for f in fields(config):
            value = getattr(config, f.name)
            if type(value) is int and value < (least := LEAST.get(f.name, 1)):
                raise UserError(
                    f"{section}.{f.name}={value} is not allowed: choose {least} or more"
                )
    for section, config in (("eval", settings.eval), ("context", settings.context)):
        if config is not None:
            _check_names(f"{section}.dtype", [config.dtype], EVAL_DTYPES)
    if settings.eval is not None:
        _check_eval(settings.eval)
    if settings.context is not None:
        _check_context(settings.context)
    if settings.speed is not None:
        _check_speed(settings.speed)
    _check_model_name(settings)
    _check_batches("plan.batches", settings.plan.batches)
    _check_names("serve.engines", settings.serve.engines, tuple(SERVING))
    _check_gate(settings.gate, settings.eval)


def _check_model_name(settings: RecipeConfig) -> None:
    """Raises UserError for a name that would file outputs elsewhere."""
    name = settings.model.name
    if "/" in name or name in ("", ".", "..") or not name.isprintable():
        raise UserError(f"model.name={name!r} is not allowed: choose the name of one folder")


def _check_eval(evaluation: EvalConfig) -> None:
    _check_names("eval.engine", [evaluation.engine], TASK_ENGINES)
    if not 2 <= evaluation.window <= evaluation.tokens:
        raise UserError(
            f"eval.window={evaluation.window} is not allowed: choose 2 to eval.tokens="
            f"{evaluation.tokens}"
        )


def _check_gate(gate: Gate, evaluation: EvalConfig | None) -> None:
    """Raises UserError for a limit that makes no sense, or that is on something not measured."""
    for name, limit in gate.limits.items():
        check_limit(name, limit)
        key = "tasks" if name == "accuracy" else "texts"
        if evaluation is None or not getattr(evaluation, key):
            raise UserError(f"gate.{name} needs eval.{key} to be measured: name one")


def _check_speed(speed: SpeedConfig) -> None:
    _check_served(speed)
    for pattern in speed.patterns or ([[]] if speed.mix is None else []):
        # Of one token out there is no gap to measure.
        if len(pattern) != 2 or pattern[0] < 1 or pattern[1] < 2:
            raise UserError(
                f"speed.patterns={speed.patterns} is not allowed: choose pairs of tokens in, 1 or more, and "
                "tokens out, 2 or more, as in speed.patterns=[[128,32],[1024,128]]"
            )
    _check_batches("speed.batches", speed.batches)
    if not speed.engines:
        raise UserError(f"speed.engines=[] is not allowed: choose from {', '.join(ENGINES)}")
    if speed.engines != [AUTO]:
        _check_names("speed.engines", speed.engines, ENGINES)


def _check_batches(key: str, batches: list[int]) -> None:
    if min(batches, default=0) < 1:
        raise UserError(
            f"{key}={batches} is not allowed: choose sizes of 1 or more, as in {key}=[1,8,64]"
        )


def _check_served(speed: SpeedConfig) -> None:
    """Raises UserError for a mix, a scale or limits that mean nothing."""
    if speed.mix is not None:
        for key, least in (("input", 1), ("output", 2)):
            ends = getattr(speed.mix, key)
            if len(ends) != 2 or not least <= ends[0] <= ends[1]:
                raise UserError(
                    f"speed.mix.{key}={ends} is not allowed: choose the least and the most tokens, {least} "
                    f"or more, as in speed.mix.{key}=[16,512]"
                )
    if not 0 < speed.scale < math.inf:
        raise UserError(
            f"speed.scale={speed.scale} is not allowed: choose a number above 0, as in speed.scale=0.25"
        )
    for key, limit in asdict(speed.limits).items():
        if limit is not None and not limit > 0:
            raise UserError(
                f"speed.limits.{key}={limit} is not allowed: choose milliseconds above 0, or null"
            )


def _check_context(context: ContextConfig) -> None:
    if any(length < SHORTEST for length in context.lengths):
        raise UserError(
            f"context.lengths={context.lengths} is not allowed: choose {SHORTEST} or more tokens"
        )
    if context.tokens % context.buckets or context.tokens < 2 * context.buckets:
        raise UserError(
            f"context.buckets={context.buckets} is not allowed: choose a divisor of context.tokens="
            f"{context.tokens}, at most half of it"
        )
    if context.generated < 1:
        raise UserError(f"context.generated={context.generated} is not allowed: choose 1 or more")
    if not 2 <= context.facts <= MOST_FACTS:
        raise UserError(f"context.facts={context.facts} is not allowed: choose 2 to {MOST_FACTS}")


def device_of(settings: RecipeConfig) -> torch.device:
    """The device a run works on. Raises UserError for an unknown or absent one."""
    return device_named(settings.device)
