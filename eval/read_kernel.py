"""The Triton kernel of eval.bandwidth, which says what it is for."""

import triton
import triton.language as tl


@triton.jit
def sum_kernel(x_ptr, sums_ptr, BLOCK: tl.constexpr, LOADS: tl.constexpr):
    """sums[program] = sum of the program's stretch of BLOCK x LOADS elements. Neighbouring threads read
    neighbouring 16 bytes, and all loads of a program are in flight before the first is needed."""
    program = tl.program_id(0)
    start = program.to(tl.int64) * BLOCK * LOADS
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for i in tl.static_range(LOADS):
        total += tl.load(x_ptr + start + i * BLOCK + offsets)
    tl.store(sums_ptr + program, tl.sum(total, axis=0))
