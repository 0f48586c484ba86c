"""token_logprobs: log-prob of one token a row, entropy and logsumexp; and their gradient.

    logits [outer, inner, V] -> logprobs, entropy, logsumexp [outer, inner],
                                stats [2, outer, inner] = (max, log S)
    dz_j = p_j (constant + slope log p_j) + 1[j = y] at_target     (csrc/math/online_softmax.h)

Forward reads V elements a row, the target once more, and writes 20 bytes; backward reads V and
writes V, or only writes where a row has no upstream gradient. Forward: one program a row. The row
is folded into a tile of lanes, one 16-byte load each; a lane keeps its own (max, sum, weighted), so
nothing crosses threads before the row ends. Backward: programs over (row, block of V).
Limits: V < 2^27, fewer than 2^31 rows; 16-byte loads need V and strides that are multiples of 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INF, LN2, LOG2E, as_bytes, block_and_warps, on_device, vector_size
from .row_stats import finish, fold, gradient, join_lanes


@triton.jit
def _row_pointer(logits_ptr, row, inner, stride_outer, stride_inner):
    return (
        logits_ptr
        + (row // inner).to(tl.int64) * stride_outer
        + (row % inner).to(tl.int64) * stride_inner
    )


@triton.jit
def _token_logprobs_fwd_kernel(
    logits_ptr,
    tokens_ptr,
    row_temperature_ptr,
    mask_ptr,
    logprobs_ptr,
    entropy_ptr,
    logsumexp_ptr,
    stats_ptr,
    temperature,
    rows,
    inner,
    vocab,
    stride_outer,
    stride_inner,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0)
    if mask_ptr is not None:  # noqa: SIM102  known when compiled, and without it nothing to load
        if tl.load(mask_ptr + row) == 0:
            tl.store(logprobs_ptr + row, 0.0)
            tl.store(entropy_ptr + row, 0.0)
            tl.store(logsumexp_ptr + row, 0.0)
            tl.store(stats_ptr + row, 0.0)
            tl.store(stats_ptr + rows + row, 0.0)
            return
    if row_temperature_ptr is not None:
        temperature = tl.load(row_temperature_ptr + row)
    inv_temperature = 1.0 / temperature
    bits_per_logit = inv_temperature * LOG2E
    z_ptr = _row_pointer(logits_ptr, row, inner, stride_outer, stride_inner)
    token = tl.load(tokens_ptr + row)
    exists = (token >= 0) & (token < vocab)
    target = tl.load(z_ptr + token, mask=exists, other=0.0).to(tl.float32)

    tile = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]  # [LANES, VECTOR]
    top = tl.full([LANES], -INF, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)  # exponents in bits
    for start in range(0, vocab, LANES * VECTOR):
        columns = start + tile
        z = tl.load(z_ptr + columns, mask=columns < vocab, other=-INF).to(tl.float32)
        top, total, weighted = fold(top, total, weighted, z, bits_per_logit)

    row_top, row_total, row_weighted = join_lanes(top, total, weighted, bits_per_logit)
    # a token that does not exist poisons its row
    row_total = tl.where(exists, row_total, float("nan"))
    logprob, entropy, logsumexp, log_sum = finish(
        row_top, row_total, row_weighted, target, inv_temperature
    )
    tl.store(logprobs_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)
    tl.store(logsumexp_ptr + row, logsumexp)
    tl.store(stats_ptr + row, row_top)
    tl.store(stats_ptr + rows + row, log_sum)


@triton.jit
def _token_logprobs_bwd_kernel(
    logits_ptr,
    grad_ptr,
    tokens_ptr,
    row_temperature_ptr,
    mask_ptr,
    entropy_ptr,
    stats_ptr,
    grad_logprobs_ptr,
    grad_entropy_ptr,
    grad_logsumexp_ptr,
    temperature,
    rows,
    inner,
    vocab,
    stride_outer,
    stride_inner,
    grad_stride_outer,
    grad_stride_inner,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)  # [BLOCK_V]
    inside = columns < vocab
    dz_ptr = _row_pointer(grad_ptr, row, inner, grad_stride_outer, grad_stride_inner) + columns
    top = tl.load(stats_ptr + row)
    log_sum = tl.load(stats_ptr + rows + row)
    g = tl.load(grad_logprobs_ptr + row)
    h = tl.load(grad_entropy_ptr + row)
    q = tl.load(grad_logsumexp_ptr + row)
    idle = ((g == 0.0) & (h == 0.0) & (q == 0.0)) | ((top == -INF) & (log_sum == 0.0))
    if mask_ptr is not None:
        idle = idle | (tl.load(mask_ptr + row) == 0)
    if idle:
        tl.store(dz_ptr, tl.zeros([BLOCK_V], grad_ptr.dtype.element_ty), mask=inside)
        return

    if row_temperature_ptr is not None:
        temperature = tl.load(row_temperature_ptr + row)
    inv_temperature = 1.0 / temperature
    constant = (q - g - h * tl.load(entropy_ptr + row)) * inv_temperature
    slope = -h * inv_temperature * LN2  # per bit
    z_ptr = _row_pointer(logits_ptr, row, inner, stride_outer, stride_inner) + columns
    z = tl.load(z_ptr, mask=inside, other=0.0).to(tl.float32)
    dz = gradient(z, top, log_sum, inv_temperature, constant, slope)
    dz += tl.where(columns == tl.load(tokens_ptr + row), g * inv_temperature, 0.0)
    tl.store(dz_ptr, dz.to(grad_ptr.dtype.element_ty), mask=inside)


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    mask: Tensor | None,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outer, inner, vocab = logits.shape
    logprobs, entropy, logsumexp = (
        logits.new_empty(outer, inner, dtype=torch.float32) for _ in range(3)
    )
    stats = logits.new_empty(2, outer, inner, dtype=torch.float32)
    if outer * inner == 0:
        return logprobs, entropy, logsumexp, stats
    vector = vector_size(logits.dtype)
    block, warps = block_and_warps(vocab, logits.dtype, vectors=2)
    with on_device(logits):
        _token_logprobs_fwd_kernel[(outer * inner,)](
            logits,
            tokens,
            row_temperature,
            as_bytes(mask),
            logprobs,
            entropy,
            logsumexp,
            stats,
            temperature,
            outer * inner,
            inner,
            vocab,
            *logits.stride()[:2],
            LANES=block // vector,
            VECTOR=vector,
            num_warps=warps,
        )
    return logprobs, entropy, logsumexp, stats


def _gradient_into(
    grad: Tensor,
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    mask: Tensor | None,
    *per_row: Tensor,
) -> None:
    outer, inner, vocab = logits.shape
    if outer * inner == 0:
        return
    block, warps = block_and_warps(vocab, logits.dtype, vectors=4)
    with on_device(logits):
        _token_logprobs_bwd_kernel[(outer * inner, triton.cdiv(vocab, block))](
            logits,
            grad,
            tokens,
            row_temperature,
            as_bytes(mask),
            *per_row,
            temperature,
            outer * inner,
            inner,
            vocab,
            *logits.stride()[:2],
            *grad.stride()[:2],
            BLOCK_V=block,
            num_warps=warps,
        )


def token_logprobs_backward(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    mask: Tensor | None,
    entropy: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    grad_logsumexp: Tensor,
) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    upstream = (entropy, stats, grad_logprobs, grad_entropy, grad_logsumexp)
    _gradient_into(grad, logits, tokens, temperature, row_temperature, mask, *upstream)
    return grad


def token_logprobs_backward_inplace(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    mask: Tensor | None,
    entropy: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    grad_logsumexp: Tensor,
) -> None:
    upstream = (entropy, stats, grad_logprobs, grad_entropy, grad_logsumexp)
    _gradient_into(logits, logits, tokens, temperature, row_temperature, mask, *upstream)
