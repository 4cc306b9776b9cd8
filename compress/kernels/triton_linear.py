"""The Triton kernels of compress.kernels.packed_linear, which says what they compute and how weights lie.

S slices of a step; R rows of the weight a program takes; B tokens. A tile is TILE columns, a chunk 8 rows.
"""

import triton
import triton.language as tl

TILE = tl.constexpr(128)
# 1.5 * 2**23: a float32 below 2**22 that it is added to and taken from is rounded, ties to even.
ROUNDER = tl.constexpr(12582912.0)


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
def _halves(pairs, HALF: tl.constexpr, DTYPE: tl.constexpr):
    """Words of two 16-bit floats as these, in one dimension more. DTYPE is HALF but for the interpreter,
    which does not calculate in bfloat16."""
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
           BITS: tl.constexpr, FLOAT: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """One tile a slice, DTYPE (S, R, TILE): floats; or integers plus BASE, which ``_levels`` takes off.
    Weights in 16 bits lie as they are, row after row.

    Codes become floats in the mantissa of 128 (bfloat16) or 1024 (float16), two in one operation and without
    the slow conversion. ``magic`` is that number twice: as a constant it would cost an operation more.
    """
    if BITS == 3:
        # Bits 1 and 2 are one plane, bit 0 the other. The shifts are known when this is compiled.
        field = tl.arange(0, 8)[None, None, None, None, :]
        w = _words(w_ptr, chunk, tile, tiles, S, R, 2)[:, :, :, :, None]
        upper = tl.where(field == 0, w << 1, w >> tl.maximum(2 * field - 1, 0)) & 0x00060006
        upper = tl.reshape(upper, (S, R, 4, 16))
        w = _words(bits_ptr, chunk, tile, tiles, S, R, 1)
        lower = (w >> tl.arange(0, 16)[None, None, None, :]) & 0x00010001
        return _columns(_halves((upper | magic) | lower, HALF, DTYPE), S, R)
    if BITS == 16:
        rows = tl.reshape(chunk[:, None] * 8 + tl.arange(0, 8)[None, :], (R,))
        start = tl.minimum(rows, N - 1).to(tl.int64) * K
        k = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
        at = w_ptr + start[None, :, None] + k[:, None, :]
        return tl.load(at, mask=(k < K)[:, None, :], other=0.0)
    words = _words(w_ptr, chunk, tile, tiles, S, R, BITS)
    w = words[:, :, :, :, None] >> (tl.arange(0, 16 // BITS) * BITS)[None, None, None, None, :]
    if FLOAT:
        # e4m3 in the upper bits of a wider float is off by a power of two, subnormal numbers included.
        sign = (w << 8) & 0x80008000
        if HALF == tl.float16:
            found = _halves(sign | ((w << 7) & 0x3F803F80), HALF, DTYPE)
            return _columns(found * tl.full((1,), 2.0**8, DTYPE), S, R)
        found = _halves(sign | ((w << 4) & 0x07F007F0), HALF, DTYPE)
        return _columns(found * tl.full((1,), 2.0**120, DTYPE), S, R)
    if BITS == 8 and HALF == tl.bfloat16:
        # 128 has no room for 8 bits: the upper and the lower 4 of them, 128 less; each step is exact.
        upper = _halves(((w >> 4) & 0x000F000F) | magic, HALF, DTYPE)
        lower = _halves((w & 0x000F000F) | magic, HALF, DTYPE)
        upper = (upper - tl.full((1,), 136.0, DTYPE)) * tl.full((1,), 16.0, DTYPE)
        return _columns(upper + (lower - tl.full((1,), 128.0, DTYPE)), S, R)
    MASK: tl.constexpr = ((1 << BITS) - 1) * 0x00010001
    return _columns(_halves((w & MASK) | magic, HALF, DTYPE), S, R)


@triton.jit
def _zeros(zero_ptr, chunk, group, groups, S: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr):
    """Zero points DTYPE (S, R), from 4 in a word."""
    start = (chunk[None, :] * groups + group[:, None]) * 2
    words = tl.load(zero_ptr + start[:, :, None] + tl.arange(0, 2)[None, None, :])
    zero = (words[:, :, :, None] >> (tl.arange(0, 4) * 8)[None, None, None, :]) & 255
    return tl.reshape(zero, (S, R)).to(tl.float32).to(DTYPE)


@triton.jit
def _levels(codes, zero, ZERO: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr,
            HALF: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Codes (S, R, columns) less BASE and zero point: zero (S, R), or ZERO where there is none."""
    if BITS == 16 or FLOAT:
        return codes
    WIDE: tl.constexpr = 1024 if HALF == tl.float16 else 128
    BASE: tl.constexpr = -128 if BITS == 8 and HALF == tl.bfloat16 else WIDE
    if ZERO < 0:
        return codes - (zero + tl.full((1,), BASE, DTYPE))[:, :, None]
    if ZERO + BASE == 0:
        return codes
    return codes - tl.full((1,), ZERO + BASE, DTYPE)


@triton.jit
def _scales(scale_ptr, chunk, group, groups, S: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr,
            SCALE: tl.constexpr):  # fmt: skip
    """Scales float32 (S, R) of a group a slice. In words, so that they are fetched ahead as weights are."""
    if GROUP < 0:
        # Blocks of 128 rows and columns.
        scale = tl.load(scale_ptr + (chunk // 16)[None, :] * groups + group[:, None])
        return tl.reshape(tl.broadcast_to(scale[:, :, None], (S, R // 8, 8)), (S, R))
    WORDS: tl.constexpr = 8 if SCALE == tl.float32 else 4
    start = (chunk[None, :] * groups + group[:, None]) * WORDS
    words = tl.load(scale_ptr + start[:, :, None] + tl.arange(0, WORDS)[None, None, :])
    if SCALE == tl.float32:
        return tl.reshape(words, (S, R)).to(tl.float32, bitcast=True)
    return tl.reshape(_halves(words, SCALE, tl.float32), (S, R))


@triton.jit
def _add(acc, squares, codes, row_zero, part: tl.constexpr, step, last, chunk, x_ptr, norm_ptr,
         x_scale_ptr, scale_ptr, zero_ptr, tiles, M, K, B: tl.constexpr, S: tl.constexpr,
         R: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr, GROUP: tl.constexpr,
         ZERO: tl.constexpr, SCALE: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
         ONE: tl.constexpr, NORM: tl.constexpr, X_SCALE: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """The product of one group of columns a slice, added; and the squares of x where they are wanted.

    codes: (S, R, columns), ``part`` counts groups within the tile; step: the first of S tiles, before last
    """
    COLUMNS: tl.constexpr = codes.shape[2]
    slice_tile = step + tl.arange(0, S)
    tile = tl.minimum(slice_tile, tiles - 1)
    k = slice_tile[:, None] * 128 + part * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    # What is beyond the end multiplies zeros.
    inside = k < tl.minimum(last * 128, K)
    tokens = tl.arange(0, B)
    if ONE:
        x = tl.load(x_ptr + k, mask=inside, other=0.0)
        if NORM:
            wide = x.to(tl.float32)
            squares += wide * wide
            gain = tl.load(norm_ptr + k, mask=inside, other=0.0).to(tl.float32)
            x = (wide * gain).to(DTYPE)
        # Every column of the product is the same: the matrix unit takes no fewer.
        x = tl.broadcast_to(x[:, :, None], (S, COLUMNS, B))
    else:
        at = x_ptr + tokens[None, None, :] * K + k[:, :, None]
        x = tl.load(at, mask=inside[:, :, None] & (tokens < M)[None, None, :], other=0.0)
        if NORM:
            wide = x.to(tl.float32)
            squares += wide * wide
            gain = tl.load(norm_ptr + k, mask=inside, other=0.0).to(tl.float32)
            x = (wide * gain[:, :, None]).to(DTYPE)
    GROUPS: tl.constexpr = 1 if GROUP <= 0 or GROUP >= 128 else 128 // GROUP
    RUN: tl.constexpr = GROUP // 128 if GROUP > 128 else 1
    group = tile // RUN * GROUPS + part
    groups = (tiles + RUN - 1) // RUN * GROUPS
    zero = row_zero
    if ZERO < 0 and GROUP != 0:
        zero = _zeros(zero_ptr, chunk, group, groups, S, R, DTYPE)
    levels = _levels(codes, zero, ZERO, BITS, FLOAT, HALF, DTYPE)
    if WIDE:
        product = tl.dot(tl.trans(tl.reshape(x, (COLUMNS, B))), tl.trans(tl.reshape(levels, (R, COLUMNS))))  # fmt: skip
        factor = tl.full((1, 1), 1.0, tl.float32)
        if GROUP != 0:
            factor = tl.reshape(_scales(scale_ptr, chunk, group, groups, S, R, GROUP, SCALE), (1, R))
        if X_SCALE == 2:
            x_scale = tl.load(x_scale_ptr + tile[:, None] * M + tokens[None, :], mask=(tokens < M)[None, :], other=0.0)  # fmt: skip
            factor = factor * tl.reshape(x_scale, (B, 1))
        return acc + product * factor, squares
    if GROUP == 0 and X_SCALE != 2:
        return tl.dot(levels, x, acc), squares
    product = tl.dot(levels, x)
    if GROUP != 0:
        product *= _scales(scale_ptr, chunk, group, groups, S, R, GROUP, SCALE)[:, :, None]
    if X_SCALE == 2:
        x_scale = tl.load(x_scale_ptr + tile[:, None] * M + tokens[None, :], mask=(tokens < M)[None, :], other=0.0)  # fmt: skip
        product *= x_scale[:, None, :]
    return acc + product, squares


@triton.jit
def _halved(codes, S: tl.constexpr, R: tl.constexpr):
    """(S, R, columns) as its first and its second half of the columns."""
    HALF: tl.constexpr = codes.shape[2] // 2
    return tl.split(tl.permute(tl.reshape(codes, (S, R, 2, HALF)), (0, 1, 3, 2)))


@triton.jit(do_not_specialize=["magic", "eps", "per"])
def linear_kernel(x_ptr, norm_ptr, x_scale_ptr, w_ptr, bits_ptr, scale_ptr, zero_ptr, row_scale_ptr,
                  bias_ptr, residual_ptr, y_ptr, squares_ptr, magic, eps, per, M, N, K, tiles,
                  S: tl.constexpr, R: tl.constexpr, B: tl.constexpr, STAGES: tl.constexpr,
                  BITS: tl.constexpr, FLOAT: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
                  SCALE: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr, NORM: tl.constexpr,
                  X_SCALE: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
                  RESIDUAL: tl.constexpr, SPLIT: tl.constexpr, ONE: tl.constexpr,
                  WIDE: tl.constexpr):  # fmt: skip
    """Grid (programs over the rows, splits of K). y (M, N), or (M, N / 2) where it is gated; with SPLIT > 1
    float32 (SPLIT, M, N) sums, which ``reduce_kernel`` makes y of, and squares (SPLIT, M).

    GROUP: columns of a scale, 0 a row's own in row_scale, -1 blocks. ZERO: -1 where there are zero points, or
    the one of all. X_SCALE: 1 one a token, 2 one a token and tile. ONE: a single token. WIDE: tokens are the rows of the product
    (S is 1); else each slice is a warp's, and their sums are added at the end.
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
    tokens = tl.arange(0, B)
    row_zero = tl.zeros((1, 1), DTYPE)
    if ZERO < 0 and GROUP == 0:
        row_zero = _zeros(zero_ptr, chunk, tl.zeros((1,), tl.int32), 1, 1, R, DTYPE)
    PARTS: tl.constexpr = 1 if GROUP <= 0 or GROUP >= 128 else 128 // GROUP
    if WIDE:
        acc = tl.zeros((B, R), tl.float32)
    else:
        acc = tl.zeros((S, R, B), tl.float32)
    if ONE:
        squares = tl.zeros((S, 128 // PARTS), tl.float32)
    else:
        squares = tl.zeros((S, 128 // PARTS, B), tl.float32)
    for step in tl.range(step0, last, S, num_stages=STAGES):
        tile = tl.minimum(step + tl.arange(0, S), tiles - 1)
        codes = _codes(w_ptr, bits_ptr, chunk, tile, tiles, magic, N, K, S, R, BITS, FLOAT, HALF, DTYPE)
        if PARTS == 1:
            acc, squares = _add(acc, squares, codes, row_zero, 0, step, last, chunk, x_ptr, norm_ptr,
                x_scale_ptr, scale_ptr, zero_ptr, tiles, M, K, B, S, R, BITS, FLOAT, GROUP, ZERO, SCALE,
                HALF, DTYPE, ONE, NORM, X_SCALE, WIDE)  # fmt: skip
        else:
            halves = _halved(codes, S, R)
            for half in tl.static_range(2):
                if PARTS == 2:
                    acc, squares = _add(acc, squares, halves[half], row_zero, half, step, last, chunk, x_ptr, norm_ptr,
                        x_scale_ptr, scale_ptr, zero_ptr, tiles, M, K, B, S, R, BITS, FLOAT, GROUP, ZERO, SCALE,
                        HALF, DTYPE, ONE, NORM, X_SCALE, WIDE)  # fmt: skip
                else:
                    quarters = _halved(halves[half], S, R)
                    for quarter in tl.static_range(2):
                        acc, squares = _add(acc, squares, quarters[quarter], row_zero, 2 * half + quarter, step, last,
                            chunk, x_ptr, norm_ptr, x_scale_ptr, scale_ptr, zero_ptr, tiles, M, K, B, S, R, BITS, FLOAT,
                            GROUP, ZERO, SCALE, HALF, DTYPE, ONE, NORM, X_SCALE, WIDE)  # fmt: skip
    real = tokens < M
    if WIDE:
        y = tl.trans(acc)
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
            first = tl.program_id(0) == 0
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
    codes = _codes(w_ptr, bits_ptr, chunk, tile, tiles, magic, N, K, 1, R, BITS, FLOAT, HALF, DTYPE)
    # One group a slice: (groups of the tile, R, columns).
    GROUPS: tl.constexpr = 1 if GROUP <= 0 or GROUP >= 128 else 128 // GROUP
    RUN: tl.constexpr = GROUP // 128 if GROUP > 128 else 1
    codes = tl.permute(tl.reshape(codes, (R, GROUPS, 128 // GROUPS)), (1, 0, 2))
    group = tl.program_id(1) // RUN * GROUPS + tl.arange(0, GROUPS)
    groups = (tiles + RUN - 1) // RUN * GROUPS
    zero = tl.zeros((1, 1), DTYPE)
    if ZERO < 0 and GROUP == 0:
        zero = _zeros(zero_ptr, chunk, tl.zeros((1,), tl.int32), 1, 1, R, DTYPE)
    elif ZERO < 0:
        zero = _zeros(zero_ptr, chunk, group, groups, GROUPS, R, DTYPE)
    w = _levels(codes, zero, ZERO, BITS, FLOAT, HALF, DTYPE)
    if SCALED and GROUP != 0:
        w = w.to(tl.float32) * _scales(scale_ptr, chunk, group, groups, GROUPS, R, GROUP, SCALE)[:, :, None]  # fmt: skip
    elif SCALED and BITS < 16:
        w = w.to(tl.float32) * tl.load(row_scale_ptr + rows, mask=rows < N, other=0.0)[None, :, None]
    w = tl.reshape(tl.permute(w, (1, 0, 2)), (R, 128))
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
        return ((x / step + ROUNDER) - ROUNDER) * step
    x = (x + ROUNDER) - ROUNDER
    return tl.minimum(tl.maximum(x, -127.0), 127.0)


@triton.jit(do_not_specialize=["eps"])
def prepare_kernel(x_ptr, norm_ptr, fixed_ptr, y_ptr, x_scale_ptr, eps, M, K, BLOCK: tl.constexpr,
                   NORM: tl.constexpr, ROUND: tl.constexpr, FLOAT: tl.constexpr, DTYPE: tl.constexpr,
                   LEAST: tl.constexpr):  # fmt: skip
    """The RMSNorm of a token, rounded as ``InputScheme`` does. y (M, K): levels where it is rounded; scales
    float32 (M,), or (tiles, M). ROUND: 0 not at all, 1 a token, 2 fixed, 3 groups. Grid (tokens,)."""
    m = tl.program_id(0)
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


@triton.jit
def read_kernel(x_ptr, out_ptr, words, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Reads int32 words and keeps one of each program: what a kernel that does nothing else can read."""
    at = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for step in tl.static_range(STEPS):
        total ^= tl.load(x_ptr + at + step * BLOCK, mask=at + step * BLOCK < words, other=0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))
