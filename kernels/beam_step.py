"""beam_step: the best continuations of the beams of each item, from one read of the logits.

    score = beam_score + (z - max) / T - log S,    S = sum_j exp((z_j - max) / T)

Logits [batch, beams, V]; results [batch, candidates], valid [batch, beams]. In one beam scores are
ordered as logits are, so a part of a row offers its ``kept`` tokens of the largest logits: one
program reads a part once, into registers, and takes one maximum a token. A second kernel, one
program an item, joins the parts' sums and takes candidate after candidate from what was offered.

A token is one int64, ``order_key(z)`` above the complement of its id, so the maximum of such words
is the highest logit and, of equal ones, the lowest id; a candidate's ``lead`` is its key (the score
less penalties) above the complement of its beam. V elements read a row are the floor; beside them
8 * kept bytes a part are written, and read as often as there are candidates, from the cache.
Limits: V < 2^31, fewer than 2^31 rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INF, LOG2E, as_bytes, block_and_warps, device_function, on_device
from .masses import LOWEST, from_order_key, order_key
from .row_filter import load_row, row_offset

LAST = tl.constexpr(0x7FFFFFFF)  # x ^ LAST of ids and beams: the lower is the larger
NOTHING = tl.constexpr(-(2**63))
MERGE_BLOCK = 2048  # entries a program looks at together: 8 a thread, 16 would be spilled


@device_function
def _inverse_temperature(row, temperature, row_temperature_ptr):
    t = tl.cast(temperature, tl.float32)
    if row_temperature_ptr is not None:
        t = tl.load(row_temperature_ptr + row)
    return 1.0 / t


@device_function
def _is_live(beam_score, beam, item, widths_ptr):
    live = beam_score != -INF
    if widths_ptr is not None:
        live = live & (beam < tl.load(widths_ptr + item))
    return live


@device_function
def _score(logits, joined_ptr, inside):
    """Of logits of the beam that ``joined_ptr`` is of; NaN if that is dropped or not live."""
    top = tl.load(joined_ptr, mask=inside, other=0.0)
    inverse = tl.load(joined_ptr + 1, mask=inside, other=0.0)
    log_sum = tl.load(joined_ptr + 2, mask=inside, other=float("nan"))
    return tl.load(joined_ptr + 3, mask=inside, other=0.0) + ((logits - top) * inverse - log_sum)


@triton.jit
def _beam_rows_kernel(
    logits_ptr,
    allowed_ptr,
    beam_scores_ptr,
    row_temperature_ptr,
    widths_ptr,
    stats_ptr,
    lists_ptr,
    temperature,
    beams,
    vocab,
    kept,
    stride_outer,
    stride_inner,
    stride_allowed,
    WHOLE_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one part of a row: (max, sum) into stats [rows, parts, 2], tokens into lists [rows, parts,
    kept], best first.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    beam_score = tl.load(beam_scores_ptr + row)
    if _is_live(beam_score, row % beams, row // beams, widths_ptr):
        at = row.to(tl.int64) * tl.num_programs(1) + part
        z_ptr = logits_ptr + row_offset(row, beams, stride_outer, stride_inner)
        if allowed_ptr is not None:
            allowed_ptr += row.to(tl.int64) * stride_allowed
        columns = part * BLOCK + tl.arange(0, BLOCK)
        z = load_row(z_ptr, allowed_ptr, columns, vocab)
        x = z
        if WHOLE_SUM:  # the softmax is over tokens that are not allowed, too
            x = load_row(z_ptr, None, columns, vocab)
        bad = tl.max(((x != x) | (x == INF)).to(tl.int32), 0) > 0
        top = tl.where(bad, 0.0, tl.max(x, 0))
        base = tl.where(top == -INF, 0.0, top)
        inverse = _inverse_temperature(row, temperature, row_temperature_ptr)
        total = tl.sum(tl.exp2((x - base) * (inverse * LOG2E)), 0)
        tl.store(stats_ptr + 2 * at, top)
        tl.store(stats_ptr + 2 * at + 1, tl.where(bad, float("nan"), total))

        tokens = (order_key(z).to(tl.int64) << 32) | (columns ^ LAST)
        for i in range(kept):
            best = tl.max(tokens, 0)
            tl.store(lists_ptr + at * kept + i, best)
            tokens = tl.where(tokens == best, NOTHING, tokens)


@device_function
def _join_parts(
    row, live, beam_score, inverse, stats_ptr, lists_ptr, joined_ptr, parts, kept, PARTS
):
    """Writes what a beam's scores need: (max, 1 / T, log-sum, its own score), the log-sum NaN if
    the beam is dropped or not live. Returns whether it is sound.
    """
    part = tl.arange(0, PARTS)
    here = part < tl.where(live, parts, 0)
    at = row * parts + part
    maxima = tl.load(stats_ptr + 2 * at, mask=here, other=-INF)
    sums = tl.load(stats_ptr + 2 * at + 1, mask=here, other=0.0)
    first = tl.load(lists_ptr + at * kept, mask=here, other=NOTHING)
    top = tl.max(maxima, 0)
    base = tl.where(top == -INF, 0.0, top)
    total = tl.sum(sums * tl.exp2((maxima - base) * (inverse * LOG2E)), 0)
    sound = live & (total == total) & (beam_score < INF) & (tl.max(first, 0) >> 32 > LOWEST)
    log_sum = tl.log(tl.where(sound, total, 1.0))
    tl.store(joined_ptr + 4 * row, top)
    tl.store(joined_ptr + 4 * row + 1, inverse)
    tl.store(joined_ptr + 4 * row + 2, tl.where(sound, log_sum, float("nan")))
    tl.store(joined_ptr + 4 * row + 3, beam_score)
    return sound


@device_function
def _best_behind(
    last_lead,
    last_token,
    entries,
    item_row,
    first_row,
    joined_ptr,
    lists_ptr,
    taken_ptr,
    penalty,
    of_beam,
    taken,
    BLOCK: tl.constexpr,
):
    """The best candidate behind another among the entries of rows ``first_row`` on, a group of the
    item that begins at ``item_row``; its lead is NOTHING if there is none.
    """
    lead = tl.full([], NOTHING, tl.int64)
    token = tl.full([], NOTHING, tl.int64)
    for start in range(0, entries, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < entries
        row = first_row + entry // of_beam
        at = first_row * of_beam + entry
        tokens = tl.load(lists_ptr + at, mask=inside, other=NOTHING)
        times = tl.full([BLOCK], 0.0, tl.float32)
        for i in range(taken):
            other = tl.load(taken_ptr + item_row + i)
            times += (((tokens & LAST) ^ LAST) == other).to(tl.float32)
        z = from_order_key((tokens >> 32).to(tl.int32))
        key = _score(z, joined_ptr + 4 * row, inside) - penalty * times
        leads = (order_key(key).to(tl.int64) << 32) | ((row - item_row) ^ LAST)
        behind = (leads < last_lead) | ((leads == last_lead) & (tokens < last_token))
        exists = (tokens >> 32 > LOWEST) & (key > -INF)  # NaN is not above -inf
        leads = tl.where(exists & behind, leads, NOTHING)
        best_lead = tl.max(leads, 0)
        best_token = tl.max(tl.where(leads == best_lead, tokens, NOTHING), 0)
        better = (best_lead > lead) | ((best_lead == lead) & (best_token > token))
        lead = tl.where(better, best_lead, lead)
        token = tl.where(better, best_token, token)
    return lead, token


@device_function
def _is_eos(token, eos_ptr, eos_count, EOS: tl.constexpr):
    index = tl.arange(0, EOS)
    ids = tl.load(eos_ptr + index, mask=index < eos_count, other=-1)
    return tl.max((ids == token).to(tl.int32), 0) > 0


@triton.jit
def _beam_merge_kernel(
    beam_scores_ptr,
    row_temperature_ptr,
    widths_ptr,
    eos_ptr,
    stats_ptr,
    lists_ptr,
    joined_ptr,
    taken_ptr,
    scores_ptr,
    tokens_ptr,
    parents_ptr,
    is_eos_ptr,
    valid_ptr,
    temperature,
    penalty,
    beams,
    parts,
    kept,
    candidates,
    groups,
    eos_count,
    PARTS: tl.constexpr,
    EOS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The candidates of one item; ``taken [batch, beams]``: tokens that groups go on with."""
    item = tl.program_id(0)
    first_row = item.to(tl.int64) * beams
    for beam in range(beams):
        row = first_row + beam
        beam_score = tl.load(beam_scores_ptr + row)
        live = _is_live(beam_score, beam, item, widths_ptr)
        inverse = _inverse_temperature(row, temperature, row_temperature_ptr)
        sound = _join_parts(
            *(row, live, beam_score, inverse, stats_ptr, lists_ptr, joined_ptr),
            *(parts, kept, PARTS),
        )
        tl.store(valid_ptr + row, (sound | (live == 0)).to(tl.uint8))
    tl.debug_barrier()  # other threads read the beams' statistics than wrote them

    size, slots = beams // groups, candidates // groups
    limit = tl.cast(slots, tl.int64)
    if widths_ptr is not None:
        limit = limit * tl.load(widths_ptr + item) // beams
    taken = tl.full([], 0, tl.int32)
    for group in range(groups):
        entries = size * parts * kept
        last_lead = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
        last_token = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
        going_on = tl.full([], 0, tl.int32)
        for slot in range(slots):
            searched = tl.where((slot < limit) & (last_lead > NOTHING), entries, 0)
            lead, token = _best_behind(
                *(last_lead, last_token, searched, first_row, first_row + group * size),
                *(joined_ptr, lists_ptr, taken_ptr, penalty, parts * kept, taken, BLOCK),
            )
            last_lead, last_token = lead, token

            filled = lead > NOTHING
            parent = tl.where(filled, (lead & LAST) ^ LAST, 0)
            z = from_order_key((token >> 32).to(tl.int32))
            score = _score(z, joined_ptr + 4 * (first_row + parent), filled)
            best = (token & LAST) ^ LAST
            ends = filled & False
            if eos_ptr is not None:
                ends = filled & _is_eos(best, eos_ptr, eos_count, EOS)
            at = item.to(tl.int64) * candidates + group * slots + slot
            tl.store(scores_ptr + at, tl.where(filled, score, -INF))
            tl.store(tokens_ptr + at, tl.where(filled, best, -1))
            tl.store(parents_ptr + at, parent)
            tl.store(is_eos_ptr + at, ends.to(tl.uint8))
            goes_on = filled & (ends == 0) & (going_on < size)
            tl.store(taken_ptr + first_row + taken + going_on, best.to(tl.int32), mask=goes_on)
            going_on += goes_on.to(tl.int32)
        taken += going_on
        tl.debug_barrier()  # the tokens taken


def beam_step(
    logits: Tensor,
    beam_scores: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    allowed: Tensor | None,
    renormalize: bool,
    widths: Tensor | None,
    eos_token_ids: Tensor | None,
    num_candidates: int,
    num_groups: int,
    diversity_penalty: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, beams, vocab = logits.shape
    new = logits.new_empty
    scores = new((batch, num_candidates), dtype=torch.float32)
    tokens = new((batch, num_candidates), dtype=torch.int64)
    parents = new((batch, num_candidates), dtype=torch.int64)
    is_eos = new((batch, num_candidates), dtype=torch.bool)
    valid = new((batch, beams), dtype=torch.bool)
    results = (scores, tokens, parents, is_eos, valid)
    if batch == 0:
        return results

    size = beams // num_groups
    # a penalty can put as many tokens behind others as the groups before go on with
    kept = min(vocab, num_candidates // num_groups + beams - size)
    block, warps = block_and_warps(vocab, torch.float32, vectors=4)
    parts = triton.cdiv(vocab, block)
    stats = new((batch * beams, parts, 2), dtype=torch.float32)
    lists = new((batch * beams, parts, kept), dtype=torch.int64)
    joined = new((batch, beams, 4), dtype=torch.float32)
    taken = new((batch, beams), dtype=torch.int32)
    whole_sum = allowed is not None and not renormalize
    if allowed is not None and allowed.dtype == torch.bool:
        allowed = as_bytes(allowed)
    shared = allowed is None or allowed.shape[0] == 1
    eos_count = 0 if eos_token_ids is None else eos_token_ids.numel()
    per_beam = (beam_scores, row_temperature, widths)
    merge_block = min(triton.next_power_of_2(size * parts * kept), MERGE_BLOCK)
    # left alone, ptxas aims at 96 registers and spills; AMD's compiler has no such option
    merge_options = {} if torch.version.hip else {"maxnreg": 128}
    with on_device(logits):
        _beam_rows_kernel[(batch * beams, parts)](
            *(logits, allowed, *per_beam, stats, lists),
            *(temperature, beams, vocab, kept, *logits.stride()[:2]),
            0 if shared else allowed.stride(0),
            WHOLE_SUM=whole_sum,
            BLOCK=block,
            num_warps=warps,
        )
        _beam_merge_kernel[(batch,)](
            *(*per_beam, eos_token_ids if eos_count else None, stats, lists, joined, taken),
            *(scores, tokens, parents, as_bytes(is_eos), as_bytes(valid)),
            *(temperature, diversity_penalty, beams, parts, kept, num_candidates, num_groups),
            eos_count,
            PARTS=triton.next_power_of_2(parts),
            EOS=triton.next_power_of_2(max(eos_count, 1)),
            BLOCK=merge_block,
            num_warps=max(1, merge_block // 256),
            **merge_options,
        )
    return results
