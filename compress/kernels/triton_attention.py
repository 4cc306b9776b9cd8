"""The Triton kernels of compress.kernels.decode_attention, which says what they compute.

counts (3,): the place of the newest token, which is there already; packed tokens; sinks. Buffers have room for
more tokens than these: a grid is fixed by the room, and programs with nothing to do end at once.
"""

import triton
import triton.language as tl


@triton.jit
def _plane(byte, plane: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr, like):
    """The codes at one position of the bytes, around zero: integers less half their range, in the type of
    ``like``. Centred products lose less when they are rounded."""
    if PER == 2:
        # Through float16, which holds every E4M3 number and is what the hardware converts to.
        return byte.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(like.dtype)
    codes = (byte >> (plane * BITS)) & ((1 << BITS) - 1)
    return (codes.to(tl.int16) - (1 << (BITS - 1))).to(like.dtype)


@triton.jit
def _step(scores, seen, m, l):
    """Running maximum, sum, and what was accumulated so far is worth: online softmax in base 2."""
    scores = tl.where(seen, scores, -1e30)
    m_new = tl.maximum(m, tl.max(scores, axis=1))
    p = tl.where(seen, tl.exp2(scores - m_new[:, None]), 0.0)
    worth = tl.exp2(m - m_new)
    return p, worth, m_new, l * worth + tl.sum(p, axis=1)


@triton.jit
def _values(acc, worth, p, byte, scale_ptr, low_ptr, plane: tl.constexpr, offset, inside,
            BITS: tl.constexpr, PER: tl.constexpr, GROUPS: tl.constexpr, LOW: tl.constexpr, like):  # fmt: skip
    """One position of the value bytes added to its accumulator."""
    weights = p
    extra = tl.zeros_like(worth)
    if PER == 1:
        group: tl.constexpr = plane * GROUPS // (8 // BITS)
        scale = tl.load(scale_ptr + offset * GROUPS + group, mask=inside, other=0.0).to(tl.float32)
        weights = p * scale[None, :]
        if LOW:
            low = tl.load(low_ptr + offset * GROUPS + group, mask=inside, other=0.0).to(tl.float32)
            extra = tl.sum(p * (low + (1 << (BITS - 1)) * scale)[None, :], axis=1)
    codes = _plane(byte, plane, BITS, PER, like)
    return acc * worth[:, None] + tl.dot(weights.to(like.dtype), codes) + extra[:, None]


@triton.jit
def _sixteen(q, k_ptr, v_ptr, base, begin, end, sinks, packed, first, scaling, D: tl.constexpr,
             ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Attention to the tokens from begin to end of a buffer in 16 bits: what was accumulated, the maximum and
    the sum. The sinks are its first tokens, and the others come behind those that are packed."""
    within = tl.arange(0, BLOCK)
    cols = tl.arange(0, D)
    m = tl.full((ROWS,), -1e30, tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        place = start + within
        inside = place < end
        at = base + place[:, None] * D + cols[None, :]
        keys = tl.load(k_ptr + at, mask=inside[:, None], other=0.0).to(q.dtype)
        seen = inside & ((place < sinks) | (place - sinks + packed >= first))
        scores = tl.dot(q, tl.trans(keys)) * scaling
        p, worth, m, l = _step(scores, seen[None, :], m, l)
        values = tl.load(v_ptr + at, mask=inside[:, None], other=0.0).to(q.dtype)
        acc = acc * worth[:, None] + tl.dot(p.to(q.dtype), values)
    return acc, m, l


@triton.jit
def _stretch(part, parts, first, tokens, BLOCK: tl.constexpr, LEAST: tl.constexpr):
    """Where the stretch of a part begins and ends: tokens from the block of the first seen one on, divided
    evenly, but no less than so many blocks each."""
    start = first // BLOCK * BLOCK
    each = tl.maximum(tl.cdiv(tl.cdiv(tokens - start, BLOCK), parts), LEAST) * BLOCK
    begin = start + part * each
    return begin, tl.minimum(begin + each, tokens)


@triton.jit
def _counted(counts_ptr, first_ptr, row, window):
    """Tokens in all, packed ones, sinks, and the first token behind the sinks that a row sees."""
    tokens = tl.load(counts_ptr).to(tl.int32) + 1
    packed = tl.load(counts_ptr + 1).to(tl.int32)
    sinks = tl.load(counts_ptr + 2).to(tl.int32)
    first = tl.load(first_ptr + row).to(tl.int32)
    # Without a window it is so large that this is negative. With one there are no sinks.
    return tokens, packed, sinks, tl.maximum(first, tokens - window)


# None of these sizes is worth a kernel of its own.
@triton.jit(
    do_not_specialize=[
        "capacity",
        "kept_capacity",
        "kept_stretch",
        "window",
        "stretches",
        "parts",
        "heads",
    ]
)
def attend_kernel(q_ptr, qp_ptr, k_ptr, ks_ptr, kl_ptr, v_ptr, vs_ptr, vl_ptr, fixed_k_ptr, fixed_v_ptr,
                   kept_k_ptr, kept_v_ptr, counts_ptr, first_ptr, acc_ptr, summary_ptr,
                   scaling, capacity, kept_capacity, kept_stretch, window, stretches, parts, heads,
                   D: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
                   BLOCK: tl.constexpr, LEAST: tl.constexpr, ONE: tl.constexpr,
                   K_BITS: tl.constexpr, K_PER: tl.constexpr, K_GROUPS: tl.constexpr, K_LOW: tl.constexpr,
                   V_BITS: tl.constexpr, V_PER: tl.constexpr, V_GROUPS: tl.constexpr, V_LOW: tl.constexpr):  # fmt: skip
    """PER: 0 channel, 1 token, 2 fixed floats. Grid (batch * heads, parts): stretches of the store, then of
    the tokens in 16 bits."""
    row_head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    head = row_head % heads
    tokens, packed, sinks, first = _counted(counts_ptr, first_ptr, row_head // heads, window)
    queries = tl.arange(0, ROWS)
    real = queries < QUERIES
    q_rows = (row_head * QUERIES + queries) * D
    out_rows = (row_head * QUERIES + queries) * parts + part
    if part < stretches:
        K_PLANES: tl.constexpr = 8 // K_BITS
        V_PLANES: tl.constexpr = 8 // V_BITS
        K_WIDTH: tl.constexpr = D // K_PLANES
        V_WIDTH: tl.constexpr = D // V_PLANES
        within = tl.arange(0, BLOCK)
        k_cols = tl.arange(0, K_WIDTH)
        v_cols = tl.arange(0, V_WIDTH)
        like = tl.load(qp_ptr + q_rows, mask=real, other=0.0)
        m = tl.full((ROWS,), -1e30, tl.float32)
        l = tl.zeros((ROWS,), tl.float32)
        accs = ()
        for _ in tl.static_range(V_PLANES):
            accs = accs + (tl.zeros((ROWS, V_WIDTH), tl.float32),)  # noqa: RUF005
        begin, end = _stretch(part, stretches, first, packed, BLOCK, LEAST)
        for start in range(begin, end, BLOCK):
            place = start + within
            inside = place < end
            offset = row_head * capacity + place
            k_byte = tl.load(
                k_ptr + offset[:, None] * K_WIDTH + k_cols[None, :], mask=inside[:, None], other=0
            )
            scores = tl.zeros((ROWS, BLOCK), tl.float32)
            for plane in tl.static_range(K_PLANES):
                cols = plane * K_WIDTH + k_cols
                qp = tl.load(
                    qp_ptr + q_rows[:, None] + cols[None, :], mask=real[:, None], other=0.0
                )
                codes = _plane(k_byte, plane, K_BITS, K_PER, like)
                if K_PER == 0:
                    group = (row_head * (capacity // BLOCK) + start // BLOCK) * D + cols
                    scale = tl.load(ks_ptr + group).to(tl.float32)[None, :]
                    scores += tl.dot((qp.to(tl.float32) * scale).to(like.dtype), tl.trans(codes))
                    if K_LOW:
                        low = tl.load(kl_ptr + group).to(tl.float32)[None, :]
                        middle = low + (1 << (K_BITS - 1)) * scale
                        scores += tl.sum(qp.to(tl.float32) * middle, axis=1)[:, None]
                elif K_PER == 1:
                    at = offset * K_GROUPS + plane * K_GROUPS // K_PLANES
                    scale = tl.load(ks_ptr + at, mask=inside, other=0.0).to(tl.float32)
                    scores += tl.dot(qp, tl.trans(codes)) * scale[None, :]
                    if K_LOW:
                        low = tl.load(kl_ptr + at, mask=inside, other=0.0).to(tl.float32)
                        middle = low + (1 << (K_BITS - 1)) * scale
                        scores += tl.sum(qp.to(tl.float32), axis=1)[:, None] * middle[None, :]
                else:
                    scores += tl.dot(qp, tl.trans(codes)) * tl.load(fixed_k_ptr + head)
            seen = (inside & (place >= first))[None, :]
            p, worth, m, l = _step(scores * scaling, seen, m, l)
            v_byte = tl.load(
                v_ptr + offset[:, None] * V_WIDTH + v_cols[None, :], mask=inside[:, None], other=0
            )
            more = ()
            for plane in tl.static_range(V_PLANES):
                acc = _values(accs[plane], worth, p, v_byte, vs_ptr, vl_ptr, plane, offset, inside,
                              V_BITS, V_PER, V_GROUPS, V_LOW, like)  # fmt: skip
                more = more + (acc,)  # noqa: RUF005
            accs = more
        if begin < end:
            fixed = 1.0
            if V_PER == 2:
                fixed = tl.load(fixed_v_ptr + head)
            out = acc_ptr + out_rows[:, None] * D + v_cols[None, :]
            for plane in tl.static_range(V_PLANES):
                _leave(out + plane * V_WIDTH, accs[plane] * fixed, l, real, ONE)
    else:
        q = tl.load(
            q_ptr + q_rows[:, None] + tl.arange(0, D)[None, :], mask=real[:, None], other=0.0
        )
        begin = (part - stretches) * kept_stretch
        end = tl.minimum(begin + kept_stretch, tokens - packed)
        # Few tokens, so nothing to prefetch: that would take more shared memory than there is.
        acc, m, l = _sixteen(q, kept_k_ptr, kept_v_ptr, row_head * kept_capacity * D, begin, end, sinks,
                             packed, first, scaling, D, ROWS, BLOCK, 1)  # fmt: skip
        if begin < end:
            _leave(acc_ptr + out_rows[:, None] * D + tl.arange(0, D)[None, :], acc, l, real, ONE)
    if not ONE:
        tl.store(summary_ptr + out_rows * 2, m, mask=real)
        tl.store(summary_ptr + out_rows * 2 + 1, l, mask=real)


@triton.jit(do_not_specialize=["capacity", "window", "parts", "heads"])
def sixteen_kernel(q_ptr, k_ptr, v_ptr, counts_ptr, first_ptr, acc_ptr, summary_ptr, scaling, capacity,
                   window, parts, heads, D: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
                   BLOCK: tl.constexpr, LEAST: tl.constexpr, ONE: tl.constexpr):  # fmt: skip
    """A cache all in 16 bits. Grid (batch * heads, parts)."""
    row_head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    tokens, _, _, first = _counted(counts_ptr, first_ptr, row_head // heads, window)
    begin, end = _stretch(part, parts, first, tokens, BLOCK, LEAST)
    queries = tl.arange(0, ROWS)
    real = queries < QUERIES
    cols = tl.arange(0, D)
    rows = row_head * QUERIES + queries
    out_rows = rows * parts + part
    q = tl.load(q_ptr + rows[:, None] * D + cols[None, :], mask=real[:, None], other=0.0)
    acc, m, l = _sixteen(q, k_ptr, v_ptr, row_head * capacity * D, begin, end, 0, 0, first, scaling, D, ROWS,
                         BLOCK, 2)  # fmt: skip
    if begin < end:
        _leave(acc_ptr + out_rows[:, None] * D + cols[None, :], acc, l, real, ONE)
    if not ONE:
        tl.store(summary_ptr + out_rows * 2, m, mask=real)
        tl.store(summary_ptr + out_rows * 2 + 1, l, mask=real)


@triton.jit
def _leave(out, acc, l, real, ONE: tl.constexpr):
    """What a part accumulated; where it is the only one, the result."""
    if ONE:
        acc = acc / l[:, None]
    tl.store(out, acc, mask=real[:, None])


@triton.jit(do_not_specialize=["parts", "stretches"])
def combine_kernel(acc_ptr, summary_ptr, turn_ptr, out_ptr, parts, stretches, PARTS_PADDED: tl.constexpr,
                   D: tl.constexpr, TURN: tl.constexpr):  # fmt: skip
    """The parts of one query head weighed by their sums. TURN: those of the store, the first ones, are turned
    back. Grid (batch * query heads,)."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS_PADDED)
    cols = tl.arange(0, D)
    real = part < parts
    m = tl.load(summary_ptr + (row * parts + part) * 2, mask=real, other=-1e30)
    l = tl.load(summary_ptr + (row * parts + part) * 2 + 1, mask=real, other=0.0)
    weight = tl.exp2(m - tl.max(m, axis=0))
    weight /= tl.sum(weight * l, axis=0)
    at = (row * parts + part)[:, None] * D + cols[None, :]
    # Parts that saw nothing left nothing.
    acc = tl.load(acc_ptr + at, mask=(l > 0)[:, None], other=0.0) * weight[:, None]
    if TURN:
        packed = (part < stretches)[:, None]
        out = tl.sum(tl.where(packed, 0.0, acc), axis=0)
        stored = tl.sum(tl.where(packed, acc, 0.0), axis=0)
        turn = tl.load(turn_ptr + cols[:, None] * D + cols[None, :])
        out += tl.sum(turn * stored[None, :], axis=1)
    else:
        out = tl.sum(acc, axis=0)
    tl.store(out_ptr + row * D + cols, out)


@triton.jit
def _turned(x, turn_ptr, D: tl.constexpr):
    """x (D,) times a matrix."""
    cols = tl.arange(0, D)
    return tl.sum(tl.load(turn_ptr + cols[:, None] * D + cols[None, :]) * x[:, None], axis=0)


@triton.jit
def _round(x):
    """To whole numbers, ties to even, of |x| < 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _e4m3(x):
    """The nearest of the format, ties to even, of |x| <= 448. Rounded here: the interpreter's conversion does
    not carry and makes 4 of 7.8."""
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 127 - 6)
    step = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
    return (_round(x / step) * step).to(tl.float8e4nv)


@triton.jit
def _quantize(x, codes_ptr, scale_ptr, low_ptr, fixed_ptr, turn_ptr, offset, head, D: tl.constexpr,
              BITS: tl.constexpr, PER: tl.constexpr, GROUPS: tl.constexpr, LOW: tl.constexpr, TURN: tl.constexpr):  # fmt: skip
    """One token of a head, x (D,), to a place of the store, as compress.kv_cache.states has it."""
    PLANES: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = D // PLANES
    if PER == 2:
        y = tl.div_rn(x, tl.load(fixed_ptr + head))
        y = _e4m3(tl.minimum(tl.maximum(y, -448.0), 448.0))
        tl.store(codes_ptr + offset * D + tl.arange(0, D), y.to(tl.uint8, bitcast=True))
    else:
        if TURN:
            x = _turned(x, turn_ptr, D)
        # A group is all channels of one or several positions of the bytes.
        y = tl.reshape(x, (GROUPS, D // GROUPS))
        if LOW:
            low = tl.min(y, axis=1).to(tl.float16)
            largest: tl.constexpr = (1 << BITS) - 1
            step = tl.div_rn(tl.max(y, axis=1) - low.to(tl.float32), largest * 1.0).to(tl.float16)
            tl.store(low_ptr + offset * GROUPS + tl.arange(0, GROUPS), low)
            zero = low.to(tl.float32)
            least: tl.constexpr = 0
            middle: tl.constexpr = 0
        else:
            middle: tl.constexpr = 1 << (BITS - 1)
            largest: tl.constexpr = middle - 1
            least: tl.constexpr = 1 - middle
            step = tl.div_rn(tl.max(tl.abs(y), axis=1), largest * 1.0).to(tl.float16)
            zero = tl.zeros((GROUPS,), tl.float32)
        tl.store(scale_ptr + offset * GROUPS + tl.arange(0, GROUPS), step)
        step = step.to(tl.float32)
        step = tl.where(step > 0, step, 1.0)
        y = _round(
            tl.div_rn(y - zero[:, None], tl.broadcast_to(step[:, None], (GROUPS, D // GROUPS)))
        )
        y = tl.minimum(tl.maximum(y, least), largest) + middle
        codes = (
            tl.reshape(y, (PLANES, WIDTH)).to(tl.int32) << (tl.arange(0, PLANES) * BITS)[:, None]
        )
        tl.store(
            codes_ptr + offset * WIDTH + tl.arange(0, WIDTH), tl.sum(codes, axis=0).to(tl.uint8)
        )


@triton.jit
def _keep(x, kept_ptr, codes_ptr, scale_ptr, low_ptr, fixed_ptr, turn_ptr, row_head, head, place, packed, sinks,
          kept_capacity, capacity, D: tl.constexpr, DIRECT: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr,
          GROUPS: tl.constexpr, LOW: tl.constexpr, TURN: tl.constexpr):  # fmt: skip
    """One token of a head to where it belongs."""
    x = x.to(kept_ptr.dtype.element_ty)
    cols = tl.arange(0, D)
    if DIRECT:
        if place < sinks:
            tl.store(kept_ptr + (row_head * kept_capacity + place) * D + cols, x)
        elif packed <= capacity:
            _quantize(x.to(tl.float32), codes_ptr, scale_ptr, low_ptr, fixed_ptr, turn_ptr,
                      row_head * capacity + packed - 1, head, D, BITS, PER, GROUPS, LOW, TURN)  # fmt: skip
    elif (place >= packed) & (place - packed < kept_capacity):
        tl.store(kept_ptr + (row_head * kept_capacity + place - packed) * D + cols, x)


@triton.jit(do_not_specialize=["kept_capacity", "capacity", "heads"])
def rotate_kernel(qkv_ptr, cos_ptr, sin_ptr, turn_ptr, counts_ptr, first_ptr, q_ptr, qp_ptr, kept_k_ptr,
                  kept_v_ptr, k_ptr, ks_ptr, kl_ptr, v_ptr, vs_ptr, vl_ptr, fixed_k_ptr, fixed_v_ptr,
                  kept_capacity, capacity, heads, D: tl.constexpr, QUERIES: tl.constexpr,
                  DIRECT: tl.constexpr,
                  K_BITS: tl.constexpr, K_PER: tl.constexpr, K_GROUPS: tl.constexpr, K_LOW: tl.constexpr, K_TURN: tl.constexpr,
                  V_BITS: tl.constexpr, V_PER: tl.constexpr, V_GROUPS: tl.constexpr, V_LOW: tl.constexpr, V_TURN: tl.constexpr):  # fmt: skip
    """Grid (batch, query heads + 2 * heads): one head of queries, keys or values."""
    row = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1)
    query_heads = heads * QUERIES
    place = tl.load(counts_ptr)
    packed = tl.load(counts_ptr + 1)
    sinks = tl.load(counts_ptr + 2)
    cols = tl.arange(0, D)
    begin = (row * (query_heads + 2 * heads) + which) * D
    x = tl.load(qkv_ptr + begin + cols).to(tl.float32)
    if which < query_heads + heads:
        # The rotary embedding, halves against each other, rounded once.
        other = tl.load(qkv_ptr + begin + (cols + D // 2) % D).to(tl.float32)
        other = tl.where(cols < D // 2, -other, other)
        angle = tl.maximum(place - tl.load(first_ptr + row), 0) * D + cols
        x = x * tl.load(cos_ptr + angle) + other * tl.load(sin_ptr + angle)
    if which < query_heads:
        q = x.to(q_ptr.dtype.element_ty)
        out = (row * query_heads + which) * D + cols
        tl.store(q_ptr + out, q)
        if K_TURN:
            # Turned keys meet a turned query: the product is the same.
            tl.store(qp_ptr + out, _turned(q.to(tl.float32), turn_ptr, D))
    elif which < query_heads + heads:
        head = which - query_heads
        _keep(x, kept_k_ptr, k_ptr, ks_ptr, kl_ptr, fixed_k_ptr, turn_ptr, row * heads + head, head, place, packed,
              sinks, kept_capacity, capacity, D, DIRECT, K_BITS, K_PER, K_GROUPS, K_LOW, K_TURN)  # fmt: skip
    else:
        head = which - query_heads - heads
        _keep(x, kept_v_ptr, v_ptr, vs_ptr, vl_ptr, fixed_v_ptr, turn_ptr, row * heads + head, head, place, packed,
              sinks, kept_capacity, capacity, D, DIRECT, V_BITS, V_PER, V_GROUPS, V_LOW, V_TURN)  # fmt: skip
