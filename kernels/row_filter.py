"""Where the kept tokens of a row end, in Triton, without a sort; ``sample`` and ``filter_logits``.

Every filter keeps a prefix of the total order (key descending, id ascending). A prefix is written
(floor, ties): all tokens with a key above ``floor`` and the first ``ties``, by id, of those that
equal it; (LOWEST, 0) is all tokens. Of two prefixes the tighter is their intersection.

One program has one row and reads it (from L2 after the first time) for: the maximum; the total
mass and the lowest key that min-p keeps; gathering the candidates, which is every token above a
provable bound. Top-k: the k-th highest of the lanes' maxima. Top-p: tokens of mass at most
(1 - p) total / V add up to (1 - p) total at most. Candidates are few in a peaked row, lie in a list
in scratch, and everything after reads the list. Where they are too many it reads the row.

The floor of "the fewest tokens that weigh ``need``" (a token weighs 1 or its mass) is found two
bits a sweep, from the highest. Sums are of integers, so no order or tile can change a bit of them.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from pyllmtune.reference.row_filter import ORDERS

from .common import INF, block_and_warps, device_function
from .masses import (
    GREEDY_BELOW,
    LOG2E,
    LOWEST,
    fraction_of,
    from_order_key,
    log2_exact,
    mass_of,
    mass_rate,
    needed_mass,
    order_key,
)

VLLM = tl.constexpr(ORDERS.index("vllm"))
LLAMA = tl.constexpr(ORDERS.index("llama.cpp"))
JOINT = tl.constexpr(ORDERS.index("joint"))
CAPACITY = tl.constexpr(2048)  # of the list: 8 candidates a thread
NONE = tl.constexpr(0x7FFFFFFF)  # a key above all tokens, an id after all of them
MARGIN = tl.constexpr(2.0**-6)  # far above the errors of log2 and of a mass
ROWS_PER_LAUNCH = 4096  # 64 MiB of lists


def launch_options(vocab: int) -> dict[str, int]:
    """Four tokens a thread in any dtype: beside the logit each needs key, id and 64-bit sums.

    With 128 registers two blocks of 8 warps fit on an SM. Left alone, ptxas aims at three and
    spills. AMD's compiler has no such option.
    """
    block, warps = block_and_warps(vocab, torch.float32, vectors=1)
    options = {"BLOCK": block, "num_warps": warps}
    return options if torch.version.hip else options | {"maxnreg": 128}


def new_lists(rows: int, device: torch.device) -> Tensor:
    """Scratch for the candidates' keys and ids of the rows of one launch."""
    size = (min(rows, ROWS_PER_LAUNCH), 2, CAPACITY.value)
    return torch.empty(size, dtype=torch.int32, device=device)


def fraction_bits(p: float) -> int:
    """``fraction_of`` on the host."""
    return -1 if p >= 1 else int(max(p, 0.0) * 2.0**63)


@device_function
def row_offset(row, inner, stride_outer, stride_inner):
    return (row // inner).to(tl.int64) * stride_outer + (row % inner).to(tl.int64) * stride_inner


@device_function
def row_parameters(
    row,
    temperature,
    row_temperature_ptr,
    top_k,
    row_top_k_ptr,
    fraction,
    row_top_p_ptr,
    min_p,
    row_min_p_ptr,
):
    """This row's (temperature, k, fraction of p, min-p), and whether they are in range."""
    t = tl.cast(temperature, tl.float32)
    k = tl.cast(top_k, tl.int64)
    f = tl.cast(fraction, tl.int64)
    m = tl.cast(min_p, tl.float32)
    sound = tl.full([], True, tl.int1)
    if row_temperature_ptr is not None:
        t = tl.load(row_temperature_ptr + row)
    if row_top_k_ptr is not None:
        k = tl.load(row_top_k_ptr + row)
    if row_top_p_ptr is not None:
        p = tl.load(row_top_p_ptr + row)
        sound = sound & (p == p)
        f = fraction_of(p)
    if row_min_p_ptr is not None:
        m = tl.load(row_min_p_ptr + row)
    sound = sound & (t >= 0.0) & (t < INF) & (m == m)
    return t, k, f, m, sound


@device_function
def load_row(z_ptr, allowed_ptr, columns, length):
    """float32 logits, -inf where not allowed or outside."""
    inside = columns < length
    z = tl.load(z_ptr + columns, mask=inside, other=-INF).to(tl.float32)
    if allowed_ptr is not None:
        if allowed_ptr.dtype.element_ty == tl.int32:  # bits
            words = tl.load(allowed_ptr + columns // 32, mask=inside, other=0)
            z = tl.where(((words >> (columns % 32)) & 1) != 0, z, -INF)
        else:
            z = tl.where(tl.load(allowed_ptr + columns, mask=inside, other=0) != 0, z, -INF)
    return z


@device_function
def load_tokens(source, start, BLOCK: tl.constexpr):
    """Keys and ids from ``start`` on, of the row or of the list: one of the lengths is 0."""
    z_ptr, allowed_ptr, row_length, list_ptr, list_length = source
    columns = start + tl.arange(0, BLOCK)
    listed = columns < list_length
    keys = order_key(load_row(z_ptr, allowed_ptr, columns, row_length))
    keys = tl.maximum(keys, tl.load(list_ptr + columns, mask=listed, other=LOWEST))
    ids = tl.load(list_ptr + CAPACITY + columns, mask=listed, other=NONE)
    return keys, tl.where(columns < row_length, columns, ids)


@device_function
def length_of(source):
    return source[2] + source[4]


@device_function
def mass_of_key(keys, scale):
    top, rate, bits = scale
    return mass_of((from_order_key(keys) - top) * rate, bits)


@device_function
def _tighter(floor, ties, other_floor, other_ties):
    new = tl.maximum(floor, other_floor)
    of_first = tl.where(floor == new, ties, other_ties)
    return new, tl.minimum(of_first, tl.where(other_floor == new, other_ties, ties))


@device_function
def _survey(row_source, BLOCK: tl.constexpr):
    """Highest key of each lane, number of tokens allowed, whether one is NaN or +inf."""
    z_ptr, allowed_ptr, vocab, _, _ = row_source
    lanes = tl.full([BLOCK], LOWEST, tl.int32)
    count = tl.full([BLOCK], 0, tl.int32)
    bad = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        z = load_row(z_ptr, allowed_ptr, start + tl.arange(0, BLOCK), vocab)
        lanes = tl.maximum(lanes, order_key(z))
        count += (z != -INF).to(tl.int32)
        bad |= ((z != z) | (z == INF)).to(tl.int32)
    return lanes, tl.sum(count, 0), tl.max(bad, 0) > 0


@device_function
def _kth_of_lanes(lanes, k):
    """The k-th highest lane."""
    floor = tl.full([], -0x80000000, tl.int64)
    for i in range(32):
        pivot = floor + (tl.full([], 1, tl.int64) << (31 - i))
        enough = tl.sum((lanes >= pivot.to(tl.int32)).to(tl.int32), 0) >= k
        floor = tl.where(enough, pivot, floor)
    return floor.to(tl.int32)


@device_function
def _totals(row_source, scale, least_y, MIN_P_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """Mass that top-p is a share of if there is no top-k, and the lowest key that min-p keeps."""
    top, rate, bits = scale
    total = tl.full([BLOCK], 0, tl.int64)
    least_key = tl.full([BLOCK], NONE, tl.int32)
    for start in range(0, length_of(row_source), BLOCK):
        keys, _ = load_tokens(row_source, start, BLOCK)
        y = (from_order_key(keys) - top) * rate
        passes = (y >= least_y) & (keys > LOWEST)
        least_key = tl.minimum(least_key, tl.where(passes, keys, NONE))
        mass = mass_of(y, bits)
        if MIN_P_FIRST:
            mass = tl.where(passes, mass, 0)
        total += mass
    return tl.sum(total, 0), tl.min(least_key, 0)


@device_function
def _gather(row_source, scale, bound, bound_y, BLOCK: tl.constexpr):
    """Put the allowed tokens at or above both bounds into the list; their number."""
    _, _, _, list_ptr, _ = row_source
    top, rate, _ = scale
    count = tl.full([], 0, tl.int32)
    for start in range(0, length_of(row_source), BLOCK):
        keys, ids = load_tokens(row_source, start, BLOCK)
        found = (keys >= bound) & (keys > LOWEST)
        found &= (from_order_key(keys) - top) * rate >= bound_y
        here = tl.sum(found.to(tl.int32), 0)
        if (here > 0) & (count < CAPACITY):
            place = count + tl.cumsum(found.to(tl.int32), 0) - 1
            fits = found & (place < CAPACITY)
            tl.store(list_ptr + place, keys, mask=fits)
            tl.store(list_ptr + CAPACITY + place, ids, mask=fits)
        count += here
    tl.debug_barrier()  # other threads read the list than wrote it
    return count


@device_function
def _search(source, scale, need, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The highest floor at or above which tokens weigh ``need``; LOWEST if all weigh less."""
    # low bits of a key that the dtype leaves all 0, or all 1 below zero; rounded down to even
    element = source[0].dtype.element_ty
    FREE: tl.constexpr = 16 if element == tl.bfloat16 else (12 if element == tl.float16 else 0)
    floor = tl.full([], -0x80000000, tl.int64)
    for i in range((32 - FREE) // 2):
        step = tl.full([], 1, tl.int64) << (30 - 2 * i)
        weight1 = tl.full([BLOCK], 0, tl.int64)
        weight2 = tl.full([BLOCK], 0, tl.int64)
        weight3 = tl.full([BLOCK], 0, tl.int64)
        for start in range(0, length_of(source), BLOCK):
            keys, _ = load_tokens(source, start, BLOCK)
            weight = (keys > LOWEST).to(tl.int64)
            if MASS:
                weight = mass_of_key(keys, scale)
            weight1 += tl.where(keys >= (floor + step).to(tl.int32), weight, 0)
            weight2 += tl.where(keys >= (floor + 2 * step).to(tl.int32), weight, 0)
            weight3 += tl.where(keys >= (floor + 3 * step).to(tl.int32), weight, 0)
        digit = (tl.sum(weight1, 0) >= need).to(tl.int64)
        digit += (tl.sum(weight2, 0) >= need).to(tl.int64)
        digit += (tl.sum(weight3, 0) >= need).to(tl.int64)
        floor += digit * step
    floor = tl.where(floor < 0, floor | ((1 << FREE) - 1), floor)
    return tl.maximum(floor.to(tl.int32), LOWEST)


@device_function
def _census(source, scale, floor, BLOCK: tl.constexpr):
    """Mass and number of tokens above the floor, number of those on it."""
    mass = tl.full([BLOCK], 0, tl.int64)
    above = tl.full([BLOCK], 0, tl.int32)
    equal = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, length_of(source), BLOCK):
        keys, _ = load_tokens(source, start, BLOCK)
        mass += tl.where(keys > floor, mass_of_key(keys, scale), 0)
        above += (keys > floor).to(tl.int32)
        equal += ((keys == floor) & (keys > LOWEST)).to(tl.int32)
    return tl.sum(mass, 0), tl.sum(above, 0).to(tl.int64), tl.sum(equal, 0).to(tl.int64)


@device_function
def _prefix(
    row_source,
    scale,
    lanes,
    count,
    k,
    fraction,
    min_p,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(floor, ties) of a row with filters, and the lengths of the source that holds it."""
    z_ptr, allowed_ptr, vocab, list_ptr, _ = row_source
    k_on = (k > 0) & (k < count)
    p_on = fraction >= 0
    least_y = tl.full([], -INF, tl.float32)
    if min_p > 0.0:
        least_y = log2_exact(tl.minimum(min_p, 1.0))
    total, least_key = _totals(row_source, scale, least_y, ORDER == VLLM, BLOCK)

    # what bounds the kept tokens, and those of whose mass top-p is a share yet to be known
    total_known = ~k_on | (ORDER == JOINT)
    bound = tl.full([], LOWEST, tl.int32)
    bound_y = tl.full([], -INF, tl.float32)
    if total_known | ~p_on | (ORDER == VLLM):
        bound = least_key
    if k_on & (k <= BLOCK):
        bound = tl.maximum(bound, _kth_of_lanes(lanes, k))
    if p_on & total_known:
        negligible = tl.maximum((total - needed_mass(total, fraction)) // count, 1)
        bound_y = tl.log2(negligible.to(tl.float32)) - scale[2] - MARGIN
    listed = _gather(row_source, scale, bound, bound_y, BLOCK)
    row_length = tl.where(listed <= CAPACITY, 0, vocab)
    list_length = tl.where(listed <= CAPACITY, listed, 0)
    source = (z_ptr, allowed_ptr, row_length, list_ptr, list_length)

    floor = tl.full([], LOWEST, tl.int32)
    ties = tl.full([], 0, tl.int64)
    all_ties = tl.full([], NONE, tl.int64)
    if k_on:
        floor = _search(source, scale, k, False, BLOCK)
        _mass, above, _equal = _census(source, scale, floor, BLOCK)
        ties = tl.where(floor > LOWEST, k - above, 0)
    if ORDER == VLLM:
        floor, ties = _tighter(floor, ties, least_key, all_ties)
    if p_on:
        p_floor = floor
        if ORDER == JOINT:
            p_floor = tl.full([], LOWEST, tl.int32)
        above_mass, _above, equal = _census(source, scale, p_floor, BLOCK)
        if ~total_known:
            total = above_mass + tl.minimum(ties, equal) * mass_of_key(p_floor, scale)
        need = needed_mass(total, fraction)
        if above_mass >= need:
            p_floor = _search(source, scale, need, True, BLOCK)
            above_mass, _above, equal = _census(source, scale, p_floor, BLOCK)
        # as many of equal tokens as carry what is missing
        on_floor = tl.maximum(mass_of_key(p_floor, scale), 1)
        p_ties = (need - above_mass + on_floor - 1) // on_floor
        floor, ties = _tighter(floor, ties, p_floor, p_ties)
    floor, ties = _tighter(floor, ties, least_key, all_ties)
    return floor, ties, row_length, list_length


@device_function
def _last_tie(source, floor, ties, BLOCK: tl.constexpr):
    """Id of the ``ties``-th token on the floor; NONE if there are fewer."""
    last = tl.full([], NONE, tl.int32)
    seen = tl.full([], 0, tl.int64)
    for start in range(0, length_of(source), BLOCK):
        keys, ids = load_tokens(source, start, BLOCK)
        on_floor = (keys == floor).to(tl.int32)
        here = tl.sum(on_floor, 0)
        if (seen < ties) & (seen + here >= ties):
            place = seen + tl.cumsum(on_floor, 0)
            last = tl.max(tl.where((on_floor != 0) & (place == ties), ids, -1), 0)
        seen += here
    return last


@device_function
def is_kept(keys, ids, cut):
    floor, last = cut
    return (keys > floor) | ((keys == floor) & (ids <= last))


@device_function
def find_kept(row_source, parameters, bits, ORDER: tl.constexpr, BLOCK: tl.constexpr):
    """Where the kept tokens of a row end: ``is_kept(keys, ids, cut)``.

    Returns whether the row holds NaN or +inf, whether it is valid, the scale of its masses, the
    cut, and the lengths (of row and list) of the source that holds every kept token; not the source
    itself, for Triton 3.6 returns no tuple that holds None.
    """
    temperature, k, fraction, min_p, sound = parameters
    z_ptr, allowed_ptr, vocab, list_ptr, _ = row_source
    lanes, count, bad = _survey(row_source, BLOCK)
    top_key = tl.max(lanes, 0)
    top = from_order_key(top_key)
    valid = sound & ~bad & (count > 0)
    greedy = temperature < GREEDY_BELOW
    rate = mass_rate(tl.where(greedy | ~sound, 1.0, temperature))

    floor = tl.full([], LOWEST, tl.int32)
    ties = tl.full([], 0, tl.int64)
    row_length = tl.where(valid, tl.cast(vocab, tl.int32), 0)  # nothing of an invalid row is read
    list_length = tl.full([], 0, tl.int32)
    filtered = ((k > 0) & (k < count)) | (fraction >= 0) | (min_p > 0.0)
    if valid & greedy:
        floor = top_key
        ties = tl.full([], 1, tl.int64)
    elif valid & filtered:
        filter_rate = rate
        if ORDER == LLAMA:
            filter_rate = tl.full([], LOG2E, tl.float32)
        scale = (top, filter_rate, bits)
        floor, ties, row_length, list_length = _prefix(
            row_source, scale, lanes, count, k, fraction, min_p, ORDER, BLOCK
        )
    source = (z_ptr, allowed_ptr, row_length, list_ptr, list_length)
    last = tl.full([], -1, tl.int32)
    if floor > LOWEST:
        last = _last_tie(source, floor, ties, BLOCK)
    return bad, valid, (top, rate, bits), (floor, last), (row_length, list_length)
