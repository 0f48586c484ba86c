"""linear_token_logprobs: what is done with one tile of logits, hidden W^T, between two matmuls of
the library.

    logits [rows, columns] float32, columns first ... of the vocabulary
    z = softcap(scale (logits + bias)),  softcap(u) = cap tanh(u / cap)
    running [4, rows] = (max, sum, weighted, target logit), in: of the columns before; out: with
    these. scores [3, rows] = (log-prob, entropy, logsumexp) of the columns so far
    grad [rows, columns] = d/dlogits, in the dtype of the operands

Forward reads the tile once and writes 28 bytes a row; backward reads 4 bytes a logit and writes one
element of ``grad``. Forward: one program a row. Backward: programs over (row, block of columns).
Limits: fewer than 2^31 rows and columns; 16-byte accesses need strides that are multiples of 16,
which those of pyllmtune/ops/linear_tiles.py are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INF, LN2, LOG2E, block_and_warps, device_function, on_device, vector_size
from .row_stats import finish, fold, gradient, join_lanes, shift_to


@device_function
def _tanh(x):
    """Cephes' polynomial near 0, where 1 - 2 / (e^2x + 1) loses its digits."""
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    square = x * x
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    return tl.where(size < 0.625, x + x * square * p, tl.where(x < 0.0, -far, far))


@device_function
def _processed(x, bias_ptr, columns, inside, scale, softcap, CAPPED: tl.constexpr):
    """z of raw logits at ``columns``."""
    if bias_ptr is not None:
        x += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    x *= scale
    if CAPPED:
        x = softcap * _tanh(x / softcap)
    return x


@triton.jit
def _linear_token_logprobs_tile_kernel(
    logits_ptr,
    bias_ptr,
    tokens_ptr,
    row_temperature_ptr,
    running_ptr,
    scores_ptr,
    scale,
    softcap,
    temperature,
    first,
    rows,
    columns,
    stride,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    CAPPED: tl.constexpr,
):
    row = tl.program_id(0)
    if row_temperature_ptr is not None:
        temperature = tl.load(row_temperature_ptr + row)
    inv_temperature = 1.0 / temperature
    bits_per_logit = inv_temperature * LOG2E
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    tile = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]  # [LANES, VECTOR]
    top = tl.full([LANES], -INF, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)  # exponents in bits
    for start in range(0, columns, LANES * VECTOR):
        at = start + tile
        inside = at < columns
        z = tl.load(row_ptr + at, mask=inside, other=0.0)
        z = _processed(z, bias_ptr, at, inside, scale, softcap, CAPPED)
        z = tl.where(inside, z, -INF)
        top, total, weighted = fold(top, total, weighted, z, bits_per_logit)
    tile_top, tile_total, tile_weighted = join_lanes(top, total, weighted, bits_per_logit)

    running_ptr += row
    scores_ptr += row
    old_top = tl.load(running_ptr)
    row_top = tl.maximum(old_top, tile_top)
    shift = shift_to(row_top, old_top, bits_per_logit)
    tile_shift = shift_to(row_top, tile_top, bits_per_logit)
    factor = tl.exp2(shift)
    tile_factor = tl.exp2(tile_shift)
    old_total = tl.load(running_ptr + rows)
    row_total = factor * old_total + tile_factor * tile_total
    row_weighted = factor * (tl.load(running_ptr + 2 * rows) + shift * LN2 * old_total)
    row_weighted += tile_factor * (tile_weighted + tile_shift * LN2 * tile_total)
    token = tl.load(tokens_ptr + row) - first
    here = (token >= 0) & (token < columns)
    target = tl.load(row_ptr + token, mask=here, other=0.0)
    target = _processed(target, bias_ptr, token, here, scale, softcap, CAPPED)
    target = tl.where(here, target, tl.load(running_ptr + 3 * rows))
    # not seen yet; in the end: there is no such token
    seen_total = tl.where(target == target, row_total, float("nan"))
    logprob, entropy, logsumexp, _ = finish(
        row_top, seen_total, row_weighted, target, inv_temperature
    )
    tl.store(running_ptr, row_top)
    tl.store(running_ptr + rows, row_total)
    tl.store(running_ptr + 2 * rows, row_weighted)
    tl.store(running_ptr + 3 * rows, target)
    tl.store(scores_ptr, logprob)
    tl.store(scores_ptr + rows, entropy)
    tl.store(scores_ptr + 2 * rows, logsumexp)


@triton.jit
def _linear_token_logprobs_tile_bwd_kernel(
    logits_ptr,
    bias_ptr,
    tokens_ptr,
    row_temperature_ptr,
    stats_ptr,
    upstream_ptr,
    grad_ptr,
    scale,
    softcap,
    temperature,
    first,
    rows,
    columns,
    stride,
    grad_stride,
    BLOCK_V: tl.constexpr,
    CAPPED: tl.constexpr,
):
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)  # [BLOCK_V]
    inside = at < columns
    dz_ptr = grad_ptr + row.to(tl.int64) * grad_stride + at
    top = tl.load(stats_ptr + row)
    total = tl.load(stats_ptr + rows + row)
    if (top == -INF) & (total == 0.0):  # nothing is allowed
        tl.store(dz_ptr, tl.zeros([BLOCK_V], grad_ptr.dtype.element_ty), mask=inside)
        return
    if row_temperature_ptr is not None:
        temperature = tl.load(row_temperature_ptr + row)
    inv_temperature = 1.0 / temperature
    g = tl.load(upstream_ptr + row)
    h = tl.load(upstream_ptr + rows + row)
    q = tl.load(upstream_ptr + 2 * rows + row)
    constant = (q - g - h * tl.load(stats_ptr + 2 * rows + row)) * inv_temperature
    slope = -h * inv_temperature * LN2  # per bit
    z = tl.load(logits_ptr + row.to(tl.int64) * stride + at, mask=inside, other=0.0)
    z = _processed(z, bias_ptr, at, inside, scale, softcap, CAPPED)
    dz = gradient(z, top, tl.log(total), inv_temperature, constant, slope)
    dz += tl.where(at == tl.load(tokens_ptr + row) - first, g * inv_temperature, 0.0)
    dz *= scale
    if CAPPED:
        dz *= 1.0 - (z / softcap) * (z / softcap)
    tl.store(dz_ptr, dz.to(grad_ptr.dtype.element_ty), mask=inside)


def linear_token_logprobs_tile(
    logits: Tensor,
    first: int,
    scale: float,
    softcap: float,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    running: Tensor,
    scores: Tensor,
) -> None:
    rows, columns = logits.shape
    if rows == 0:
        return
    vector = vector_size(torch.float32)
    block, warps = block_and_warps(columns, torch.float32, vectors=2)
    with on_device(logits):
        _linear_token_logprobs_tile_kernel[(rows,)](
            *(logits, bias, tokens, row_temperature, running, scores),
            *(scale, softcap, temperature, first, rows, columns, logits.stride(0)),
            LANES=block // vector,
            VECTOR=vector,
            CAPPED=softcap > 0.0,
            num_warps=warps,
        )


def linear_token_logprobs_tile_backward(
    logits: Tensor,
    first: int,
    scale: float,
    softcap: float,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    stats: Tensor,
    upstream: Tensor,
    grad: Tensor,
) -> None:
    rows, columns = logits.shape
    if rows == 0:
        return
    block, warps = block_and_warps(columns, grad.dtype, vectors=2)
    with on_device(logits):
        _linear_token_logprobs_tile_bwd_kernel[(rows, triton.cdiv(columns, block))](
            *(logits, bias, tokens, row_temperature, stats, upstream, grad),
            *(scale, softcap, temperature, first, rows, columns, logits.stride(0), grad.stride(0)),
            BLOCK_V=block,
            CAPPED=softcap > 0.0,
            num_warps=warps,
        )
