"""Integer masses and random numbers: ``csrc/math/masses.h`` and ``philox.h``, bit for bit.

    y = (z - max z) * log2(e) / T,   w = floor(2^y * 2^bits)

No product here is followed by a sum that the compiler could fuse it with: between them stands a
maximum, a conversion or a comparison. Tokens are compared by ``order_key``, never as floats.
"""

from __future__ import annotations

import triton.language as tl

from pyllmtune.reference import masses as reference

from .common import INTERPRETED, device_function

LOG2E = tl.constexpr(reference.LOG2E)
ROUND = tl.constexpr(reference.ROUND)
LOWEST_Y = tl.constexpr(reference.LOWEST)
GREEDY_BELOW = tl.constexpr(reference.GREEDY_BELOW)
LOWEST = tl.constexpr(-0x7F800001)  # order_key(-inf): a token that is not allowed
UNIT30 = tl.constexpr(2.0**-30)


@device_function
def fused(a, b, c):
    """``a * b + c`` of float32 with one rounding, for a number c >= |a * b|."""
    c = tl.full(a.shape, c, tl.float32)
    if INTERPRETED:  # its tl.fma rounds twice; so as in the reference: by a float64 rounded to odd
        product = a.to(tl.float64) * b.to(tl.float64)  # exact
        wide = c.to(tl.float64)
        total = product + wide
        lost = product - (total - wide)  # total + lost is exact (Dekker)
        bits = total.to(tl.int64, bitcast=True)
        odd = (bits - (lost < 0).to(tl.int64)) | (lost != 0).to(tl.int64)
        return odd.to(tl.float64, bitcast=True).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@device_function
def mass_rate(temperature):
    return tl.div_rn(tl.full([], LOG2E, tl.float32), temperature)


@device_function
def mass_of(y, bits):
    """w of an exponent y <= 0, int64."""
    y = tl.maximum(y, LOWEST_Y)
    whole = (y + ROUND) - ROUND
    f = y - whole
    p = fused(tl.full(f.shape, 0.0013269521, tl.float32), f, 0.009671291)
    p = fused(p, f, 0.05550711)
    p = fused(p, f, 0.24022247)
    p = fused(p, f, 0.693147)
    p = fused(p, f, 1.0)
    power = ((whole.to(tl.int32) + (bits + 127)) << 23).to(tl.float32, bitcast=True)
    return (p * power).to(tl.int64)  # exact: p has 24 bits


@device_function
def order_key(z):
    """A float as an int32 of the same order; both zeros have one key."""
    word = z.to(tl.int32, bitcast=True)
    word = tl.where(word == -0x80000000, 0, word)
    return word ^ ((word >> 31) & 0x7FFFFFFF)


@device_function
def from_order_key(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@device_function
def multiply_high(a, b):
    """Upper 64 bits of the product of two uint64."""
    return tl.umulhi(a, b)


@device_function
def fraction_of(p):
    """A float64 p in [0, 1) in units of 2^-63, int64; -1 where p >= 1, which is off."""
    below_one = tl.where(p < 1, p, 0.0)  # NaN is 0, too
    fraction = (tl.where(below_one > 0, below_one, 0.0) * 9223372036854775808.0).to(tl.int64)
    return tl.where(p >= 1, -1, fraction)


@device_function
def needed_mass(total, fraction):
    """The least integer that is p * total or more, at least 1; p in units of 2^-63."""
    a = total.to(tl.uint64)
    b = fraction.to(tl.uint64) << 1
    needed = multiply_high(a, b).to(tl.int64) + ((a * b) != 0).to(tl.int64)
    return tl.maximum(needed, 1)


@device_function
def log2_exact(x):
    """log2 of a float32 in (0, 1], truncated after 30 binary places and rounded once."""
    word = x.to(tl.float64).to(tl.int64, bitcast=True)  # float64 has no denormals here
    log2 = (word >> 52) - 1023
    m = (((word & 0xFFFFFFFFFFFFF) | 0x10000000000000) << 11).to(tl.uint64)  # 63 binary places
    for _ in range(30):
        m = multiply_high(m, m)  # the square, halved
        above_two = m >> 63
        log2 = 2 * log2 + above_two.to(tl.int64)
        m = m << (1 - above_two.to(tl.int64)).to(tl.uint64)
    return log2.to(tl.float32) * UNIT30


@device_function
def uniform_of(seed, position, sample):
    """The 64-bit uniform of (seed, position, sample), uint64: Philox4x32-10."""
    low = tl.full([], 0xFFFFFFFF, tl.uint64)
    key, counter = seed.to(tl.uint64), position.to(tl.uint64)
    k0, k1 = key & low, key >> 32
    c0, c1 = counter & low, counter >> 32
    c2 = c0 & 0  # the stream of token draws
    c3 = sample.to(tl.uint64)
    for _ in range(10):
        a = c0 * 0xD2511F53
        b = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & low, (a >> 32) ^ c3 ^ k1, a & low
        k0 = (k0 + 0x9E3779B9) & low
        k1 = (k1 + 0xBB67AE85) & low
    return (c1 << 32) | c0
