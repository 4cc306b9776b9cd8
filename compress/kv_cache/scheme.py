"""Which numbers the keys and values of attention are kept in while a model decodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from compress.errors import UserError

TYPES = ("int", "float")
SHARES = ("channel", "token", "head", "tensor")
BITS = (2, 4, 8)
# Bytes of a scale, and of the smallest value beside it: both float16.
HALF = 2


@dataclass(frozen=True)
class StateScheme:
    """The numbers of keys, or of values, of one head.

    type: int, or float (E4M3)
    bits: 2, 4 or 8; floats have 8
    per: what shares a scale: ``channel``: group_size tokens of a channel; ``token``: group_size channels of
        a token, all of the head if null; both found as tokens come. ``head`` or ``tensor``: fixed by
        calibration, floats only
    group_size: see per
    symmetric: integers around zero instead of a scale and a smallest value
    rotate: stored multiplied by a Hadamard matrix, which spreads outlier channels (QuaRot, arXiv
        2404.00456, section 4)
    """

    type: str = "int"
    bits: int = 4
    per: str = "token"
    group_size: int | None = None
    symmetric: bool = False
    rotate: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that are quantized together."""
        return self.group_size or 1 if self.per == "channel" else 1

    @property
    def static(self) -> bool:
        """Whether calibration fixes the scales."""
        return self.per in ("head", "tensor")

    def bits_per_value(self, head_dim: int) -> float:
        """Bits of a stored value with its share of what describes the group."""
        if self.static:
            return self.bits
        described = HALF * 8 * (1 if self.symmetric else 2)
        return self.bits + described / (self.group_size or head_dim)

    @property
    def name(self) -> str:
        """As in ``int4-channel64``."""
        name = f"{'fp' if self.type == 'float' else 'int'}{self.bits}-{self.per}"
        return f"{name}{self.group_size or ''}{'-rotated' if self.rotate else ''}"

    def check(self, key: str) -> None:
        """Raises UserError naming ``key`` and what is allowed."""
        for name, allowed in (("type", TYPES), ("bits", BITS), ("per", SHARES)):
            if (value := getattr(self, name)) not in allowed:
                raise UserError(
                    f"{key}.{name}={value} is not allowed: choose {', '.join(map(str, allowed))}"
                )
        if (self.type == "float") != self.static:
            raise UserError(
                f"{key}.per={self.per} is not allowed with {key}.type={self.type}: choose channel or token "
                "for int, head or tensor for float"
            )
        if self.type == "float" and self.bits != 8:
            raise UserError(
                f"{key}.bits={self.bits} is not allowed with {key}.type=float: choose 8"
            )
        if self.static and self.rotate:
            raise UserError(
                f"{key}.rotate=true is for integers: floats lose in proportion to their size anyway"
            )
        size = self.group_size
        if self.static and size is not None:
            raise UserError(
                f"{key}.group_size={size} is not used with {key}.per={self.per}: leave it out"
            )
        if (self.per == "channel" and size is None) or (size is not None and size < 2):
            given = "null" if size is None else size
            raise UserError(f"{key}.group_size={given} is not allowed: choose 2 or more")


@dataclass(frozen=True)
class CacheScheme:
    """How a cache keeps keys and values.

    keys, values: their numbers
    sinks: first tokens of a sequence that stay in 16 bits
    window: most recent tokens that stay in 16 bits, at least; what leaves it is quantized ``step`` at a time.
        With 0, and scales by token, what attention reads of a token has always been
        quantized, its own keys and values too.
        (KIVI, arXiv 2402.02750, section 3.3, has the window; sinks are those of arXiv 2309.17453)
    pre_rope: keys are stored as they are before the rotary embedding and turned again when they are read
        (KVQuant, arXiv 2401.18079, section 3.2)
    """

    keys: StateScheme = field(default_factory=StateScheme)
    values: StateScheme = field(default_factory=StateScheme)
    sinks: int = 0
    window: int = 0
    pre_rope: bool = False

    def __post_init__(self) -> None:
        self.keys.check("kv_cache.keys")
        self.values.check("kv_cache.values")
        for name in ("sinks", "window"):
            if (value := getattr(self, name)) < 0:
                raise UserError(f"kv_cache.{name}={value} is not allowed: choose 0 or more")
        if self.values.per == "channel":
            raise UserError(
                "kv_cache.values.per=channel is not allowed: choose token, head or tensor, as values have no "
                "outlier channels"
            )
        if self.static and self.pre_rope:
            raise UserError("kv_cache.pre_rope=true is for integers: engines keep floats behind it")
        if self.keys.static != self.values.static or (self.static and self.keys != self.values):
            raise UserError(
                "kv_cache.keys and kv_cache.values must be the same floats, or both integers"
            )

    @property
    def static(self) -> bool:
        """Whether calibration fixes the scales."""
        return self.keys.static

    @property
    def name(self) -> str:
        same = self.keys == self.values
        name = self.keys.name if same else f"{self.keys.name}+{self.values.name}"
        return name + ("-prerope" if self.pre_rope else "")

    @property
    def step(self) -> int:
        """Tokens that leave the window together: a group of the keys, or where they have none, a window."""
        return self.keys.tokens if self.keys.per == "channel" else max(1, self.window)

    @property
    def direct(self) -> bool:
        """Whether a token is quantized before anything attends to it."""
        return self.window == 0 and self.step == 1

    def kept(self, tokens: int) -> int:
        """How many of so many tokens are in 16 bits: sinks, the window, and what fills no group yet."""
        rest = max(0, tokens - self.sinks)
        return tokens - max(0, rest - self.window) // self.step * self.step

    def share(self, tokens: int, head_dim: int) -> float:
        """Bytes of a cache of so many tokens over those of one in 16 bits, counted from the scheme."""
        packed = tokens - self.kept(tokens)
        bits = [state.bits_per_value(head_dim) for state in (self.keys, self.values)]
        return (packed * sum(bits) / 2 + self.kept(tokens) * 16) / (tokens * 16)

    def as_config(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_config(cls, found: Mapping[str, Any]) -> CacheScheme:
        states = {name: StateScheme(**found[name]) for name in ("keys", "values")}
        return cls(**{**found, **states})


def cache_bytes(
    scheme: CacheScheme | None,
    windows: Sequence[int | None],
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    context: int,
) -> float:
    """Bytes of keys and values that attention reads of a sequence of so many tokens, all layers.

    scheme: None keeps all in the model's dtype of ``itemsize`` bytes; windows: tokens that each layer sees,
    None: all
    """
    total = 0.0
    for window in windows:
        seen = context if window is None else min(context, window)
        share = 1.0 if scheme is None else scheme.share(seen, head_dim)
        total += share * seen * 2 * kv_heads * head_dim * itemsize
    return total
