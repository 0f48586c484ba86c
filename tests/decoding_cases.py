"""Rows and parameters for the tests of ``sample`` and ``filter_logits``, and an oracle in exact
arithmetic: Python's integers and fractions, nothing shared with the package.
"""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from pyllmtune.reference.row_filter import ORDERS

ROW_KINDS = ("flat", "spread", "peaked", "ties", "equal", "masked", "one", "huge")
EXP2 = (0.0013269521, 0.009671291, 0.05550711, 0.24022247, 0.693147, 1.0)


def make_rows(kind: str, rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    z = torch.randn(rows, vocab)
    if kind == "spread":
        z = z * 8
    if kind == "peaked":
        z = z * 2
        z[:, :: max(1, vocab // 40)] += 12
    if kind == "ties":
        z = (z * 2).round() / 2
    if kind == "equal":
        z = torch.full((rows, vocab), 1.5)
    if kind == "masked":
        z = torch.where(torch.rand(rows, vocab) < 0.5, -math.inf, z)
    if kind == "one":
        z = torch.full((rows, vocab), -math.inf)
        z[:, vocab // 2] = 2.0
    if kind == "huge":
        z = z * (1e30 if dtype != torch.float16 else 1e4)
    return z.to(dtype)


def random_filters(pick: random.Random, rows: int, vocab: int) -> dict[str, Any]:
    """A random combination of filters, each off, one for all rows or one per row."""

    def of(values: tuple, dtype: torch.dtype) -> Any:
        if pick.random() < 0.4:
            return torch.tensor([pick.choice(values) for _ in range(rows)], dtype=dtype)
        return pick.choice(values)

    filters = {
        "temperature": of((0.0, 1e-4, 0.5, 1.0, 1.0, 2.0, 1e4), torch.float32),
        "top_k": of((0, 1, 2, 5, 50, vocab // 2, vocab, vocab + 7), torch.int64),
        "top_p": of((-1.0, 0.0, 1e-9, 0.1, 0.5, 0.9, 0.95, 0.999, 1.0, 1.5), torch.float64),
        "min_p": of((0.0, 0.01, 0.1, 0.5, 1.0), torch.float32),
        "order": pick.choice(ORDERS),
    }
    for name in ("top_k", "top_p", "min_p"):
        if pick.random() < 0.5:
            filters[name] = None
    return filters


def random_allowed(pick: random.Random, rows: int, vocab: int) -> Tensor | None:
    """None, bool or bits, for all rows or one per row."""
    if pick.random() < 0.6:
        return None
    mask = torch.rand(rows, vocab) < pick.choice((0.02, 0.5, 0.95))
    if pick.random() < 0.5:
        mask = pack_bits(mask)
    return mask[0] if pick.random() < 0.3 else mask


def pack_bits(mask: Tensor) -> Tensor:
    """Bool ``[..., V]`` as int32 words, lowest bit first."""
    words = (mask.shape[-1] + 31) // 32
    padded = torch.zeros(*mask.shape[:-1], words * 32, dtype=torch.int64)
    padded[..., : mask.shape[-1]] = mask.long()
    bits = (padded.unflatten(-1, (words, 32)) << torch.arange(32)).sum(-1)
    return torch.where(bits >= 2**31, bits - 2**32, bits).int()


def round_float32(x: Fraction) -> Fraction:
    """The nearest float32, ties to even; no overflow, and no denormals that matter here."""
    if x == 0:
        return x
    exponent = math.floor(math.log2(abs(x)))
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    return round(x / unit) * unit  # Fraction's round is half to even


def float32(x: float) -> Fraction:
    return Fraction(torch.tensor(x, dtype=torch.float32).item())


def exact_mass(z: float, top: float, temperature: float, bits: int = 44) -> int:
    """floor(2^y * 2^bits) by the definition, every rounding made by hand."""
    if z == -math.inf:
        return 0
    rate = round_float32(float32(1.44269504) / float32(temperature))
    y = round_float32(round_float32(Fraction(z) - Fraction(top)) * rate)
    y = max(y, Fraction(-64))
    whole = round(y)
    f = y - whole
    p = float32(EXP2[0])
    for coefficient in EXP2[1:]:
        p = round_float32(p * f + float32(coefficient))
    return math.floor(p * Fraction(2) ** (whole + bits))


def exact_masses(row: Tensor, temperature: float = 1.0) -> list[int]:
    values = row.tolist()
    return [exact_mass(z, max(values), temperature) for z in values]


def ranked(row: Tensor) -> list[int]:
    """Token ids by value, highest first, then by id."""
    values = row.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def exact_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (b >> 32) ^ c1 ^ k0,
            b % 2**32,
            (a >> 32) ^ c3 ^ k1,
            a % 2**32,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def exact_uniform(seed: int, position: int, sample: int) -> int:
    seed, position = seed % 2**64, position % 2**64
    counter = (position % 2**32, position >> 32, 0, sample)
    words = exact_philox(counter, (seed % 2**32, seed >> 32))
    return words[1] << 32 | words[0]
