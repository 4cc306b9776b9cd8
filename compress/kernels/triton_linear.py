"""The Triton kernels of compress.kernels.packed_linear, which says what they compute and how weights lie.

S slices of a step; R rows of the weight a program takes; B tokens. A tile is TILE columns, a chunk 8 rows.
"""

import triton
import triton.language as tl

TILE = tl.constexpr(128)
# 1.5 * 2**23: a float32 below 2**22 that it is added to and taken from is rounded, ties to even.
ROUNDER = tl.constexpr(12582912.0)
# 0x80008000 as a signed number.
SIGNS = tl.constexpr(0x80008000 - 2**32)


@triton.jit
def _words(ptr, chunk, tile, tiles, S: tl.constexpr, R: tl.constexpr, BITS: tl.constexpr):
    """One tile a slice, int32 (S, R, 4 lanes, BITS words). A chunk of a tile is a linear run, which threads
    read 16 bytes at a time whatever the bits."""
    VECTOR: tl.constexpr = BITS if BITS < 4 else 4
    start = (chunk[None, :] * tiles + tile[:, None]) * (32 * BITS)
    words = tl.load(ptr + start[:, :, None] + tl.arange(0, 32 * BITS)[None, None, :])
    words = tl.reshape(words, (S, R // 8, BITS // VECTOR, 8, 4, VECTOR))
    return tl.reshape(tl.permute(words, (0, 1, 3, 4, 2, 5)), (S, R, 4, BITS))


@triton.jit
def _fields(w, BITS: tl.constexpr):
    """Words shifted by each multiple of BITS below 16, in their order along new dimensions."""
    if BITS == 8:
        return tl.join(w, w >> 8)
    else:
        fourth = tl.join(tl.join(w, w >> 8), tl.join(w >> 4, w >> 12))
        if BITS == 4:
            return fourth
        else:
            return tl.join(fourth, fourth >> 2)


@triton.jit
def _bits(w):
    """Words shifted so that each of their 16 pairs of bits comes to lie at bit 2."""
    even = tl.join(
        tl.join(tl.join(w << 2, w >> 6), tl.join(w >> 2, w >> 10)),
        tl.join(tl.join(w, w >> 8), tl.join(w >> 4, w >> 12)),
    )
    odd = tl.join(
        tl.join(tl.join(w << 1, w >> 7), tl.join(w >> 3, w >> 11)),
        tl.join(tl.join(w >> 1, w >> 9), tl.join(w >> 5, w >> 13)),
    )
    return tl.join(even, odd)


@triton.jit
def _halves(pairs, HALF: tl.constexpr, DTYPE: tl.constexpr):
    """Words of two 16-bit floats as these, in one dimension more. DTYPE is HALF, or float32: the interpreter
    does not calculate in bfloat16."""
    if HALF == tl.bfloat16 and tl.float32 == DTYPE:
        low = (pairs << 16).to(tl.float32, bitcast=True)
        high = (pairs & -65536).to(tl.float32, bitcast=True)
        return tl.join(low, high)
    else:
        low = pairs.to(tl.int16).to(HALF, bitcast=True)
        high = (pairs >> 16).to(tl.int16).to(HALF, bitcast=True)
        return tl.join(low, high).to(DTYPE)


@triton.jit
def _columns(x, S: tl.constexpr, R: tl.constexpr):
    """(S, R, lanes, ...) in the order of a lane's bits -> (S, R, TILE) in the order of the columns. Nothing
    moves: a lane has read what the matrix unit wants from it."""
    x = tl.permute(tl.reshape(x, (S, R, 4, 8, 4)), (0, 1, 3, 2, 4))
    return tl.reshape(x, (S, R, 128))


@triton.jit
def _codes(w_ptr, bits_ptr, chunk, tile, tiles, magic, N, K, S: tl.constexpr, R: tl.constexpr,
           BITS: tl.constexpr, FLOAT: tl.constexpr, WIDE: tl.constexpr, HALF: tl.constexpr,
           DTYPE: tl.constexpr):  # fmt: skip
    """One tile a slice, DTYPE (S, R, TILE): floats; or integers plus BASE, which ``_levels`` takes off.
    Weights in 16 bits lie as they are, row after row.

    Codes become floats in the mantissa of 128 (bfloat16) or 1024 (float16), two in one operation and without
    the slow conversion. ``magic`` is that number twice.
    """
    if BITS == 16:
        rows = tl.reshape(chunk[:, None] * 8 + tl.arange(0, 8)[None, :], (R,))
        start = tl.minimum(rows, N - 1).to(tl.int64) * K
        k = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
        at = w_ptr + start[None, :, None] + k[:, None, :]
        return tl.load(at, mask=(k < K)[:, None, :], other=0.0)
    else:
        PLANE: tl.constexpr = 2 if BITS == 3 else BITS
        words = _words(w_ptr, chunk, tile, tiles, S, R, PLANE)
        # Written in one of two ways, whichever the compiler makes less of: without moving anything between
        # threads, and without an operation for each constant.
        MAGIC: tl.constexpr = 0x64006400 if HALF == tl.float16 else 0x43004300
        if WIDE or FLOAT or BITS == 3:
            w = _fields(words, PLANE)
            one = MAGIC
        else:
            w = (
                words[:, :, :, :, None]
                >> (tl.arange(0, 16 // BITS) * BITS)[None, None, None, None, :]
            )
            one = magic
        if BITS == 3:
            # The lower two bits are one plane, the upper one another.
            lower = tl.reshape((w & 0x00030003) | one, (S, R, 4, 16))
            upper = _bits(_words(bits_ptr, chunk, tile, tiles, S, R, 1))
            upper = tl.reshape(upper & 0x00040004, (S, R, 4, 16))
            found = _halves(upper | lower, HALF, DTYPE)
        elif FLOAT:
            # e4m3 in the upper bits of a wider float is off by a power of two, subnormal numbers included.
            if HALF == tl.float16:
                found = _halves(((w << 8) & SIGNS) | ((w << 7) & 0x3F803F80), HALF, DTYPE)
                found = found * tl.full((1,), 2.0**8, DTYPE)
            else:
                found = _halves(((w << 8) & SIGNS) | ((w << 4) & 0x07F007F0), HALF, DTYPE)
                found = found * tl.full((1,), 2.0**120, DTYPE)
        elif BITS == 8 and HALF == tl.bfloat16:
            # 128 has no room for 8 bits: the upper and the lower 4 of them, 128 less; each step is exact.
            upper = _halves(((w >> 4) & 0x000F000F) | one, HALF, DTYPE)
            lower = _halves((w & 0x000F000F) | one, HALF, DTYPE)
            upper = (upper - tl.full((1,), 136.0, DTYPE)) * tl.full((1,), 16.0, DTYPE)
            found = upper + (lower - tl.full((1,), 128.0, DTYPE))
        else:
            MASK: tl.constexpr = ((1 << BITS) - 1) * 0x00010001
            found = _halves((w & MASK) | one, HALF, DTYPE)
        return _columns(found, S, R)


@triton.jit
def _levels(codes, BITS: tl.constexpr, FLOAT: tl.constexpr, ZERO: tl.constexpr, HALF: tl.constexpr,
            DTYPE: tl.constexpr):  # fmt: skip
    """Codes less BASE and ZERO: the zero point of all, or the middle of those there are."""
    if BITS == 16 or FLOAT:
        return codes
    else:
        WIDE: tl.constexpr = 1024 if HALF == tl.float16 else 128
        BASE: tl.constexpr = -128 if BITS == 8 and HALF == tl.bfloat16 else WIDE
        return codes - tl.full((1,), ZERO + BASE, DTYPE)


@triton.jit
def _zeros(zero_ptr, chunk, group, groups, S: tl.constexpr, R: tl.constexpr, ZERO: tl.constexpr):
    """Zero points less ZERO, float32 (S, R). 4 share a word."""
    start = (chunk[None, :] * groups + group[:, None]) * 2
    words = tl.load(zero_ptr + start[:, :, None] + tl.arange(0, 2)[None, None, :])
    zero = (words[:, :, :, None] >> (tl.arange(0, 4) * 8)[None, None, None, :]) & 255
    return tl.reshape(zero - ZERO, (S, R)).to(tl.float32)


@triton.jit
def _scales(scale_ptr, chunk, group, groups, S: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr,
            SCALE: tl.constexpr):  # fmt: skip
    """Scales float32 (S, R) of a group a slice. In words, so that they are fetched ahead as weights are."""
    if GROUP < 0:
        # Blocks of 128 rows and columns.
        scale = tl.load(scale_ptr + (chunk // 16)[None, :] * groups + group[:, None])
        return tl.reshape(tl.broadcast_to(scale[:, :, None], (S, R // 8, 8)), (S, R))
    else:
        WORDS: tl.constexpr = 8 if SCALE == tl.float32 else 4
        start = (chunk[None, :] * groups + group[:, None]) * WORDS
        words = tl.load(scale_ptr + start[:, :, None] + tl.arange(0, WORDS)[None, None, :])
        if SCALE == tl.float32:
            return tl.reshape(words, (S, R)).to(tl.float32, bitcast=True)
        else:
            return tl.reshape(_halves(words, SCALE, tl.float32), (S, R))


@triton.jit
def _tokens(x_ptr, norm_ptr, tokens, squares, slice_tile, last, M, K, part: tl.constexpr, PARTS: tl.constexpr,
            S: tl.constexpr, B: tl.constexpr, ONE: tl.constexpr, NORM: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """x of one tile a slice, (S, TILE, B), times the gain where there is a norm, and its squares added up.
    Zeros in place of all groups of the tile but ``part``: cheaper than taking the weights apart."""
    place = tl.arange(0, 128)[None, :]
    k = slice_tile[:, None] * 128 + place
    # What is beyond the end multiplies zeros.
    inside = k < tl.minimum(last * 128, K)
    if PARTS > 1:
        inside = inside & (place // (128 // PARTS) == part)
    if ONE:
        x = tl.load(x_ptr + k, mask=inside, other=0.0)
    else:
        at = x_ptr + tokens[None, None, :] * K + k[:, :, None]
        x = tl.load(at, mask=inside[:, :, None] & (tokens < M)[None, None, :], other=0.0)
    if NORM:
        wide = x.to(tl.float32)
        squares += wide * wide
        gain = tl.load(norm_ptr + k, mask=inside, other=0.0).to(tl.float32)
        if ONE:
            x = (wide * gain).to(DTYPE)
        else:
            x = (wide * gain[:, :, None]).to(DTYPE)
    if ONE:
        # All columns of the product are the same: the matrix unit takes no fewer.
        x = tl.broadcast_to(x[:, :, None], (S, 128, B))
    return x, squares


@triton.jit
def _dot(levels, x, acc, S: tl.constexpr, R: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        return tl.dot(tl.reshape(levels, (R, 128)), tl.reshape(x, (128, B)), acc)
    else:
        return tl.dot(levels, x, acc)


@triton.jit
def _spread(each, S: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr):
    """One a slice and row, for the sums of all tokens."""
    if WIDE:
        return tl.reshape(each, (R, 1))
    else:
        return each[:, :, None]


@triton.jit(do_not_specialize=["magic", "eps", "per"])
def linear_kernel(x_ptr, norm_ptr, x_scale_ptr, w_ptr, bits_ptr, scale_ptr, zero_ptr, row_scale_ptr,
                  bias_ptr, residual_ptr, y_ptr, squares_ptr, magic, eps, per, M, N, K, tiles,
                  S: tl.constexpr, R: tl.constexpr, B: tl.constexpr, STAGES: tl.constexpr,
                  BITS: tl.constexpr, FLOAT: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
                  SCALE: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr, NORM: tl.constexpr,
                  X_SCALE: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
                  RESIDUAL: tl.constexpr, SPLIT: tl.constexpr, ONE: tl.constexpr,
                  WIDE: tl.constexpr):  # fmt: skip
    """Grid (programs over the rows, splits of K, blocks of B tokens). y (M, N), or (M, N / 2) where it is gated; with SPLIT > 1
    float32 (SPLIT, M, N) sums, which ``reduce_kernel`` makes y of, and squares (SPLIT, M).

    GROUP: columns of a scale, 0 a row's own in row_scale, -1 blocks. ZERO: -1 where there are zero points, or
    the one of all. X_SCALE: 1 one a token, 2 one a token and tile. ONE: a single token. WIDE: all warps
    share one product (S is 1), of the large matrix unit where there is one; else each slice is a warp's, and
    their sums are added at the end.
    """
    # A gate's chunk is followed by that of its up row, which a thread then holds beside it.
    order = tl.arange(0, R // 8)
    if GATED:
        chunk = tl.program_id(0) * (R // 16) + order // 2 + (order % 2) * (N // 16)
    else:
        chunk = tl.program_id(0) * (R // 8) + order
    rows = tl.reshape(chunk[:, None] * 8 + tl.arange(0, 8)[None, :], (R,))
    chunk = tl.minimum(chunk, (N + 7) // 8 - 1)
    step0 = tl.program_id(1) * per
    last = tl.minimum(step0 + per, tiles)
    tokens = tl.program_id(2) * B + tl.arange(0, B)
    PARTS: tl.constexpr = 1 if GROUP <= 0 or GROUP >= 128 else 128 // GROUP
    RUN: tl.constexpr = GROUP // 128 if GROUP > 128 else 1
    groups = 1 if GROUP == 0 else (tiles + RUN - 1) // RUN * PARTS
    if WIDE:
        acc = tl.zeros((R, B), tl.float32)
    else:
        acc = tl.zeros((S, R, B), tl.float32)
    # What zero points take off again, times the sums of x, which the matrix unit adds up as well.
    off = acc
    ones = tl.full((S, R, 128), 1.0, DTYPE)
    if ONE:
        squares = tl.zeros((S, 128), tl.float32)
    else:
        squares = tl.zeros((S, 128, B), tl.float32)
    MIDDLE: tl.constexpr = 1 << (BITS - 1) if ZERO < 0 else ZERO
    for step in tl.range(step0, last, S, num_stages=STAGES):
        slice_tile = step + tl.arange(0, S)
        tile = tl.minimum(slice_tile, tiles - 1)
        codes = _codes(
            w_ptr, bits_ptr, chunk, tile, tiles, magic, N, K, S, R, BITS, FLOAT, WIDE, HALF, DTYPE
        )
        levels = _levels(codes, BITS, FLOAT, MIDDLE, HALF, DTYPE)
        if X_SCALE == 2:
            at = x_scale_ptr + tile[:, None] * M + tokens[None, :]
            x_scale = tl.load(at, mask=(tokens < M)[None, :], other=0.0)
        for part in tl.static_range(PARTS):
            x, squares = _tokens(
                x_ptr,
                norm_ptr,
                tokens,
                squares,
                slice_tile,
                last,
                M,
                K,
                part,
                PARTS,
                S,
                B,
                ONE,
                NORM,
                DTYPE,
            )
            group = tile // RUN * PARTS + part
            if GROUP == 0 and X_SCALE != 2:
                acc = _dot(levels, x, acc, S, R, B, WIDE)
                if ZERO < 0:
                    off = _dot(ones, x, off, S, R, B, WIDE)
            else:
                product = _dot(levels, x, tl.zeros_like(acc), S, R, B, WIDE)
                if ZERO < 0:
                    sums = _dot(ones, x, tl.zeros_like(acc), S, R, B, WIDE)
                    zero = _zeros(zero_ptr, chunk, group, groups, S, R, MIDDLE)
                    product -= _spread(zero, S, R, WIDE) * sums
                if GROUP != 0:
                    scale = _scales(scale_ptr, chunk, group, groups, S, R, GROUP, SCALE)
                    product *= _spread(scale, S, R, WIDE)
                if X_SCALE == 2:
                    if WIDE:
                        product *= tl.reshape(x_scale, (1, B))
                    else:
                        product *= x_scale[:, None, :]
                acc += product
    if ZERO < 0 and GROUP == 0:
        zero = _zeros(zero_ptr, chunk, tl.zeros((1,), tl.int32), 1, 1, R, MIDDLE)
        acc -= _spread(zero, 1, R, WIDE) * off
    real = tokens < M
    if WIDE:
        y = acc
    else:
        y = tl.sum(acc, 0)
    if GROUP == 0 and BITS < 16:
        y *= tl.load(row_scale_ptr + rows, mask=rows < N, other=0.0)[:, None]
    if X_SCALE == 1:
        y *= tl.load(x_scale_ptr + tokens, mask=real, other=0.0)[None, :]
    if NORM:
        if ONE:
            total = tl.sum(tl.sum(squares, 1), 0) + tl.zeros((B,), tl.float32)
        else:
            total = tl.sum(tl.sum(squares, 1), 0)
    if SPLIT > 1:
        split = tl.program_id(1)
        at = (split * M + tokens)[None, :] * N + rows[:, None]
        tl.store(y_ptr + at, y, mask=(rows < N)[:, None] & real[None, :])
        if NORM:
            first = tl.program_id(0) + tokens * 0 == 0
            tl.store(squares_ptr + split * M + tokens, total, mask=real & first)
    else:
        if NORM:
            y *= tl.rsqrt(total / K + eps)[None, :]
        if BIAS:
            y += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
        if GATED:
            pair = tl.permute(tl.reshape(y, (R // 16, 2, 8, B)), (0, 2, 3, 1))
            gate, up = tl.split(tl.reshape(pair, (R // 2, B, 2)))
            y = gate * tl.sigmoid(gate) * up
            outs = tl.program_id(0) * (R // 2) + tl.arange(0, R // 2)
            width = N // 2
        else:
            outs = tl.program_id(0) * R + tl.arange(0, R)
            width = N
        at = tokens[None, :] * width + outs[:, None]
        mask = (outs < width)[:, None] & real[None, :]
        if RESIDUAL:
            y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _summed(sums_ptr, m, outs, inside, M, N, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    y = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT):
        y += tl.load(sums_ptr + (split * M + m) * N + outs, mask=inside, other=0.0)
    return y


@triton.jit(do_not_specialize=["eps"])
def reduce_kernel(sums_ptr, squares_ptr, bias_ptr, residual_ptr, y_ptr, eps, M, N, K,
                  SPLIT: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
                  GATED: tl.constexpr, RESIDUAL: tl.constexpr):  # fmt: skip
    """The sums of ``linear_kernel`` added in their order, and what comes after. Grid (outputs, tokens)."""
    outs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1)
    width = N // 2 if GATED else N
    inside = outs < width
    y = _summed(sums_ptr, m, outs, inside, M, N, SPLIT, BLOCK)
    root = 1.0
    if NORM:
        total = 0.0
        for split in tl.static_range(SPLIT):
            total += tl.load(squares_ptr + split * M + m)
        root = tl.rsqrt(total / K + eps)
        y *= root
    if BIAS:
        y += tl.load(bias_ptr + outs, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = _summed(sums_ptr, m, outs + width, inside, M, N, SPLIT, BLOCK) * root
        if BIAS:
            up += tl.load(bias_ptr + width + outs, mask=inside, other=0.0).to(tl.float32)
        y = y * tl.sigmoid(y) * up
    at = m * width + outs
    if RESIDUAL:
        y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _parts(each, R: tl.constexpr, PARTS: tl.constexpr):
    """One a group of the tile and row, (PARTS, R), for every column of the tile: (1, R, TILE)."""
    each = tl.broadcast_to(tl.permute(each, (1, 0))[:, :, None], (R, PARTS, 128 // PARTS))
    return tl.reshape(each, (1, R, 128))


@triton.jit(do_not_specialize=["magic"])
def dequantize_kernel(w_ptr, bits_ptr, scale_ptr, zero_ptr, row_scale_ptr, out_ptr, magic, N, K, tiles,
                      R: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr, GROUP: tl.constexpr,
                      ZERO: tl.constexpr, SCALE: tl.constexpr, HALF: tl.constexpr,
                      DTYPE: tl.constexpr, SCALED: tl.constexpr):  # fmt: skip
    """The weight (N, K), rounded once; not SCALED: its levels. Grid (programs over the rows, tiles)."""
    chunk = tl.program_id(0) * (R // 8) + tl.arange(0, R // 8)
    rows = tl.program_id(0) * R + tl.arange(0, R)
    chunk = tl.minimum(chunk, (N + 7) // 8 - 1)
    tile = tl.program_id(1) + tl.zeros((1,), tl.int32)
    codes = _codes(
        w_ptr, bits_ptr, chunk, tile, tiles, magic, N, K, 1, R, BITS, FLOAT, True, HALF, DTYPE
    )
    PARTS: tl.constexpr = 1 if GROUP <= 0 or GROUP >= 128 else 128 // GROUP
    RUN: tl.constexpr = GROUP // 128 if GROUP > 128 else 1
    groups = 1 if GROUP == 0 else (tiles + RUN - 1) // RUN * PARTS
    MIDDLE: tl.constexpr = 1 << (BITS - 1) if ZERO < 0 else ZERO
    w = _levels(codes, BITS, FLOAT, MIDDLE, HALF, DTYPE).to(tl.float32)
    parts = tl.program_id(1) // RUN * PARTS + tl.arange(0, PARTS)
    if ZERO < 0:
        parts_or_none = parts * 0 if GROUP == 0 else parts
        w -= _parts(_zeros(zero_ptr, chunk, parts_or_none, groups, PARTS, R, MIDDLE), R, PARTS)
    if SCALED and GROUP != 0:
        w *= _parts(_scales(scale_ptr, chunk, parts, groups, PARTS, R, GROUP, SCALE), R, PARTS)
    elif SCALED:
        w *= tl.load(row_scale_ptr + rows, mask=rows < N, other=0.0)[None, :, None]
    w = tl.reshape(w, (R, 128))
    k = tl.program_id(1) * 128 + tl.arange(0, 128)
    at = rows.to(tl.int64)[:, None] * K + k[None, :]
    mask = (rows < N)[:, None] & (k < K)[None, :]
    tl.store(out_ptr + at, w.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _nearest(x, FLOAT: tl.constexpr):
    """x float32 at its nearest level, ties to even: integers, or e4m3."""
    if FLOAT:
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
        # A step is 2^-3 of the power of two below; below 2^-6, where numbers are subnormal, that of 2^-6.
        exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 121)
        step = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
        # One over it, exactly.
        steps = ((257 - exponent) << 23).to(tl.float32, bitcast=True)
        return ((x * steps + ROUNDER) - ROUNDER) * step
    else:
        x = (x + ROUNDER) - ROUNDER
        return tl.minimum(tl.maximum(x, -127.0), 127.0)


@triton.jit(do_not_specialize=["eps"])
def prepare_kernel(x_ptr, norm_ptr, fixed_ptr, y_ptr, x_scale_ptr, eps, M, K, BLOCK: tl.constexpr,
                   NORM: tl.constexpr, ROUND: tl.constexpr, FLOAT: tl.constexpr, DTYPE: tl.constexpr,
                   LEAST: tl.constexpr):  # fmt: skip
    """The RMSNorm of a token, rounded as ``InputScheme`` does. y (M, K): levels where it is rounded; scales
    float32 (M,), or (tiles, M). ROUND: 0 not at all, 1 a token, 2 fixed, 3 groups. Grid (tokens,)."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < K
    x = tl.load(x_ptr + m * K + k, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        root = tl.rsqrt(tl.sum(x * x, 0) / K + eps)
        gain = tl.load(norm_ptr + k, mask=inside, other=0.0)
        x = ((x * root).to(DTYPE) * gain.to(DTYPE)).to(tl.float32)
    if ROUND == 1:
        LARGEST: tl.constexpr = 448.0 if FLOAT else 127.0
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 0), LARGEST), LEAST)
        x = _nearest(tl.div_rn(x, scale), FLOAT)
        tl.store(x_scale_ptr + m, scale)
    if ROUND == 2:
        scale = tl.load(fixed_ptr)
        x = _nearest(tl.div_rn(x, scale), FLOAT)
        tl.store(x_scale_ptr + m, scale)
    if ROUND == 3:
        LARGEST3: tl.constexpr = 448.0 if FLOAT else 127.0
        groups = tl.reshape(x, (BLOCK // 128, 128))
        scales = tl.maximum(tl.div_rn(tl.max(tl.abs(groups), 1), LARGEST3), LEAST)
        groups = _nearest(tl.div_rn(groups, scales[:, None]), FLOAT)
        x = tl.reshape(groups, (BLOCK,))
        tile = tl.arange(0, BLOCK // 128)
        tl.store(x_scale_ptr + tile * M + m, scales, mask=tile * 128 < K)
    tl.store(y_ptr + m * K + k, x.to(y_ptr.dtype.element_ty), mask=inside)
