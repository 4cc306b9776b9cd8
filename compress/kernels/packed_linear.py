"""Linears from packed weights on a GPU: y = x W^T at the speed at which W is read, with the norm before and
bias, gate and residual after on the way (``Fusion``).

x (tokens, in); W (out, in). Few tokens go through one kernel that unpacks W in registers, in front of the
matrix unit; many through torch's product with W dequantized for the call. A token costs some 2 to 3
instructions a weight whatever the format, which is what a Hopper GPU has to spare at the speed of its memory.

Layout. A tile is 128 columns of 8 rows, a linear run of 32-bit words; K is filled up with zeros. A lane of
four holds 32 columns of a row: column c is lane c / 4 % 4, place c % 4 + 4 (c / 16), so that a lane reads
what the matrix unit wants from it and nothing is exchanged. Two neighbours lie 16 bits apart in a word:
one operation unpacks both. 3 bits are a plane of 2 and a plane of 1. Scales and zero points of a chunk of 8
rows lie side by side, a run for each group. Weights in 16 bits stay as they are.

Where inputs are rounded to 8 bits, a small kernel makes levels of them, which 16 bits hold exactly; their
scale is multiplied in at the end, or for each tile. The RMSNorm of one token or two happens in the product's
own kernel: x times the gain, in the dtype of x (rounded once), is multiplied by W, and the root of the mean
square, added up in the same loop, scales the result. In float16 x times gain must stay below 65504.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from compress.kernels import tuning
from compress.kernels.fusion import PLAIN, Fusion, around
from compress.kernels.tuning import Config, Key
from compress.quantize.inputs import InputScheme
from compress.quantize.qtensor import QTensor

ROWS, TILE = 8, 128
# Columns that share a scale inside a tile; more are runs of whole tiles, 0 is a row, -1 a block of 128 x 128.
GROUPS = (32, 64)
BLOCK = -1
# Words are addressed with 32 bits.
MOST_WORDS = 2**31
# Codes that are packed at a time, each for a moment in 4 bytes.
CODES_AT_ONCE = 2**24
# torch's integer matmul takes more tokens than this on CUDA, and sizes in steps of 8.
INT_ROWS, INT_STEP = 17, 8
REDUCE = 256
# The number in whose mantissa codes become floats, twice: 128 in bfloat16, 1024 in float16.
MAGIC = {torch.bfloat16: 0x43004300, torch.float16: 0x64006400}


@dataclass(frozen=True)
class Layout:
    """bits: of a weight in memory; float: e4m3, or 16 bits; group: columns of a scale, 0 a row, -1 blocks;
    zero: the zero point of all, -1 where each group has its own"""

    bits: int
    float: bool
    group: int
    zero: int = 0

    def name(self, inputs: InputScheme | None) -> str:
        """Bits of weights and inputs, as in "w4a16", "fp8-w8a8": what a report calls the kernel."""
        kind = "fp8-" if self.float and self.bits == 8 else ""
        return f"{kind}w{self.bits}a{16 if inputs is None else 8}"


def layout_of(q: QTensor) -> Layout | None:
    """How a weight would lie; None if it cannot."""
    if q.divisor is not None or q.columns is not None or q.scale.dtype == torch.uint8:
        return None
    if (q.type, q.bits) not in (("float", 8), *(("int", bits) for bits in range(2, 9))):
        return None
    group = _group(q)
    if group is None:
        return None
    if q.type == "float":
        return Layout(8, True, group)
    zero = 2 ** (q.bits - 1) if q.zero is None else -1
    return Layout(q.bits if q.bits <= 4 else 8, False, group, zero)


def _group(q: QTensor) -> int | None:
    if q.block is None:
        size = q.group_size
        if size == q.shape[1]:
            return 0
        if size % TILE == 0:
            return size
        return next((g for g in sorted(GROUPS, reverse=True) if size % g == 0), None)
    if q.block == tuple(q.shape):
        return 0
    return BLOCK if q.block == (TILE, TILE) else None


def name(q: QTensor) -> str:
    """What a report calls its kernel."""
    layout = layout_of(q)
    assert layout is not None, "supports() comes first"
    return layout.name(q.inputs)


def reference(
    x: Tensor, q: QTensor, fusion: Fusion = PLAIN, residual: Tensor | None = None
) -> Tensor:
    """What the kernels compute, in float32 from the dequantized weight and the rounded inputs."""
    W = q.dequantize(torch.float32)

    def product(x: Tensor) -> Tensor:
        return (x if q.inputs is None else q.inputs.round(x, q.input_scale)) @ W.T

    residual = None if residual is None else residual.float()
    return around(product, x.float(), fusion.widened(), residual)


def supports(q: QTensor, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``TritonWeight`` can run this weight here."""
    layout = layout_of(q)
    return (
        _runs(device, dtype)
        and layout is not None
        and q.shape[1] % 16 == 0
        and q.codes.numel() * layout.bits // 32 < MOST_WORDS
        and (q.inputs is None or _rounds(q.inputs, q.shape[1]))
    )


def supports_dense(W: Tensor) -> bool:
    """Whether ``TritonWeight.dense`` can run this weight where it is."""
    return _runs(W.device, W.dtype) and W.shape[1] % 16 == 0


def _runs(device: torch.device, dtype: torch.dtype) -> bool:
    return (
        device.type == "cuda"
        and importlib.util.find_spec("triton") is not None
        # bfloat16 in the matrix unit.
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in MAGIC
    )


def _rounds(inputs: InputScheme, columns: int) -> bool:
    return inputs.outliers == "none" and (inputs.per != "group" or columns % TILE == 0)


def pack_plane(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 (out, in) below 2^bits -> int32 (chunks of 8 rows, tiles, words)."""
    chunks, tiles = -(-codes.shape[0] // ROWS), -(-codes.shape[1] // TILE)
    out = torch.empty(
        chunks, tiles, TILE * ROWS * bits // 32, dtype=torch.int32, device=codes.device
    )
    step = max(1, CODES_AT_ONCE // (ROWS * tiles * TILE))
    place = torch.arange(32 // bits, device=codes.device)
    shift = (place // 2 * bits + place % 2 * 16).to(torch.int32)
    vector = min(4, bits)
    for first in range(0, chunks, step):
        some = codes[first * ROWS : (first + step) * ROWS]
        below = -len(some) % ROWS
        some = torch.nn.functional.pad(some, (0, tiles * TILE - codes.shape[1], 0, below))
        # (chunk, row, tile, place / 4, lane, place % 4) -> a lane's places side by side.
        lanes = some.view(-1, ROWS, tiles, 8, 4, 4).permute(0, 2, 1, 4, 3, 5).flatten(-2)
        fields = lanes.unflatten(-1, (bits, 32 // bits)).to(torch.int32) << shift
        # No two share a bit, so their sum is their union, the sign included.
        words = fields.sum(-1, dtype=torch.int32)
        # Vectors of 16 bytes of all lanes one after another.
        words = words.unflatten(-1, (-1, vector)).permute(0, 1, 4, 2, 3, 5)
        out[first : first + step] = words.flatten(2)
    return out


def unpack_plane(words: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """The codes uint8 (out, in) that ``pack_plane`` laid out."""
    chunks, tiles, _ = words.shape
    vector = min(4, bits)
    lanes = words.view(chunks, tiles, bits // vector, ROWS, 4, vector)
    lanes = lanes.permute(0, 1, 3, 4, 2, 5).flatten(-2)
    place = torch.arange(32 // bits, device=words.device)
    shift = place // 2 * bits + place % 2 * 16
    codes = (lanes.unsqueeze(-1) >> shift) & (2**bits - 1)
    codes = codes.flatten(-2).unflatten(-1, (8, 4)).permute(0, 2, 1, 4, 3, 5)
    return codes.reshape(chunks * ROWS, tiles * TILE)[: shape[0], : shape[1]].to(torch.uint8)


def _in_chunks(part: Tensor, groups: int) -> Tensor:
    """One number a row and group, (out, groups at hand), as int32 words (chunks, groups, words), each of as
    many rows as fit."""
    part = torch.nn.functional.pad(part, (0, groups - part.shape[1], 0, -len(part) % ROWS))
    # Cloned: sizes of 1 would keep strides that no view in words can have.
    part = (
        part.unflatten(0, (-1, ROWS)).transpose(1, 2).clone(memory_format=torch.contiguous_format)
    )
    return part.view(torch.int32)


@dataclass(frozen=True)
class TritonWeight:
    """A weight as the kernels read it.

    words: int32 (chunks, tiles, words), or the weight itself in 16 bits (out, in)
    bits: int32, the plane of the upper bit of 3-bit codes
    scale, zero: int32 (chunks, groups, words) of a group; scale float32 (row blocks, tiles) in blocks
    row_scale: float32 (out,) where a row has one
    shape: (out, in); scale_dtype: of what scale holds
    """

    words: Tensor
    bits: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    row_scale: Tensor | None
    shape: torch.Size
    layout: Layout
    scale_dtype: torch.dtype
    inputs: InputScheme | None = None
    input_scale: Tensor | None = None

    @classmethod
    def pack(cls, q: QTensor, device: torch.device) -> TritonWeight:
        """Arrange once at load, on the device."""
        layout = layout_of(q)
        assert layout is not None, "supports() comes first"
        codes, scale = q.codes.to(device), q.scale.to(device)
        zero = None if q.zero is None else q.zero.to(device)
        if layout.bits == 3:
            words, bits = pack_plane(codes & 3, 2), pack_plane(codes >> 2, 1)
        else:
            words, bits = pack_plane(codes, layout.bits), None
        row_scale, kept = None, scale
        if layout.group == 0:
            row_scale = scale.float().flatten().expand(q.shape[0]).contiguous()
            groups = 1
        elif layout.group == BLOCK:
            kept, groups = scale.float().contiguous(), 0
        else:
            tiles = -(-q.shape[1] // TILE)
            inside, run = max(1, TILE // layout.group), max(1, layout.group // TILE)
            groups = -(-tiles // run) * inside
            # A group that no tile is a multiple of is taken in parts.
            repeats = max(1, q.group_size // layout.group)
            kept = _in_chunks(scale.repeat_interleave(repeats, 1), groups)
            zero = None if zero is None else zero.repeat_interleave(repeats, 1)
        return cls(
            words,
            bits,
            None if layout.group == 0 else kept,
            None if zero is None else _in_chunks(zero, groups),
            row_scale,
            q.shape,
            layout,
            kept.dtype if layout.group == BLOCK else scale.dtype,
            q.inputs,
            None if q.input_scale is None else q.input_scale.to(device, torch.float32),
        )

    @classmethod
    def dense(cls, W: Tensor) -> TritonWeight:
        """A weight that stays in 16 bits, (out, in), shared with the caller."""
        assert W.dtype in MAGIC, W.dtype
        layout = Layout(16, True, 0)
        return cls(W.contiguous(), None, None, None, None, W.shape, layout, W.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of it."""
        parts = (self.words, self.bits, self.scale, self.zero, self.row_scale)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def name(self) -> str:
        return self.layout.name(self.inputs)

    def key(self, tokens: int, dtype: torch.dtype) -> Key:
        device, _ = tuning.device_facts(self.words.device)
        layout, (N, K) = self.layout, self.shape
        kind = str(dtype).removeprefix("torch.")
        zeros, bucket = layout.zero < 0, tuning.bucket(tokens)
        return Key(device, kind, self.name, zeros, layout.group, N, K, bucket)

    def matmul(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in its dtype."""
        return self.fused(x, PLAIN)

    def fused(
        self,
        x: Tensor,
        fusion: Fusion,
        residual: Tensor | None = None,
        config: Config | None = None,
    ) -> Tensor:
        """The product with what surrounds it. config: how, instead of what the table says"""
        if config is None:
            _, processors = tuning.device_facts(self.words.device)
            tokens = x.numel() // x.shape[-1]
            config = tuning.table().config(self.key(tokens, x.dtype), processors)
            if tokens > tuning.MOST_ROWS:
                config = Config("dense")
        if x.device.type == "cpu" and x.dtype == torch.bfloat16:
            # The interpreter loads bfloat16 but does not calculate in it.
            residual = None if residual is None else residual.float()
            return self.fused(x.float(), fusion.widened(), residual, config).to(x.dtype)
        # Rows of a gate and its up row are read in chunks.
        if config.path == "dense" or (fusion.gated and self.shape[0] % (2 * ROWS)):
            product = self._dense if config.path == "dense" else self._as(config)
            return around(product, x, fusion, residual)
        flat = x.flatten(0, -2).contiguous()
        y = self._launch(flat, fusion, residual, config)
        return y.unflatten(0, x.shape[:-1])

    def _as(self, config: Config) -> Callable[[Tensor], Tensor]:
        return lambda x: self.fused(x, PLAIN, config=config)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows of the weight, (n, in), as ``dequantize`` gives them. index: int64 (n,)"""
        if self.layout.bits == 16:
            return self.words[index].to(dtype)
        assert self.layout.group != BLOCK, "blocks hold the scales of many rows"
        chunk = index // ROWS
        own = torch.arange(ROWS, device=index.device)
        beside = (chunk[:, None] * ROWS + own).clamp(max=self.shape[0] - 1).flatten()
        few = replace(
            self,
            words=self.words[chunk],
            bits=None if self.bits is None else self.bits[chunk],
            scale=None if self.scale is None else self.scale[chunk],
            zero=None if self.zero is None else self.zero[chunk],
            row_scale=None if self.row_scale is None else self.row_scale[beside],
            shape=torch.Size((ROWS * len(index), self.shape[1])),
        )
        place = torch.arange(len(index), device=index.device) * ROWS + index % ROWS
        return few.dequantize(dtype)[place]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), each product of level and scale rounded once."""
        if self.layout.bits == 16:
            return self.words.to(dtype)
        return self._unpacked(torch.empty(self.shape, dtype=dtype, device=self.words.device))

    def _dense(self, x: Tensor) -> Tensor:
        """Through torch's product, for many tokens."""
        flat = x.flatten(0, -2).contiguous()
        if self._integers and len(flat) >= INT_ROWS:
            levels, scale = self._rounded(flat, torch.int8)
            W = self._unpacked(torch.empty(self.shape, dtype=torch.int8, device=x.device))
            assert self.row_scale is not None
            y = torch._int_mm(levels, W.T) * (scale.unsqueeze(1) * self.row_scale)
            return y.to(x.dtype).unflatten(0, x.shape[:-1])
        if self.inputs is not None:
            x = self.inputs.round(x, self.input_scale)
        return linear(x, self.dequantize(x.dtype))

    @property
    def _integers(self) -> bool:
        """Whether the product of levels is one of integers."""
        return (
            self.inputs is not None
            and self.inputs.type == "int"
            and self.inputs.per != "group"
            and self.layout == Layout(8, False, 0, 128)
            and all(size % INT_STEP == 0 for size in self.shape)
        )

    def _unpacked(self, out: Tensor) -> Tensor:
        """The weight, or its levels where out is int8, into out (out, in)."""
        # Here, not above: a machine without a GPU needs no compiler for one.
        from compress.kernels.triton_linear import dequantize_kernel

        N, K = self.shape
        tiles = -(-K // TILE)
        half = out.dtype if out.dtype in MAGIC else torch.bfloat16
        dequantize_kernel[(-(-N // 32), tiles)](
            *self._pointers(out),
            out,
            MAGIC[half],
            N,
            K,
            tiles,
            R=32,
            SCALED=out.dtype != torch.int8,
            **self._constants(half, out.device),
            num_warps=4,
        )
        return out

    def _pointers(self, blank: Tensor) -> tuple[Tensor, ...]:
        """blank: stands in for what this weight has not"""
        # The interpreter does not calculate in bfloat16.
        wide = self.words.dtype == torch.bfloat16 and blank.device.type == "cpu"
        words = self.words.float() if wide else self.words
        parts = (words, self.bits, self.scale, self.zero, self.row_scale)
        return tuple(blank if part is None else part for part in parts)

    def _constants(self, half: torch.dtype, device: torch.device) -> dict[str, Any]:
        import triton.language as tl

        types = {
            torch.float16: tl.float16,
            torch.bfloat16: tl.bfloat16,
            torch.float32: tl.float32,
        }
        # The interpreter calculates in float16 and float32 only.
        calculates = device.type != "cpu" or half == torch.float16
        return {
            "BITS": self.layout.bits,
            "FLOAT": self.layout.float,
            "GROUP": self.layout.group,
            "ZERO": self.layout.zero,
            "SCALE": types[self.scale_dtype],
            "HALF": types[half],
            "DTYPE": types[half] if calculates else tl.float32,
        }

    def _rounded(
        self, x: Tensor, dtype: torch.dtype, norm: Tensor | None = None, eps: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """x (tokens, in) behind its norm and its rounding, in dtype, and the scales of its levels: float32
        (tokens,) or (tiles, tokens)."""
        import triton.language as tl

        from compress.kernels.triton_linear import prepare_kernel

        M, K = x.shape
        per = None if self.inputs is None else self.inputs.per
        groups = -(-K // TILE) if per == "group" else 1
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        scale = torch.empty(groups * M, dtype=torch.float32, device=x.device)
        types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
        prepare_kernel[(M,)](
            x,
            x if norm is None else norm,
            scale if self.input_scale is None else self.input_scale,
            y,
            scale,
            eps,
            M,
            K,
            BLOCK=max(TILE, 1 << (K - 1).bit_length()),
            NORM=norm is not None,
            ROUND={None: 0, "token": 1, "tensor": 2, "group": 3}[per],
            FLOAT=self.inputs is not None and self.inputs.type == "float",
            DTYPE=types.get(x.dtype, tl.float32),
            LEAST=torch.finfo(torch.float32).tiny,
            num_warps=8,
        )
        return y, scale

    def _launch(self, x: Tensor, fusion: Fusion, residual: Tensor | None, config: Config) -> Tensor:
        from compress.kernels.triton_linear import linear_kernel, reduce_kernel

        (M, K), (N, _) = x.shape, self.shape
        norm, scale = fusion.norm, x
        wide = config.path == "wide"
        if self.inputs is not None or (norm is not None and (wide or len(x) > tuning.NORM_ROWS)):
            x, scale = self._rounded(x, x.dtype, norm, fusion.eps)
            norm = None
        half = x.dtype if x.dtype in MAGIC else torch.bfloat16
        tiles, split = -(-K // TILE), config.split
        slices = 1 if wide else config.slices
        steps = -(-tiles // slices)
        split = min(split, steps)
        width = N // 2 if fusion.gated else N
        y = torch.empty(M, width, dtype=x.dtype, device=x.device)
        sums, squares = y, y
        if split > 1:
            sums = torch.empty(split, M, N, dtype=torch.float32, device=x.device)
            squares = torch.empty(split, M, dtype=torch.float32, device=x.device)
        residual = None if residual is None else residual.reshape(M, width).contiguous()
        after = {
            "NORM": norm is not None,
            "BIAS": fusion.bias is not None,
            "GATED": fusion.gated,
            "RESIDUAL": residual is not None,
            "SPLIT": split,
        }
        bias = y if fusion.bias is None else fusion.bias
        block = 16 if wide else 8
        block = max(block, min(tuning.MOST_TOKENS, 1 << (M - 1).bit_length()))
        linear_kernel[(-(-N // config.rows), split, -(-M // block))](
            x,
            x if norm is None else norm,
            scale,
            *self._pointers(x),
            bias,
            y if residual is None else residual,
            sums,
            squares,
            MAGIC[half],
            fusion.eps,
            -(-steps // split) * slices,
            M,
            N,
            K,
            tiles,
            S=slices,
            R=config.rows,
            B=block,
            STAGES=config.stages,
            X_SCALE=0 if self.inputs is None else 2 if self.inputs.per == "group" else 1,
            ONE=M == 1 and not wide,
            WIDE=wide,
            **after,
            **self._constants(half, x.device),
            num_warps=4 if wide else slices,
        )
        if split > 1:
            reduce_kernel[(-(-width // REDUCE), M)](
                sums,
                squares,
                bias,
                y if residual is None else residual,
                y,
                fusion.eps,
                M,
                N,
                K,
                BLOCK=REDUCE,
                **after,
            )
        return y


def copies(weight: TritonWeight, many: int) -> list[TritonWeight]:
    """The weight and others like it, each in memory of its own."""
    return [weight] + [
        replace(
            weight,
            words=weight.words.clone(),
            bits=None if weight.bits is None else weight.bits.clone(),
            scale=None if weight.scale is None else weight.scale.clone(),
        )
        for _ in range(many - 1)
    ]


def copies_beyond_cache(nbytes: int, device: torch.device) -> int:
    """How many weights of so many bytes pass through the cache four times before the first comes again."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return 1 + -(-4 * cache // nbytes)


def tune(
    weight: TritonWeight, tokens: int, dtype: torch.dtype, into: tuning.Table | None = None
) -> dict[Config, float]:
    """Find the fastest configuration for such a weight and so many tokens, and keep it (``tuning.tune``).
    Takes a second or so for each candidate, most of it to compile. Returns microseconds."""
    device = weight.words.device
    x = torch.randn(tokens, weight.shape[1], dtype=dtype, device=device)
    weights = copies(weight, copies_beyond_cache(weight.nbytes, device))

    def runs(config: Config) -> list[Callable[[], Tensor]]:
        return [lambda w=w: w.fused(x, PLAIN, config=config) for w in weights]  # type: ignore[misc]

    _, processors = tuning.device_facts(device)
    table = tuning.table() if into is None else into
    return tuning.tune(weight.key(tokens, dtype), runs, table, processors)
