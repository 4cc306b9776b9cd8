"""The Triton kernels of compress.kernels.decode_attention, which says what they compute."""

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
def _step(scores, seen, m, l):  # noqa: E741 - the papers' name
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


# None of these sizes is worth a kernel of its own: they change while a sequence grows.
@triton.jit(do_not_specialize=["tokens", "sinks", "recent", "stretch", "stretches"])
def attend_kernel(q_ptr, qp_ptr, k_ptr, ks_ptr, kl_ptr, v_ptr, vs_ptr, vl_ptr, fixed_k_ptr, fixed_v_ptr,
                   sink_k_ptr, sink_v_ptr, recent_k_ptr, recent_v_ptr, first_ptr, acc_ptr, summary_ptr,
                   scaling, tokens, sinks, recent, stretch, stretches, heads, D: tl.constexpr,
                   QUERIES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                   K_BITS: tl.constexpr, K_PER: tl.constexpr, K_GROUPS: tl.constexpr, K_LOW: tl.constexpr,
                   V_BITS: tl.constexpr, V_PER: tl.constexpr, V_GROUPS: tl.constexpr, V_LOW: tl.constexpr):  # fmt: skip
    """PER: 0 channel, 1 token, 2 fixed floats. Grid (batch * heads, stretches of the store, sinks, recent)."""
    row_head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    head = row_head % heads
    first = tl.load(first_ptr + row_head // heads)
    queries = tl.arange(0, ROWS)
    real = queries < QUERIES
    q_rows = (row_head * QUERIES + queries) * D
    within = tl.arange(0, BLOCK)
    m = tl.full((ROWS,), -1e30, tl.float32)
    l = tl.zeros((ROWS,), tl.float32)  # noqa: E741
    out_rows = (row_head * QUERIES + queries) * (stretches + 2) + part
    if part < stretches:
        K_PLANES: tl.constexpr = 8 // K_BITS
        V_PLANES: tl.constexpr = 8 // V_BITS
        K_WIDTH: tl.constexpr = D // K_PLANES
        V_WIDTH: tl.constexpr = D // V_PLANES
        k_cols = tl.arange(0, K_WIDTH)
        v_cols = tl.arange(0, V_WIDTH)
        like = tl.load(qp_ptr + q_rows, mask=real, other=0.0)
        acc0 = tl.zeros((ROWS, V_WIDTH), tl.float32)
        acc1 = acc0
        acc2 = acc0
        acc3 = acc0
        begin = part * stretch
        # Blocks before the first seen token hold nothing for this row.
        begin = tl.maximum(begin, first // BLOCK * BLOCK)
        for start in range(begin, tl.minimum((part + 1) * stretch, tokens), BLOCK):
            place = start + within
            inside = place < tokens
            offset = row_head * tokens + place
            k_byte = tl.load(
                k_ptr + offset[:, None] * K_WIDTH + k_cols[None, :],
                mask=inside[:, None],
                other=0,
            )
            scores = tl.zeros((ROWS, BLOCK), tl.float32)
            for plane in tl.static_range(K_PLANES):
                cols = plane * K_WIDTH + k_cols
                qp = tl.load(
                    qp_ptr + q_rows[:, None] + cols[None, :], mask=real[:, None], other=0.0
                )
                codes = _plane(k_byte, plane, K_BITS, K_PER, like)
                if K_PER == 0:
                    group = (row_head * (tokens // BLOCK) + start // BLOCK) * D + cols
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
            p, worth, m, l = _step(scores * scaling, seen, m, l)  # noqa: E741
            v_byte = tl.load(
                v_ptr + offset[:, None] * V_WIDTH + v_cols[None, :],
                mask=inside[:, None],
                other=0,
            )
            acc0 = _values(
                acc0,
                worth,
                p,
                v_byte,
                vs_ptr,
                vl_ptr,
                0,
                offset,
                inside,
                V_BITS,
                V_PER,
                V_GROUPS,
                V_LOW,
                like,
            )
            if V_PLANES > 1:
                acc1 = _values(
                    acc1,
                    worth,
                    p,
                    v_byte,
                    vs_ptr,
                    vl_ptr,
                    1,
                    offset,
                    inside,
                    V_BITS,
                    V_PER,
                    V_GROUPS,
                    V_LOW,
                    like,
                )
            if V_PLANES > 2:
                acc2 = _values(
                    acc2,
                    worth,
                    p,
                    v_byte,
                    vs_ptr,
                    vl_ptr,
                    2,
                    offset,
                    inside,
                    V_BITS,
                    V_PER,
                    V_GROUPS,
                    V_LOW,
                    like,
                )
                acc3 = _values(
                    acc3,
                    worth,
                    p,
                    v_byte,
                    vs_ptr,
                    vl_ptr,
                    3,
                    offset,
                    inside,
                    V_BITS,
                    V_PER,
                    V_GROUPS,
                    V_LOW,
                    like,
                )
        fixed = 1.0
        if V_PER == 2:
            fixed = tl.load(fixed_v_ptr + head)
        out = acc_ptr + out_rows[:, None] * D + v_cols[None, :]
        tl.store(out, acc0 * fixed, mask=real[:, None])
        if V_PLANES > 1:
            tl.store(out + V_WIDTH, acc1, mask=real[:, None])
        if V_PLANES > 2:
            tl.store(out + 2 * V_WIDTH, acc2, mask=real[:, None])
            tl.store(out + 3 * V_WIDTH, acc3, mask=real[:, None])
    else:
        cols = tl.arange(0, D)
        q = tl.load(q_ptr + q_rows[:, None] + cols[None, :], mask=real[:, None], other=0.0)
        acc = tl.zeros((ROWS, D), tl.float32)
        # One of the two is none: the part is that of the sinks, or of the recent tokens.
        first_count = tl.where(part == stretches, sinks, 0)
        last_count = tl.where(part == stretches, 0, recent)
        count = first_count + last_count
        # Few tokens, so nothing to prefetch: that would take more shared memory than there is.
        for spot in tl.range(0, count, BLOCK, num_stages=1):
            place = spot + within
            at = (row_head * count + place)[:, None] * D + cols[None, :]
            from_sinks = (place < first_count)[:, None]
            from_recent = (place < last_count)[:, None]
            keys = tl.load(sink_k_ptr + at, mask=from_sinks, other=0.0).to(q.dtype)
            keys += tl.load(recent_k_ptr + at, mask=from_recent, other=0.0).to(q.dtype)
            seen = (place < first_count) | ((place < last_count) & (place + tokens >= first))
            scores = tl.dot(q, tl.trans(keys)) * scaling
            p, worth, m, l = _step(scores, seen[None, :], m, l)  # noqa: E741
            values = tl.load(sink_v_ptr + at, mask=from_sinks, other=0.0).to(q.dtype)
            values += tl.load(recent_v_ptr + at, mask=from_recent, other=0.0).to(q.dtype)
            acc = acc * worth[:, None] + tl.dot(p.to(q.dtype), values)
        tl.store(acc_ptr + out_rows[:, None] * D + cols[None, :], acc, mask=real[:, None])
    tl.store(summary_ptr + out_rows * 2, m, mask=real)
    tl.store(summary_ptr + out_rows * 2 + 1, l, mask=real)


@triton.jit(do_not_specialize=["parts"])
def combine_kernel(acc_ptr, summary_ptr, out_ptr, size, parts, PARTS_PADDED: tl.constexpr,
                    D: tl.constexpr):  # fmt: skip
    """The parts of one query head weighed by their sums: those of the store, and the two in 16 bits."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS_PADDED)
    cols = tl.arange(0, D)
    real = part < parts
    m = tl.load(summary_ptr + (row * parts + part) * 2, mask=real, other=-1e30)
    l = tl.load(summary_ptr + (row * parts + part) * 2 + 1, mask=real, other=0.0)  # noqa: E741
    weight = tl.exp2(m - tl.max(m, axis=0))
    weight /= tl.sum(weight * l, axis=0)
    at = (row * parts + part)[:, None] * D + cols[None, :]
    acc = tl.load(acc_ptr + at, mask=real[:, None], other=0.0) * weight[:, None]
    packed = (part < parts - 2)[:, None]
    tl.store(out_ptr + row * D + cols, tl.sum(tl.where(packed, acc, 0.0), axis=0))
    tl.store(out_ptr + size + row * D + cols, tl.sum(tl.where(packed, 0.0, acc), axis=0))
