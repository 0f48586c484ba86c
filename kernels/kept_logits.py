"""kept_logits: logits of kept tokens alone, straight from hidden states: a dot product for each.

    hidden [rows, D], weight [V, D], offsets [rows + 1], token_ids [entries] -> logits [entries]
    logits_e = <hidden_row(e), weight_id(e)>
    dhidden_i = sum over row i of g_e weight_id(e); dweight_v = sum over id v of g_e hidden_row(e)

Moves a row of D of the weight for each entry, and in backward again; dweight holds zeros, and of it
the rows of kept ids are written. Sums are float32, rounded once, in the order of entries: the same
bits in any batch. Entries whose gradient is 0 are not read: a row that was masked may hold NaN.
Forward: one program a row, BLOCK_E entries at a time. Backward: programs over (row or id, columns).
Limits: an id that occurs in every row is work for one program a column block in dweight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import as_bytes, block_and_warps, on_device

BLOCK_E, BLOCK_D, WARPS = 4, 512, 4  # forward: a warp an entry, four 16-byte loads of float32


@triton.jit
def _kept_logits_fwd_kernel(
    hidden_ptr,
    weight_ptr,
    offsets_ptr,
    token_ids_ptr,
    mask_ptr,
    logits_ptr,
    entries,
    vocab,
    size,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # clamped: offsets on a GPU are not checked, and must not lead outside the entries
    begin = tl.maximum(tl.load(offsets_ptr + row), 0)
    end = tl.minimum(tl.load(offsets_ptr + row + 1), entries)
    selected = row >= 0
    if mask_ptr is not None:
        selected = tl.load(mask_ptr + row) != 0
    for start in range(begin, end, BLOCK_E):
        entry = start + tl.arange(0, BLOCK_E)  # [BLOCK_E]
        own = entry < end
        ids = tl.load(token_ids_ptr + entry, mask=own, other=0).to(tl.int64)
        exists = own & (ids >= 0) & (ids < vocab) & selected
        total = tl.zeros([BLOCK_E], tl.float32)
        for first in range(0, size, BLOCK_D):
            columns = first + tl.arange(0, BLOCK_D)  # [BLOCK_D]
            inside = (columns < size) & selected
            h = tl.load(hidden_ptr + row * size + columns, mask=inside, other=0.0).to(tl.float32)
            w_ptr = weight_ptr + (ids * size)[:, None] + columns[None, :]
            w = tl.load(w_ptr, mask=exists[:, None] & inside[None, :], other=0.0).to(tl.float32)
            total += tl.sum(h[None, :] * w, 1)
        total = tl.where(exists | ~selected, total, float("nan"))
        tl.store(logits_ptr + entry, total, mask=own)


@triton.jit
def _kept_logits_bwd_hidden_kernel(
    grad_ptr,
    weight_ptr,
    offsets_ptr,
    token_ids_ptr,
    out_ptr,
    entries,
    vocab,
    size,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = columns < size
    begin = tl.maximum(tl.load(offsets_ptr + row), 0)
    end = tl.minimum(tl.load(offsets_ptr + row + 1), entries)
    total = tl.zeros([BLOCK_D], tl.float32)
    for entry in range(begin, end):
        g = tl.load(grad_ptr + entry)
        token = tl.load(token_ids_ptr + entry).to(tl.int64)
        if (g != 0.0) & (token >= 0) & (token < vocab):
            w_ptr = weight_ptr + token * size + columns
            total += g * tl.load(w_ptr, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * size + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _kept_logits_bwd_weight_kernel(
    grad_ptr,
    rows_ptr,
    token_ids_ptr,
    hidden_ptr,
    out_ptr,
    entries,
    vocab,
    size,
    BLOCK_D: tl.constexpr,
):
    """Entries by token, token_ids ascending: the first of an id does all. ``out`` holds zeros."""
    entry = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids_ptr + entry)
    previous = tl.load(token_ids_ptr + entry - 1, mask=entry > 0, other=-1)
    if (token == previous) | (token < 0) | (token >= vocab):
        return
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = columns < size
    total = tl.zeros([BLOCK_D], tl.float32)
    same = token
    while same == token:
        g = tl.load(grad_ptr + entry)
        if g != 0.0:
            h_ptr = hidden_ptr + tl.load(rows_ptr + entry) * size + columns
            total += g * tl.load(h_ptr, mask=inside, other=0.0).to(tl.float32)
        entry += 1
        same = tl.load(token_ids_ptr + entry, mask=entry < entries, other=-1)
    own_ptr = out_ptr + token.to(tl.int64) * size + columns
    tl.store(own_ptr, total.to(out_ptr.dtype.element_ty), mask=inside)


def kept_logits(
    hidden: Tensor, weight: Tensor, offsets: Tensor, token_ids: Tensor, mask: Tensor | None
) -> Tensor:
    entries, (vocab, size) = token_ids.shape[0], weight.shape
    logits = hidden.new_empty(entries, dtype=torch.float32)
    if entries == 0:
        return logits
    with on_device(hidden):
        _kept_logits_fwd_kernel[(hidden.shape[0],)](
            *(hidden, weight, offsets, token_ids, as_bytes(mask), logits, entries, vocab, size),
            BLOCK_E=BLOCK_E,
            BLOCK_D=BLOCK_D,
            num_warps=WARPS,
        )
    return logits


def kept_logits_backward_hidden(
    grad: Tensor, weight: Tensor, offsets: Tensor, token_ids: Tensor
) -> Tensor:
    rows, (vocab, size) = offsets.shape[0] - 1, weight.shape
    out = weight.new_empty(rows, size)
    if rows == 0:
        return out
    block, warps = block_and_warps(size, weight.dtype, vectors=1)
    with on_device(weight):
        _kept_logits_bwd_hidden_kernel[(rows, triton.cdiv(size, block))](
            *(grad, weight, offsets, token_ids, out, token_ids.shape[0], vocab, size),
            BLOCK_D=block,
            num_warps=warps,
        )
    return out


def kept_logits_backward_weight(
    grad: Tensor, rows: Tensor, token_ids: Tensor, hidden: Tensor, weight: Tensor
) -> Tensor:
    entries, (vocab, size) = token_ids.shape[0], weight.shape
    out = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    if entries == 0:
        return out
    block, warps = block_and_warps(size, weight.dtype, vectors=1)
    with on_device(weight):
        _kept_logits_bwd_weight_kernel[(entries, triton.cdiv(size, block))](
            *(grad, rows, token_ids, hidden, out, entries, vocab, size),
            BLOCK_D=block,
            num_warps=warps,
        )
    return out
