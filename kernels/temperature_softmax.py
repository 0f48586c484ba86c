"""temperature_softmax: softmax(z / T), or its logarithm, of every row of logits; and its gradient.

    logits [outer, inner, V] -> output [outer, inner, V], of their dtype or float32
    p_j = e^(d_j) / S,  log p_j = d_j - log S,  d_j = (z_j - max z) / T,  S = sum_j e^(d_j)
    softmax: dy_j = p_j (g_j - sum g p);  log: dy_j = g_j - p_j sum g
    dz_j = dy_j / T,  dT = -(1/T) sum_j dy_j log p_j

One program a row. Forward reads V elements twice, the second time from the second-level cache, and
writes V; a greedy row is read once more for its best id. Backward reads 2V twice and writes V. A
row is folded into a tile of lanes, one 16-byte load each, and nothing crosses threads before the
row ends. `output` may be `logits`: a program reads an element before it writes it.
Limits: V < 2^27, fewer than 2^31 rows; 16-byte accesses need V and strides that are multiples of
16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INF, LN2, LOG2E, LOWEST_EXPONENT, block_and_warps, on_device, vector_size

# half the largest float32: of the least temperatures the inverse would be infinite, and 0 * inf NaN
LARGEST_INVERSE = tl.constexpr(1.7e38)


@triton.jit
def _row_pointer(ptr, row, inner, stride_outer, stride_inner):
    return (
        ptr + (row // inner).to(tl.int64) * stride_outer + (row % inner).to(tl.int64) * stride_inner
    )


@triton.jit
def _row_temperature(row_temperature_ptr, row, temperature):
    """Whether the row is greedy, and 1 / T, of a greedy row 1."""
    if row_temperature_ptr is not None:
        temperature = tl.load(row_temperature_ptr + row)
    greedy = temperature == 0.0
    return greedy, tl.minimum(1.0 / tl.where(greedy, 1.0, temperature), LARGEST_INVERSE)


@triton.jit
def _temperature_softmax_fwd_kernel(
    logits_ptr,
    row_temperature_ptr,
    output_ptr,
    temperature,
    inner,
    vocab,
    stride_outer,
    stride_inner,
    out_stride_outer,
    out_stride_inner,
    LOG: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0)
    greedy, inverse = _row_temperature(row_temperature_ptr, row, temperature)
    bits_per_logit = inverse * LOG2E
    z_ptr = _row_pointer(logits_ptr, row, inner, stride_outer, stride_inner)
    y_ptr = _row_pointer(output_ptr, row, inner, out_stride_outer, out_stride_inner)

    tile = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]  # [LANES, VECTOR]
    top = tl.full([LANES], -INF, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for start in range(0, vocab, LANES * VECTOR):
        columns = start + tile
        z = tl.load(z_ptr + columns, mask=columns < vocab, other=-INF).to(tl.float32)
        new_top = tl.maximum(top, tl.max(z, 1))
        # tl.max drops a NaN, but NaN - base is NaN and stays in total; +inf becomes inf - inf
        base = tl.where(new_top == -INF, 0.0, new_top)
        scale = tl.where(new_top > top, tl.exp2((top - base) * bits_per_logit), 1.0)
        total = total * scale + tl.sum(tl.exp2((z - base[:, None]) * bits_per_logit), 1)
        top = new_top

    row_top = tl.max(top, 0)
    base = tl.where(row_top == -INF, 0.0, row_top)
    lane_scale = tl.where(row_top > top, tl.exp2((top - base) * bits_per_logit), 1.0)
    row_total = tl.sum(total * lane_scale, 0)
    nothing_allowed = (row_top == -INF) & (row_total == 0.0)
    fixed = nothing_allowed | (greedy & (row_total == row_total))  # a NaN row stays NaN
    best = tl.full([], -1, tl.int32)
    if greedy & (row_top > -INF):
        first = tl.full([LANES], vocab, tl.int32)
        for start in range(0, vocab, LANES * VECTOR):
            columns = start + tile
            z = tl.load(z_ptr + columns, mask=columns < vocab, other=-INF).to(tl.float32)
            first = tl.minimum(first, tl.min(tl.where(z == row_top, columns, vocab), 1))
        best = tl.min(first, 0)

    one = 0.0 if LOG else 1.0
    rest = -INF if LOG else 0.0
    log_sum = tl.log(tl.where(nothing_allowed, 1.0, row_total))
    inverse_total = 1.0 / tl.where(nothing_allowed, 1.0, row_total)
    for start in range(0, vocab, LANES * VECTOR):
        columns = start + tile
        z = tl.load(z_ptr + columns, mask=columns < vocab, other=-INF).to(tl.float32)
        if LOG:
            y = (z - base) * inverse - log_sum
        else:
            y = tl.exp2((z - base) * bits_per_logit) * inverse_total
        y = tl.where(fixed, tl.where(columns == best, one, rest), y)
        tl.store(y_ptr + columns, y.to(output_ptr.dtype.element_ty), mask=columns < vocab)


@triton.jit
def _temperature_softmax_bwd_kernel(
    upstream_ptr,
    output_ptr,
    row_temperature_ptr,
    grad_ptr,
    grad_temperature_ptr,
    temperature,
    inner,
    vocab,
    upstream_stride_outer,
    upstream_stride_inner,
    stride_outer,
    stride_inner,
    grad_stride_outer,
    grad_stride_inner,
    LOG: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0)
    greedy, inverse = _row_temperature(row_temperature_ptr, row, temperature)
    g_ptr = _row_pointer(upstream_ptr, row, inner, upstream_stride_outer, upstream_stride_inner)
    y_ptr = _row_pointer(output_ptr, row, inner, stride_outer, stride_inner)
    dz_ptr = _row_pointer(grad_ptr, row, inner, grad_stride_outer, grad_stride_inner)
    none = -INF if LOG else 0.0  # of a forbidden token: selected, so its upstream is never used

    sums = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, vocab, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        g = tl.load(g_ptr + columns, mask=columns < vocab, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + columns, mask=columns < vocab, other=none).to(tl.float32)
        term = g + (y - y) if LOG else g * y  # a NaN in y stays
        sums += tl.where(y == none, 0.0, term)
    dot = tl.sum(sums, 0)

    by_temperature = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, vocab, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        g = tl.load(g_ptr + columns, mask=columns < vocab, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + columns, mask=columns < vocab, other=none).to(tl.float32)
        allowed = y != none
        # tl.maximum drops the NaN of an invalid row, `dot` is NaN then too
        p = tl.exp2(tl.maximum(y * LOG2E, LOWEST_EXPONENT)) if LOG else y
        dy = g - p * dot if LOG else p * (g - dot)
        # an output that is not NaN in a greedy row: no gradient
        dy = tl.where(allowed & ((y != y) | (not greedy)), dy, 0.0)
        if grad_temperature_ptr is not None:
            log_p = y if LOG else tl.log2(y) * LN2
            by_temperature += tl.where(allowed & ((dy != 0.0) | (y != y)), dy * log_p, 0.0)
        dz = dy * inverse
        tl.store(dz_ptr + columns, dz.to(grad_ptr.dtype.element_ty), mask=columns < vocab)
    if grad_temperature_ptr is not None:
        tl.store(grad_temperature_ptr + row, -inverse * tl.sum(by_temperature, 0))


def temperature_softmax(
    logits: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    log: bool,
    dtype: torch.dtype,
) -> Tensor:
    out = logits.new_empty(logits.shape, dtype=dtype)
    temperature_softmax_out(logits, temperature, row_temperature, log, out)
    return out


def temperature_softmax_out(
    logits: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    log: bool,
    out: Tensor,
) -> None:
    outer, inner, vocab = logits.shape
    if outer * inner == 0:
        return
    vector = vector_size(logits.dtype)
    block, warps = block_and_warps(vocab, logits.dtype, vectors=2)
    with on_device(logits):
        _temperature_softmax_fwd_kernel[(outer * inner,)](
            logits,
            row_temperature,
            out,
            temperature,
            inner,
            vocab,
            *logits.stride()[:2],
            *out.stride()[:2],
            LOG=log,
            LANES=block // vector,
            VECTOR=vector,
            num_warps=warps,
        )


def temperature_softmax_backward(
    grad: Tensor,
    output: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    log: bool,
    dtype: torch.dtype,
    temperature_gradient: bool,
) -> tuple[Tensor, Tensor]:
    outer, inner, vocab = output.shape
    grad_logits = output.new_empty(output.shape, dtype=dtype)
    rows = (outer, inner) if temperature_gradient else (0, 0)
    grad_temperature = output.new_empty(rows, dtype=torch.float32)
    if outer * inner == 0:
        return grad_logits, grad_temperature
    block, warps = block_and_warps(vocab, output.dtype, vectors=2)
    with on_device(output):
        _temperature_softmax_bwd_kernel[(outer * inner,)](
            grad,
            output,
            row_temperature,
            grad_logits,
            grad_temperature if temperature_gradient else None,
            temperature,
            inner,
            vocab,
            *grad.stride()[:2],
            *output.stride()[:2],
            *grad_logits.stride()[:2],
            LOG=log,
            BLOCK_V=block,
            num_warps=warps,
        )
    return grad_logits, grad_temperature
