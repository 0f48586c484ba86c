"""kl_divergence: exact divergence of two rows of logits over the vocabulary; and its gradient.

    logits, ref_logits [outer, inner, V] -> divergence [outer, inner], stats [6, outer, inner] =
    (top, log S, ref_top, log(S'/S), KL(p || .), KL(q || .))          (csrc/math/divergence.h)
    weight 0: KL(p || q);  W: (1 - W) KL(p || m) + W KL(q || m), m = (1 - W) p + W q
    dz_j  = p_j (log(p_j/q_j) - KL) / T,  dz'_j = (q_j - p_j) / T
    of the mixture: dz_j = (1 - W) p_j (log(p_j/m_j) - KL(p || m)) / T,  dz'_j alike with W and q

Forward reads 2V elements a row and writes 28 bytes; the mixture needs both normalisers first and
reads the rows again, from the second-level cache if those in flight fit it. Backward reads 2V and
writes V for each gradient that is wanted, or only writes where a row has none. Forward: one program
a row. The rows are folded into a tile of lanes, one 16-byte load of each a lane, and a lane keeps
its own sums, so nothing crosses threads before the row ends. Backward: programs over (row, block of
V).
Limits: V < 2^27, fewer than 2^31 rows; 16-byte loads need V and strides that are multiples of 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INF, LOG2E, WARP, as_bytes, block_and_warps, on_device, vector_size
from .divergence_math import (
    kl_gradient,
    kl_ref_gradient,
    logit_gap,
    mixed_token,
    pair_terms,
    rebase,
    row_divergence,
)


@triton.jit
def _row_pointer(ptr, row, inner, stride_outer, stride_inner):
    return (
        ptr + (row // inner).to(tl.int64) * stride_outer + (row % inner).to(tl.int64) * stride_inner
    )


@triton.jit
def _store_stats(stats_ptr, rows, row, top, log_sum, ref_top, log_ratio, p_side, q_side):
    tl.store(stats_ptr + row, top)
    tl.store(stats_ptr + rows + row, log_sum)
    tl.store(stats_ptr + 2 * rows + row, ref_top)
    tl.store(stats_ptr + 3 * rows + row, log_ratio)
    tl.store(stats_ptr + 4 * rows + row, p_side)
    tl.store(stats_ptr + 5 * rows + row, q_side)


@triton.jit
def _kl_divergence_fwd_kernel(
    logits_ptr,
    ref_logits_ptr,
    row_temperature_ptr,
    mask_ptr,
    divergence_ptr,
    stats_ptr,
    temperature,
    weight,
    rows,
    inner,
    vocab,
    stride_outer,
    stride_inner,
    ref_stride_outer,
    ref_stride_inner,
    MIXTURE: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0)
    if mask_ptr is not None:  # noqa: SIM102  known when compiled, and without it nothing to load
        if tl.load(mask_ptr + row) == 0:
            tl.store(divergence_ptr + row, 0.0)
            _store_stats(stats_ptr, rows, row, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
            return
    if row_temperature_ptr is not None:
        temperature = tl.load(row_temperature_ptr + row)
    inverse = 1.0 / temperature
    z_ptr = _row_pointer(logits_ptr, row, inner, stride_outer, stride_inner)
    r_ptr = _row_pointer(ref_logits_ptr, row, inner, ref_stride_outer, ref_stride_inner)

    tile = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]  # [LANES, VECTOR]
    top = tl.full([LANES], -INF, tl.float32)
    ref_top = tl.full([LANES], -INF, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    ref_total = tl.zeros([LANES], tl.float32)
    moment = tl.zeros([LANES], tl.float32)
    residual = tl.zeros([LANES], tl.float32)
    lowest = tl.full([LANES], INF, tl.float32)
    for start in range(0, vocab, LANES * VECTOR):
        columns = start + tile
        z = tl.load(z_ptr + columns, mask=columns < vocab, other=-INF).to(tl.float32)
        r = tl.load(r_ptr + columns, mask=columns < vocab, other=-INF).to(tl.float32)
        new_top = tl.maximum(top, tl.max(z, 1))
        new_ref_top = tl.maximum(ref_top, tl.max(r, 1))
        total, ref_total, moment, residual = rebase(
            top, ref_top, total, ref_total, moment, residual, new_top, new_ref_top, inverse
        )
        top = new_top
        ref_top = new_ref_top
        # tl.max drops a NaN, but NaN - base is NaN and stays in a total; +inf becomes inf - inf
        base = tl.where(top == -INF, 0.0, top)
        ref_base = tl.where(ref_top == -INF, 0.0, ref_top)
        w = tl.exp2((z - base[:, None]) * (inverse * LOG2E))
        ref_w = tl.exp2((r - ref_base[:, None]) * (inverse * LOG2E))
        v = logit_gap(z, r, base[:, None], ref_base[:, None]) * inverse
        weighted, rest = pair_terms(w, ref_w, v)
        total += tl.sum(w, 1)
        ref_total += tl.sum(ref_w, 1)
        moment += tl.sum(weighted, 1)
        residual += tl.sum(rest, 1)
        lowest = tl.minimum(lowest, tl.min(tl.where(v == v, v, INF), 1))

    row_top = tl.max(top, 0)
    row_ref_top = tl.max(ref_top, 0)
    total, ref_total, moment, residual = rebase(
        top, ref_top, total, ref_total, moment, residual, row_top, row_ref_top, inverse
    )
    row_top, log_sum, row_ref_top, log_ratio, value = row_divergence(
        row_top,
        row_ref_top,
        tl.sum(total, 0),
        tl.sum(ref_total, 0),
        tl.sum(moment, 0),
        tl.sum(residual, 0),
        tl.min(lowest, 0),
        MIXTURE,
    )
    p_side = value
    q_side = 0.0
    if MIXTURE:
        p_sum = tl.zeros([LANES], tl.float32)
        q_sum = tl.zeros([LANES], tl.float32)
        for start in range(0, vocab, LANES * VECTOR):
            columns = start + tile
            z = tl.load(z_ptr + columns, mask=columns < vocab, other=-INF).to(tl.float32)
            r = tl.load(r_ptr + columns, mask=columns < vocab, other=-INF).to(tl.float32)
            _, _, _, _, p_term, q_term = mixed_token(
                z, r, row_top, log_sum, row_ref_top, log_ratio, inverse, weight
            )
            p_sum += tl.sum(p_term, 1)
            q_sum += tl.sum(q_term, 1)
        closed = row_top == -INF  # nothing to compare: what was added up is of no use
        p_side = tl.where(closed, value, tl.sum(p_sum, 0))
        q_side = tl.where(closed, value, tl.sum(q_sum, 0))
        value = (1.0 - weight) * p_side + weight * q_side
    tl.store(divergence_ptr + row, value)
    _store_stats(stats_ptr, rows, row, row_top, log_sum, row_ref_top, log_ratio, p_side, q_side)


@triton.jit
def _kl_divergence_bwd_kernel(
    logits_ptr,
    ref_logits_ptr,
    grad_ptr,
    ref_grad_ptr,
    row_temperature_ptr,
    mask_ptr,
    stats_ptr,
    upstream_ptr,
    temperature,
    weight,
    rows,
    inner,
    vocab,
    stride_outer,
    stride_inner,
    ref_stride_outer,
    ref_stride_inner,
    MIXTURE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)  # [BLOCK_V]
    inside = columns < vocab
    offset = row.to(tl.int64) * vocab + columns  # the gradients are contiguous
    upstream = tl.load(upstream_ptr + row)
    top = tl.load(stats_ptr + row)
    idle = (upstream == 0.0) | (top == -INF)
    if mask_ptr is not None:
        idle = idle | (tl.load(mask_ptr + row) == 0)
    if idle:
        zeros = tl.zeros([BLOCK_V], logits_ptr.dtype.element_ty)
        if grad_ptr is not None:
            tl.store(grad_ptr + offset, zeros, mask=inside)
        if ref_grad_ptr is not None:
            tl.store(ref_grad_ptr + offset, zeros, mask=inside)
        return

    if row_temperature_ptr is not None:
        temperature = tl.load(row_temperature_ptr + row)
    inverse = 1.0 / temperature
    log_sum = tl.load(stats_ptr + rows + row)
    ref_top = tl.load(stats_ptr + 2 * rows + row)
    log_ratio = tl.load(stats_ptr + 3 * rows + row)
    p_side = tl.load(stats_ptr + 4 * rows + row)
    z_ptr = _row_pointer(logits_ptr, row, inner, stride_outer, stride_inner) + columns
    r_ptr = _row_pointer(ref_logits_ptr, row, inner, ref_stride_outer, ref_stride_inner) + columns
    z = tl.load(z_ptr, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(r_ptr, mask=inside, other=0.0).to(tl.float32)
    scale = upstream * inverse
    if MIXTURE:
        q_side = tl.load(stats_ptr + 5 * rows + row)
        p, q, log_m_p, log_m_q, _, _ = mixed_token(
            z, r, top, log_sum, ref_top, log_ratio, inverse, weight
        )
        dz = p * (0.0 - log_m_p - p_side) * ((1.0 - weight) * scale)
        dr = q * (0.0 - log_m_q - q_side) * (weight * scale)
    else:
        p = tl.exp2((z - top) * (inverse * LOG2E) - log_sum * LOG2E)
        q = tl.exp2((r - ref_top) * (inverse * LOG2E) - (log_sum + log_ratio) * LOG2E)
        d = logit_gap(z, r, top, ref_top) * inverse - log_ratio
        dz = kl_gradient(p, d, p_side) * scale
        dr = kl_ref_gradient(p, q, d) * scale
    if grad_ptr is not None:
        tl.store(grad_ptr + offset, dz.to(logits_ptr.dtype.element_ty), mask=inside)
    if ref_grad_ptr is not None:
        tl.store(ref_grad_ptr + offset, dr.to(logits_ptr.dtype.element_ty), mask=inside)


def kl_divergence(
    logits: Tensor,
    ref_logits: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    mask: Tensor | None,
    js_weight: float,
) -> tuple[Tensor, Tensor]:
    outer, inner, vocab = logits.shape
    divergence = logits.new_empty(outer, inner, dtype=torch.float32)
    stats = logits.new_empty(6, outer, inner, dtype=torch.float32)
    if outer * inner == 0:
        return divergence, stats
    block, warps = block_and_warps(vocab, logits.dtype, vectors=1)
    # a thread's registers hold eight pairs, but not eight pairs and their mixtures
    vector = min(4, vector_size(logits.dtype)) if js_weight else vector_size(logits.dtype)
    with on_device(logits):
        _kl_divergence_fwd_kernel[(outer * inner,)](
            logits,
            ref_logits,
            row_temperature,
            as_bytes(mask),
            divergence,
            stats,
            temperature,
            js_weight,
            outer * inner,
            inner,
            vocab,
            *logits.stride()[:2],
            *ref_logits.stride()[:2],
            MIXTURE=js_weight != 0.0,
            LANES=min(block // vector, WARP * warps),
            VECTOR=vector,
            num_warps=warps,
        )
    return divergence, stats


def kl_divergence_backward(
    logits: Tensor,
    ref_logits: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    mask: Tensor | None,
    js_weight: float,
    stats: Tensor,
    grad: Tensor,
    logits_gradient: bool,
    ref_gradient: bool,
) -> tuple[Tensor, Tensor]:
    outer, inner, vocab = logits.shape
    grads = [
        logits.new_empty(logits.shape if wanted else (0, 0, 0))
        for wanted in (logits_gradient, ref_gradient)
    ]
    if outer * inner == 0:
        return grads[0], grads[1]
    block, warps = block_and_warps(vocab, logits.dtype, vectors=2)
    with on_device(logits):
        _kl_divergence_bwd_kernel[(outer * inner, triton.cdiv(vocab, block))](
            logits,
            ref_logits,
            grads[0] if logits_gradient else None,
            grads[1] if ref_gradient else None,
            row_temperature,
            as_bytes(mask),
            stats,
            grad,
            temperature,
            js_weight,
            outer * inner,
            inner,
            vocab,
            *logits.stride()[:2],
            *ref_logits.stride()[:2],
            MIXTURE=js_weight != 0.0,
            BLOCK_V=block,
            num_warps=warps,
        )
    return grads[0], grads[1]
