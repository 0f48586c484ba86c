"""Triton kernels for the checkers' own tests: correct, or with one planted mistake each."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softmax_kernel(x_ptr, y_ptr, stride_xr, stride_yr, columns, BLOCK: tl.constexpr):
    """A row a program, three reads of x. x and y may be one tensor."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xr
    y_ptr += row * stride_yr
    lanes = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + lanes < columns
        x = tl.load(x_ptr + start + lanes, mask=inside, other=-float("inf")).to(tl.float32)
        largest = tl.maximum(largest, x)
    largest = tl.max(largest, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + lanes < columns
        x = tl.load(x_ptr + start + lanes, mask=inside, other=-float("inf")).to(tl.float32)
        total += tl.exp(x - largest)
    total = tl.sum(total, 0)
    for start in range(0, columns, BLOCK):
        inside = start + lanes < columns
        x = tl.load(x_ptr + start + lanes, mask=inside, other=-float("inf")).to(tl.float32)
        y = tl.exp(x - largest) / total
        tl.store(y_ptr + start + lanes, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def copy_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lanes, mask=lanes < size, other=0.0)
    tl.store(y_ptr + lanes, x.to(y_ptr.dtype.element_ty), mask=lanes < size)


@triton.jit
def maybe_add_kernel(x_ptr, bias_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """bias_ptr may be None."""
    lanes = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lanes, mask=lanes < size, other=0.0)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + lanes, mask=lanes < size, other=0.0)
    tl.store(y_ptr + lanes, x, mask=lanes < size)


@triton.jit
def histogram_kernel(x_ptr, counts_ptr, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(counts_ptr + tl.load(x_ptr + lanes), 1)


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    tile = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(a_ptr + tile), tl.load(b_ptr + tile), input_precision="ieee")
    tl.store(out_ptr + tile, product)


@triton.jit
def unmasked_load_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + lanes, tl.load(x_ptr + lanes), mask=lanes < size)


@triton.jit
def unmasked_store_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + lanes, tl.load(x_ptr + lanes, mask=lanes < size, other=0.0))


@triton.jit
def unmasked_atomic_kernel(y_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(y_ptr + tl.arange(0, BLOCK), 1.0)


@triton.jit
def write_write_race_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr + tl.program_id(0)))


@triton.jit
def read_write_race_kernel(x_ptr, size):
    """Each program moves its right neighbour here, which may have been overwritten already."""
    i = tl.program_id(0)
    right = tl.load(x_ptr + i + 1, mask=i + 1 < size, other=0.0)
    tl.store(x_ptr + i, right)


@triton.jit
def shared_read_then_write_kernel(x_ptr, y_ptr):
    """Every program reads x[0]; the last one then writes it."""
    value = tl.load(x_ptr)
    tl.store(y_ptr + tl.program_id(0), value)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(x_ptr, value)


@triton.jit
def atomic_against_load_kernel(counter_ptr, y_ptr):
    tl.atomic_add(counter_ptr, 1.0)
    tl.store(y_ptr + tl.program_id(0), tl.load(counter_ptr))


@triton.jit
def double_store_kernel(y_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(y_ptr + lanes // 2, lanes.to(tl.float32))


@triton.jit
def bfloat16_product_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(y_ptr + tl.arange(0, BLOCK), x * x)


@triton.jit
def bfloat16_sum_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(y_ptr, tl.sum(x, 0))


@triton.jit
def undefined_lanes_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """Sums up lanes that the mask left undefined."""
    lanes = tl.arange(0, BLOCK)
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + lanes, mask=lanes < size), 0))
