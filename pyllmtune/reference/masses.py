"""Integer masses and random numbers, the specification: ``csrc/math/masses.h`` and ``philox.h`` in
eager torch, bit for bit.

int64 tensors stand for unsigned 64-bit words where a comment says so; products wrap around, as
torch's do.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG2E = 1.44269504
ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer
LOWEST = -64.0  # below it every mass is 0
GREEDY_BELOW = 2.0**-60
EXP2 = (0.0013269521, 0.009671291, 0.05550711, 0.24022247, 0.693147, 1.0)  # highest power first
LOW32 = 0xFFFFFFFF


def mass_bits(vocab: int) -> int:
    """Bits of the largest mass: 44 up to V = 2^18, one fewer for each doubling beyond."""
    log2_vocab = (vocab - 1).bit_length()
    return 44 if log2_vocab <= 18 else 62 - log2_vocab


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` of float32 with one rounding.

    The product is exact in float64. The sum is rounded to odd there, after which rounding it to
    float32 is as good as rounding the exact value (Boldo and Melquiond, 2008).
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    part = total - product
    lost = (product - (total - part)) + (c - part)  # total + lost is exact (Knuth)
    bits = total.view(torch.int64)
    even = (bits & 1) == 0
    outwards = (lost > 0) == (total > 0)
    odd = torch.where((lost != 0) & even, torch.where(outwards, bits + 1, bits - 1), bits)
    return odd.view(torch.float64).float()


def exponents(z: Tensor, temperature: Tensor) -> Tensor:
    """y = (z - max z) * log2(e) / T of each row, float32 ``[rows, V]``."""
    top = z.amax(-1, keepdim=True)  # [rows, 1]
    rate = torch.tensor(LOG2E, dtype=torch.float32, device=z.device) / temperature  # [rows]
    return (z - top) * rate[:, None]


def masses(y: Tensor, bits: int) -> Tensor:
    """w = floor(2^y * 2^bits) for y <= 0, int64."""
    y = y.clamp(min=LOWEST)
    whole = (y + ROUND) - ROUND
    f = y - whole
    p = torch.full_like(f, EXP2[0])
    for coefficient in EXP2[1:]:
        p = fused(p, f, torch.full_like(f, coefficient))
    return torch.ldexp(p.double(), whole + bits).long()  # exact: p has 24 bits


def high32(x: Tensor) -> Tensor:
    """The upper half of an unsigned 64-bit word."""
    return (x >> 32) & LOW32


def multiply_high(a: Tensor, b: Tensor) -> Tensor:
    """Upper 64 bits of the product of two unsigned 64-bit words."""
    a0, a1, b0, b1 = a & LOW32, high32(a), b & LOW32, high32(b)
    middle = a1 * b0 + high32(a0 * b0)
    return a1 * b1 + high32(middle) + high32(a0 * b1 + (middle & LOW32))


def needed_mass(total: Tensor, p: Tensor) -> Tensor:
    """The least integer that is p * total or more, at least 1; p in (0, 1), float64."""
    fraction = (p * 2.0**63).long() << 1  # unsigned: p in units of 2^-64
    needed = multiply_high(total, fraction) + (total * fraction != 0)
    return needed.clamp(min=1)


def log2_exact(x: Tensor) -> Tensor:
    """log2 of x in (0, 1], truncated after 30 binary places and rounded once, float32."""
    mantissa, exponent = torch.frexp(x.double())  # x = mantissa 2^exponent, mantissa in [1/2, 1)
    log2 = exponent.long() - 1
    m = (mantissa * 2.0**53).long() << 11  # unsigned: [1, 2) with 63 binary places
    for _ in range(30):
        m = multiply_high(m, m)  # the square, halved
        above_two = m < 0  # as a word: its highest bit
        log2 = 2 * log2 + above_two.long()
        m = torch.where(above_two, m, m << 1)
    return log2.float() * 2.0**-30


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words from a counter of four and a key of
    two.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = high32(b) ^ c1 ^ k0, b & LOW32, high32(a) ^ c3 ^ k1, a & LOW32
        k0, k1 = (k0 + 0x9E3779B9) & LOW32, (k1 + 0xBB67AE85) & LOW32
    return [c0, c1, c2, c3]


def uniform(seed: Tensor, position: Tensor, sample: Tensor) -> Tensor:
    """The 64-bit uniform (unsigned) of each (seed, position, sample)."""
    zero = torch.zeros_like(seed)  # the stream of token draws
    counter = [position & LOW32, high32(position), zero, sample]
    words = philox(counter, [seed & LOW32, high32(seed)])
    return words[1] << 32 | words[0]
