"""sample: filter, then invert the cumulative integer masses at one 64-bit uniform a draw.

    token = first i with  sum of w_j over kept j <= i  >  floor(u W / 2^64),   W = all kept mass

R rows of logits [outer, inner, V]; the results are those of the operator in _ops.py. One program a
row: row_filter.py finds where the kept tokens end and, in a peaked row, lists them; a sweep of that
list (or row) weighs them, and each draw sweeps for its tile of tokens, in order of id. Sums are of
integers, so neither tiles nor the batch can change a draw. A plain draw reads the row three times,
all but once from L2. Log-probs and ranks, and the kept ids, whose number the host must know, are
kernels of their own (sample_results.py).
Limits: V < 2^31, fewer than 2^31 rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyllmtune.reference.masses import mass_bits

from .common import as_bytes, device_function, on_device
from .masses import multiply_high, order_key, uniform_of
from .row_filter import (
    CAPACITY,
    NONE,
    ROWS_PER_LAUNCH,
    find_kept,
    fraction_bits,
    is_kept,
    launch_options,
    length_of,
    load_tokens,
    mass_of_key,
    new_lists,
    row_parameters,
)
from .sample_results import row_pointer, sample_kept_ids_kernel, sample_scores_kernel


@device_function
def _weigh_kept(source, scale, cut, BLOCK: tl.constexpr):
    """Mass and number of the kept tokens."""
    mass = tl.full([BLOCK], 0, tl.int64)
    number = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, length_of(source), BLOCK):
        keys, ids = load_tokens(source, start, BLOCK)
        kept = is_kept(keys, ids, cut)
        mass += tl.where(kept, mass_of_key(keys, scale), 0)
        number += kept.to(tl.int32)
    return tl.sum(mass, 0), tl.sum(number, 0)


@device_function
def _draw(source, scale, cut, target, BLOCK: tl.constexpr):
    """Id of the first token with more than ``target`` of kept mass up to and with it."""
    token = tl.full([], 0, tl.int32)
    before = tl.full([], 0, tl.int64)
    for start in range(0, length_of(source), BLOCK):
        keys, ids = load_tokens(source, start, BLOCK)
        mass = tl.where(is_kept(keys, ids, cut), mass_of_key(keys, scale), 0)
        here = tl.sum(mass, 0)
        if (before <= target) & (target < before + here):
            token = tl.min(tl.where(before + tl.cumsum(mass, 0) > target, ids, NONE), 0)
        before += here
    return token


@triton.jit
def _sample_fwd_kernel(
    logits_ptr,
    allowed_ptr,
    row_indices_ptr,
    lists_ptr,
    row_temperature_ptr,
    row_top_k_ptr,
    row_top_p_ptr,
    row_min_p_ptr,
    row_seed_ptr,
    row_position_ptr,
    tokens_ptr,
    valid_ptr,
    num_kept_ptr,
    cuts_ptr,
    temperature,
    top_k: tl.int64,
    fraction: tl.int64,
    min_p,
    seed: tl.int64,
    position: tl.int64,
    first_row,
    rows,
    logits_rows,
    inner,
    vocab,
    bits,
    num_samples,
    stride_outer,
    stride_inner,
    stride_allowed,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = first_row + tl.program_id(0)
    z_ptr, exists = row_pointer(
        row, logits_ptr, row_indices_ptr, logits_rows, inner, stride_outer, stride_inner
    )
    if allowed_ptr is not None:
        allowed_ptr += row.to(tl.int64) * stride_allowed
    list_ptr = lists_ptr + tl.program_id(0).to(tl.int64) * (2 * CAPACITY)
    parameters = row_parameters(
        row,
        temperature,
        row_temperature_ptr,
        top_k,
        row_top_k_ptr,
        fraction,
        row_top_p_ptr,
        min_p,
        row_min_p_ptr,
    )
    row_source = (z_ptr, allowed_ptr, tl.where(exists, vocab, 0), list_ptr, 0)
    _bad, valid, scale, cut, lengths = find_kept(row_source, parameters, bits, ORDER, BLOCK)
    source = (z_ptr, allowed_ptr, lengths[0], list_ptr, lengths[1])
    mass, number = _weigh_kept(source, scale, cut, BLOCK)
    tl.store(valid_ptr + row, valid.to(tl.uint8))
    tl.store(num_kept_ptr + row, number)
    if cuts_ptr is not None:  # for the kernels of sample_results.py
        tl.store(cuts_ptr + row, tl.where(valid, cut[0], NONE))
        tl.store(cuts_ptr + rows + row, cut[1])
        tl.store(cuts_ptr + 2 * rows + row, order_key(scale[0]))
    seed = tl.cast(seed, tl.int64)
    position = tl.cast(position, tl.int64)
    if row_seed_ptr is not None:
        seed = tl.load(row_seed_ptr + row)
    if row_position_ptr is not None:
        position = tl.load(row_position_ptr + row)
    tokens_ptr += row.to(tl.int64) * num_samples
    for sample in range(num_samples):
        uniform = uniform_of(seed, position, tl.cast(sample, tl.int64))
        target = multiply_high(uniform, mass.to(tl.uint64)).to(tl.int64)
        token = _draw(source, scale, cut, target, BLOCK)
        tl.store(tokens_ptr + sample, tl.where(valid, token, -1))


def sample(
    logits: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    top_k: int,
    row_top_k: Tensor | None,
    top_p: float,
    row_top_p: Tensor | None,
    min_p: float,
    row_min_p: Tensor | None,
    order: int,
    allowed: Tensor | None,
    row_indices: Tensor | None,
    num_samples: int,
    seed: int,
    row_seed: Tensor | None,
    position: int,
    row_position: Tensor | None,
    logprobs: bool,
    return_stats: bool,
    totals: bool,
    return_kept: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    outer, inner, vocab = logits.shape
    rows = outer * inner if row_indices is None else row_indices.shape[0]
    some = rows if return_stats else 0
    new = logits.new_empty
    tokens = new((rows, num_samples), dtype=torch.int64)
    valid = new(rows, dtype=torch.bool)
    scores = new((3 if logprobs else 0, rows, num_samples), dtype=torch.float32)
    rank = new((some, num_samples), dtype=torch.int64)
    num_kept = new(rows, dtype=torch.int64)
    kept_mass, entropy = new(some, dtype=torch.float32), new(some, dtype=torch.float32)
    scored = logprobs or return_stats
    cuts = new((3, rows), dtype=torch.int32) if scored or return_kept else None
    kept_ids = new(0, dtype=torch.int32)
    results = (tokens, valid, scores, rank, num_kept, kept_mass, entropy)
    if rows == 0:
        return *results, kept_ids

    if allowed is not None and allowed.dtype == torch.bool:
        allowed = as_bytes(allowed)
    shared = allowed is None or allowed.shape[0] == 1
    strides = (*logits.stride()[:2], 0 if shared else allowed.stride(0))
    options = launch_options(vocab)
    lists = new_lists(rows, logits.device)
    inputs = (logits, allowed, row_indices)
    sizes = (rows, outer * inner, inner, vocab)
    bits = mass_bits(vocab)
    with on_device(logits):
        for first in range(0, rows, ROWS_PER_LAUNCH):
            _sample_fwd_kernel[(min(rows - first, ROWS_PER_LAUNCH),)](
                *inputs,
                lists,
                row_temperature,
                row_top_k,
                row_top_p,
                row_min_p,
                row_seed,
                row_position,
                tokens,
                as_bytes(valid),
                num_kept,
                cuts,
                temperature,
                top_k,
                fraction_bits(top_p),
                min_p,
                seed,
                position,
                first,
                *sizes,
                bits,
                num_samples,
                *strides,
                ORDER=order,
                **options,
            )
        if scored:
            sample_scores_kernel[(rows,)](
                *inputs,
                row_temperature,
                tokens,
                cuts,
                scores if logprobs else None,
                rank if return_stats else None,
                kept_mass if return_stats else None,
                entropy if return_stats else None,
                temperature,
                *sizes,
                bits,
                num_samples,
                *strides,
                **options,
            )
        if return_kept:
            ends = num_kept.cumsum(0)
            kept_ids = new(int(ends[-1]), dtype=torch.int32)  # waits for the device
            sample_kept_ids_kernel[(rows,)](
                *inputs,
                cuts,
                ends,
                num_kept,
                kept_ids,
                *sizes,
                *strides,
                **options,
            )
    return *results, kept_ids
