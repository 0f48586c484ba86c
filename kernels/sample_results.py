"""What ``sample`` returns beside tokens, from the tokens and where the kept ones of a row end.

    raw       = z - max - log sum of all masses at T = 1            ranks, kept mass and entropy
    scaled    = (z - max) / T - log sum of all masses               in the same sweep of the row
    processed = (z - max) / T - log sum of kept masses              (a rank in one more)

``cuts [3, R]`` are the floor, the last id on it and the highest key of each row, as ``find_kept``
has them; the floor of an invalid row is NONE. Masses are added up as integers, relative to that of
the best token, and become float32 once, for the logarithm.
Limits: those of sample.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import LN2, device_function
from .masses import GREEDY_BELOW, LOG2E, from_order_key, mass_of, mass_rate, order_key
from .row_filter import NONE, is_kept, load_row, row_offset


@device_function
def row_pointer(row, logits_ptr, row_indices_ptr, logits_rows, inner, stride_outer, stride_inner):
    """Of the row's logits, and whether ``row_indices`` names a row that exists."""
    logits_row = row.to(tl.int64)
    if row_indices_ptr is not None:
        logits_row = tl.load(row_indices_ptr + row)
    exists = (logits_row >= 0) & (logits_row < logits_rows)
    logits_row = tl.where(exists, logits_row, 0)
    return logits_ptr + row_offset(logits_row, inner, stride_outer, stride_inner), exists


@device_function
def _relative(mass, bits):
    """A mass relative to the best token's."""
    return mass.to(tl.float32) / (tl.full([], 1, tl.int64) << bits).to(tl.float32)


@triton.jit
def sample_scores_kernel(
    logits_ptr,
    allowed_ptr,
    row_indices_ptr,
    row_temperature_ptr,
    tokens_ptr,
    cuts_ptr,
    logprobs_ptr,
    rank_ptr,
    kept_mass_ptr,
    entropy_ptr,
    temperature,
    rows,
    logits_rows,
    inner,
    vocab,
    bits,
    num_samples,
    stride_outer,
    stride_inner,
    stride_allowed,
    BLOCK: tl.constexpr,
):
    """Log-probs, ranks, kept mass and entropy: one sweep of the row, and one for each rank."""
    row = tl.program_id(0)
    z_ptr, _exists = row_pointer(
        row, logits_ptr, row_indices_ptr, logits_rows, inner, stride_outer, stride_inner
    )
    if allowed_ptr is not None:
        allowed_ptr += row.to(tl.int64) * stride_allowed
    cut = (tl.load(cuts_ptr + row), tl.load(cuts_ptr + rows + row))
    top = from_order_key(tl.load(cuts_ptr + 2 * rows + row))
    valid = cut[0] < NONE
    length = tl.where(valid, vocab, 0)
    t = tl.cast(temperature, tl.float32)
    if row_temperature_ptr is not None:
        t = tl.load(row_temperature_ptr + row)
    greedy = t < GREEDY_BELOW
    t = tl.where(greedy | ~valid, 1.0, t)
    rate = mass_rate(t)

    raw = tl.full([BLOCK], 0, tl.int64)
    scaled = tl.full([BLOCK], 0, tl.int64)
    processed = tl.full([BLOCK], 0, tl.int64)
    weighted = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, length, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = load_row(z_ptr, allowed_ptr, columns, vocab)
        kept = is_kept(order_key(z), columns, cut)
        y = (z - top) * rate
        mass = mass_of(y, bits)
        # a greedy row has one token before the filters, too
        scaled += tl.where(kept, mass, tl.where(greedy, 0, mass))
        mass = tl.where(kept, mass, 0)
        processed += mass
        weighted += tl.where(mass > 0, _relative(mass, bits) * y, 0.0)
        if logprobs_ptr is not None:
            raw += mass_of((z - top) * LOG2E, bits)
    raw_total = _relative(tl.sum(raw, 0), bits)
    total = _relative(tl.sum(scaled, 0), bits)
    kept_total = _relative(tl.sum(processed, 0), bits)
    nan = float("nan")
    if entropy_ptr is not None:
        entropy = tl.log(kept_total) - tl.sum(weighted, 0) / kept_total * LN2
        tl.store(entropy_ptr + row, tl.where(valid, tl.maximum(entropy, 0.0), nan))
        tl.store(kept_mass_ptr + row, tl.where(valid, kept_total / total, nan))
    for sample in range(num_samples):
        at = row.to(tl.int64) * num_samples + sample
        token = tl.load(tokens_ptr + at)
        z = tl.load(z_ptr + token, mask=valid, other=0.0).to(tl.float32)
        if logprobs_ptr is not None:
            one_kind = tl.cast(rows, tl.int64) * num_samples
            out_ptr = logprobs_ptr + at
            tl.store(out_ptr, tl.where(valid, z - top - tl.log(raw_total), nan))
            scaled_z = (z - top) / t
            tl.store(out_ptr + one_kind, tl.where(valid, scaled_z - tl.log(total), nan))
            tl.store(out_ptr + 2 * one_kind, tl.where(valid, scaled_z - tl.log(kept_total), nan))
        if rank_ptr is not None:
            ahead = tl.full([BLOCK], 0, tl.int32)
            for start in range(0, length, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                keys = order_key(load_row(z_ptr, allowed_ptr, columns, vocab))
                first = (keys > order_key(z)) | ((keys == order_key(z)) & (columns < token))
                ahead += first.to(tl.int32)
            tl.store(rank_ptr + at, tl.where(valid, tl.sum(ahead, 0) + 1, 0))


@triton.jit
def sample_kept_ids_kernel(
    logits_ptr,
    allowed_ptr,
    row_indices_ptr,
    cuts_ptr,
    ends_ptr,
    num_kept_ptr,
    kept_ids_ptr,
    rows,
    logits_rows,
    inner,
    vocab,
    stride_outer,
    stride_inner,
    stride_allowed,
    BLOCK: tl.constexpr,
):
    """Writes each row's kept ids behind those of the rows before."""
    row = tl.program_id(0)
    if allowed_ptr is not None:
        allowed_ptr += row.to(tl.int64) * stride_allowed
    z_ptr, _exists = row_pointer(
        row, logits_ptr, row_indices_ptr, logits_rows, inner, stride_outer, stride_inner
    )
    cut = (tl.load(cuts_ptr + row), tl.load(cuts_ptr + rows + row))
    number = tl.load(num_kept_ptr + row)
    place = tl.load(ends_ptr + row) - number  # int64
    for start in range(0, tl.where(number > 0, vocab, 0), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        kept = is_kept(order_key(load_row(z_ptr, allowed_ptr, columns, vocab)), columns, cut)
        count = tl.cumsum(kept.to(tl.int32), 0)
        tl.store(kept_ids_ptr + (place + count - 1), columns, mask=kept)
        place += tl.max(count, 0)
