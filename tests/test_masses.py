"""Integer masses and Philox: the specification against exact arithmetic and published vectors."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from pyllmtune.reference import masses
from tests import decoding_cases as cases


def test_philox_gives_the_published_vectors():
    """Random123's known-answer tests of philox4x32-10."""
    known = {
        ((0,) * 4, (0,) * 2): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)): (
            *(0xD16CFE09, 0x94FDCCEB),
            *(0x5001E420, 0x24126EA1),
        ),
    }
    for (counter, key), want in known.items():
        words = masses.philox(
            [torch.tensor([word]) for word in counter], [torch.tensor([word]) for word in key]
        )
        assert tuple(int(word) for word in words) == want
        assert cases.exact_philox(counter, key) == want


def test_uniform_uses_every_bit_of_seed_and_position():
    seeds = torch.tensor([0, 1, -1, 2**40, -(2**63)])
    positions = torch.tensor([0, 5, 2**33, 2**62, 1])
    samples = torch.tensor([0, 1, 2, 3, 4])
    got = masses.uniform(seeds, positions, samples).tolist()
    want = [
        cases.exact_uniform(*x)
        for x in zip(*(t.tolist() for t in (seeds, positions, samples)), strict=True)
    ]
    assert [value % 2**64 for value in got] == want
    assert len(set(want)) == 5


@pytest.mark.parametrize("bits", (44, 40))
def test_masses_are_the_exact_ones(bits):
    z = torch.cat([torch.rand(300) * 40, torch.rand(100) * 1e-6, torch.tensor([0.0, 30.5, 31.0])])
    row = (-z).tolist()
    y = masses.exponents(torch.tensor([[0.0, *row]]), torch.tensor([0.7]))
    got = masses.masses(y, bits)[0].tolist()
    assert got == [cases.exact_mass(value, 0.0, 0.7, bits) for value in (0.0, *row)]
    assert got[0] == 2**bits


def test_masses_are_close_to_the_real_ones():
    """2^y within 1.6e-7 of itself, or within one unit of 2^-44."""
    y = -torch.rand(1_000_000) * 46
    got = masses.masses(y, 44).double()
    want = torch.exp2(y.double()) * 2.0**44
    assert bool(((got - want).abs() <= 1.6e-7 * want + 1).all())


def test_needed_mass_is_the_exact_ceiling():
    totals = torch.randint(1, 2**62, (500,))
    p = torch.rand(500, dtype=torch.float64)
    p[:3] = torch.tensor([0.0, 2.0**-60, 1 - 2.0**-53], dtype=torch.float64)
    got = masses.needed_mass(totals, p).tolist()
    want = [
        max(1, math.ceil(Fraction(share) * total))
        for share, total in zip(p.tolist(), totals.tolist(), strict=True)
    ]
    assert got == want


def test_log2_is_exact_at_powers_of_two_and_close_elsewhere():
    powers = torch.tensor([2.0**-k for k in range(140)])
    assert torch.equal(masses.log2_exact(powers), -torch.arange(140.0))
    x = torch.rand(100_000).clamp(min=1e-30)
    want = x.double().log2()
    assert bool(((masses.log2_exact(x).double() - want).abs() <= 2e-9 + want.abs() * 2**-24).all())


def test_no_sum_passes_2_to_the_63():
    for vocab in (1, 2**18, 2**18 + 1, 2**20, 2**27, 2**31 - 1):
        assert vocab << masses.mass_bits(vocab) <= 2**62
    assert masses.mass_bits(2**18) == 44 and masses.mass_bits(2**18 + 1) == 43
