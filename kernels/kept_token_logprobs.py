"""kept_token_logprobs: token_logprobs over the tokens that a sampler kept, row by row.

    logits [outer, inner, V], or [entries] of the kept tokens alone; offsets [rows + 1], token_ids
    [entries] -> logprobs, entropy, logsumexp [rows], stats [2, rows] = (max, log S)
    sums run over the set, and p is 0 outside it; a token outside its set has the logit -inf

Forward reads a logit and 4 bytes of id an entry; backward reads both again and writes an element of
a gradient that holds zeros; rows without upstream gradient read their scalars. One program a row, a
lane takes every 128th entry: a row has the same bits in any batch.
Limits: one program reads a whole row. Offsets and ids that lead outside turn their row into NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INF, LN2, LOG2E, as_bytes, on_device
from .row_stats import finish, fold, gradient, join_lanes

BLOCK, WARPS = 128, 1  # sets of tens of tokens: a warp, four entries a lane


@triton.jit
def _bounds(offsets_ptr, row, entries):
    """Begin and end of a row, and whether they lie within the entries; else the row is empty."""
    begin = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    inside = (begin >= 0) & (begin <= end) & (end <= entries)
    return begin, tl.where(inside, end, begin), inside


@triton.jit
def _places(row, entry, ids, inner, stride_outer, stride_inner, FLAT: tl.constexpr):
    """Where the elements of a block of entries lie: in their row of V, or in a flat [entries]."""
    if FLAT:
        return entry
    outer_offset = (row // inner).to(tl.int64) * stride_outer
    return outer_offset + (row % inner).to(tl.int64) * stride_inner + ids


@triton.jit
def _kept_token_logprobs_fwd_kernel(
    logits_ptr,
    offsets_ptr,
    token_ids_ptr,
    tokens_ptr,
    row_temperature_ptr,
    mask_ptr,
    logprobs_ptr,
    entropy_ptr,
    logsumexp_ptr,
    stats_ptr,
    temperature,
    rows,
    entries,
    inner,
    vocab,
    stride_outer,
    stride_inner,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
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
    token = tl.load(tokens_ptr + row)
    begin, end, inside = _bounds(offsets_ptr, row, entries)

    top = tl.full([BLOCK], -INF, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)  # exponents in bits
    target = tl.full([BLOCK], -INF, tl.float32)
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        own = entry < end
        ids = tl.load(token_ids_ptr + entry, mask=own, other=0)
        exists = own & (ids >= 0) & (ids < vocab)
        place = _places(row, entry, ids, inner, stride_outer, stride_inner, FLAT)
        z = tl.load(logits_ptr + place, mask=exists, other=-INF).to(tl.float32)
        z = tl.where(own & ~exists, float("nan"), z)
        target = tl.where(own & (ids == token), z, target)
        top, total, weighted = fold(top, total, weighted, z[:, None], bits_per_logit)

    row_top, row_total, row_weighted = join_lanes(top, total, weighted, bits_per_logit)
    row_total = tl.where(inside, row_total, float("nan"))
    logprob, entropy, logsumexp, log_sum = finish(
        row_top, row_total, row_weighted, tl.max(target, 0), inv_temperature
    )
    tl.store(logprobs_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)
    tl.store(logsumexp_ptr + row, logsumexp)
    tl.store(stats_ptr + row, row_top)
    tl.store(stats_ptr + rows + row, log_sum)


@triton.jit
def _kept_token_logprobs_bwd_kernel(
    logits_ptr,
    grad_ptr,
    offsets_ptr,
    token_ids_ptr,
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
    entries,
    inner,
    vocab,
    stride_outer,
    stride_inner,
    grad_stride_outer,
    grad_stride_inner,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``grad`` holds zeros."""
    row = tl.program_id(0)
    top = tl.load(stats_ptr + row)
    log_sum = tl.load(stats_ptr + rows + row)
    g = tl.load(grad_logprobs_ptr + row)
    h = tl.load(grad_entropy_ptr + row)
    q = tl.load(grad_logsumexp_ptr + row)
    idle = ((g == 0.0) & (h == 0.0) & (q == 0.0)) | ((top == -INF) & (log_sum == 0.0))
    if mask_ptr is not None:
        idle = idle | (tl.load(mask_ptr + row) == 0)
    if idle:
        return

    if row_temperature_ptr is not None:
        temperature = tl.load(row_temperature_ptr + row)
    inv_temperature = 1.0 / temperature
    constant = (q - g - h * tl.load(entropy_ptr + row)) * inv_temperature
    slope = -h * inv_temperature * LN2  # per bit
    token = tl.load(tokens_ptr + row)
    begin, end, _ = _bounds(offsets_ptr, row, entries)
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        own = entry < end
        ids = tl.load(token_ids_ptr + entry, mask=own, other=0)
        exists = own & (ids >= 0) & (ids < vocab)
        place = _places(row, entry, ids, inner, stride_outer, stride_inner, FLAT)
        z = tl.load(logits_ptr + place, mask=exists, other=0.0).to(tl.float32)
        dz = gradient(z, top, log_sum, inv_temperature, constant, slope)
        dz += tl.where(ids == token, g * inv_temperature, 0.0)
        place = _places(row, entry, ids, inner, grad_stride_outer, grad_stride_inner, FLAT)
        tl.store(grad_ptr + place, dz.to(grad_ptr.dtype.element_ty), mask=exists)


def _sizes(logits: Tensor, rows: int, entries: int) -> tuple[int, ...]:
    """rows, entries, inner, vocab and the two strides of logits, as the kernels take them."""
    if logits.dim() == 1:
        return rows, entries, 1, 2**31 - 1, 0, 0
    return rows, entries, *logits.shape[1:], *logits.stride()[:2]


def kept_token_logprobs(
    logits: Tensor,
    offsets: Tensor,
    token_ids: Tensor,
    tokens: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, entries = tokens.shape[0], token_ids.shape[0]
    logprobs, entropy, logsumexp = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    stats = logits.new_empty(2, rows, dtype=torch.float32)
    if rows == 0:
        return logprobs, entropy, logsumexp, stats
    with on_device(logits):
        _kept_token_logprobs_fwd_kernel[(rows,)](
            *(logits, offsets, token_ids, tokens, row_temperature, as_bytes(mask)),
            *(logprobs, entropy, logsumexp, stats, temperature),
            *_sizes(logits, rows, entries),
            FLAT=logits.dim() == 1,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return logprobs, entropy, logsumexp, stats


def kept_token_logprobs_backward(
    logits: Tensor,
    offsets: Tensor,
    token_ids: Tensor,
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
    rows, entries = tokens.shape[0], token_ids.shape[0]
    grad = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    if rows == 0:
        return grad
    with on_device(logits):
        _kept_token_logprobs_bwd_kernel[(rows,)](
            *(logits, grad, offsets, token_ids, tokens, row_temperature, as_bytes(mask)),
            *(entropy, stats, grad_logprobs, grad_entropy, grad_logsumexp, temperature),
            *_sizes(logits, rows, entries),
            *_sizes(grad, rows, entries)[4:],
            FLAT=logits.dim() == 1,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return grad
