"""The integer masses, fractions, logarithms and random numbers of kernels/masses.py have the bits
of the specification.
"""

from __future__ import annotations

import pytest
import torch

from pyllmtune.reference import masses as reference

from .toolchain import require

require("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from pyllmtune.kernels import masses  # noqa: E402

from .triton_guard import guard  # noqa: E402

# numpy warns of the infinities that are computed with here
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
BLOCK = tl.constexpr(1 << 16)


@triton.jit
def _masses_kernel(y_ptr, out_ptr, size, bits):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(y_ptr + lanes, mask=lanes < size, other=0.0)
    tl.store(out_ptr + lanes, masses.mass_of(y, bits), mask=lanes < size)


@triton.jit
def _keys_kernel(z_ptr, keys_ptr, back_ptr, size):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keys = masses.order_key(tl.load(z_ptr + lanes, mask=lanes < size, other=0.0))
    tl.store(keys_ptr + lanes, keys, mask=lanes < size)
    tl.store(back_ptr + lanes, masses.from_order_key(keys), mask=lanes < size)


@triton.jit
def _rates_kernel(x_ptr, rates_ptr, logs_ptr, size):
    lanes = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lanes, mask=lanes < size, other=1.0)
    tl.store(rates_ptr + lanes, masses.mass_rate(x), mask=lanes < size)
    tl.store(logs_ptr + lanes, masses.log2_exact(x), mask=lanes < size)


@triton.jit
def _needed_kernel(total_ptr, p_ptr, out_ptr):
    i = tl.program_id(0)
    fraction = masses.fraction_of(tl.load(p_ptr + i))
    tl.store(out_ptr + i, masses.needed_mass(tl.load(total_ptr + i), fraction))


@triton.jit
def _uniform_kernel(seed_ptr, position_ptr, sample_ptr, high_ptr, out_ptr):
    i = tl.program_id(0)
    sample = tl.load(sample_ptr + i)
    uniform = masses.uniform_of(tl.load(seed_ptr + i), tl.load(position_ptr + i), sample)
    high = masses.multiply_high(uniform, sample.to(tl.uint64) << 20)
    tl.store(out_ptr + i, uniform.to(tl.int64))
    tl.store(high_ptr + i, high.to(tl.int64))


@pytest.fixture(autouse=True)
def _guarded():
    with guard():
        yield


def positive(count: int) -> torch.Tensor:
    """Floats in (0, 1], from the least denormal."""
    few = torch.tensor([2.0**-149, 2.0**-127, 2.0**-126, 2.0**-60, 0.5, 1 - 2.0**-24, 1.0])
    return torch.cat([few, torch.rand(count) + 2.0**-149, torch.logspace(-44, 0, count)]).clamp(
        max=1.0
    )


@pytest.mark.parametrize("bits", (31, 40, 44))
def test_masses(bits):
    few = torch.tensor([0.0, -0.0, -0.5, -1.5, -63.5, -64.0, -65.0, -3e38, -torch.inf])
    y = torch.cat(
        [few, -64.5 * torch.rand(1 << 18), torch.linspace(-3, 0, 1 << 17), -positive(999)]
    )
    got = torch.empty(y.numel(), dtype=torch.int64)
    _masses_kernel[(triton.cdiv(y.numel(), BLOCK.value),)](y, got, y.numel(), bits)
    assert torch.equal(got, reference.masses(y, bits))


def test_keys_have_the_order_of_floats():
    z = torch.cat([positive(500), -positive(500), torch.tensor([0.0, torch.inf, -torch.inf, 3e38])])
    z = torch.cat([z.sort().values, torch.tensor([-0.0])])
    keys, back = torch.empty(z.numel(), dtype=torch.int32), torch.empty(z.numel())
    _keys_kernel[(1,)](z, keys, back, z.numel())
    assert torch.equal(back, z)
    steps, key_steps = z[:-1].diff(), keys[:-1].long().diff()
    assert torch.equal(steps > 0, key_steps > 0) and (key_steps >= 0).all()
    assert keys[-1] == 0 and keys[0] == masses.LOWEST.value


def test_rates_and_logarithms():
    x = positive(2000)
    rates, logs = torch.empty(x.numel()), torch.empty(x.numel())
    _rates_kernel[(1,)](x, rates, logs, x.numel())
    assert torch.equal(rates, torch.tensor(reference.LOG2E) / x)
    assert torch.equal(logs, reference.log2_exact(x))


def test_needed_mass():
    total = torch.cat([torch.arange(1, 60), torch.randint(1, 2**62, (300,))])
    p = torch.rand(total.numel(), dtype=torch.float64)
    few = torch.tensor([0.0, 0.5, 0.9, 0.99, 1e-300, 1 - 2.0**-53, -1.0], dtype=torch.float64)
    p[:140] = few.repeat(20)
    got = torch.empty_like(total)
    _needed_kernel[(total.numel(),)](total, p, got)
    assert torch.equal(got, reference.needed_mass(total, p.clamp(min=0)))


def test_fractions_on_the_host():
    from pyllmtune.kernels.row_filter import fraction_bits

    assert [fraction_bits(p) for p in (-1.0, 0.0, 0.5, 1.0, 2.0)] == [0, 0, 2**62, -1, -1]
    assert fraction_bits(1 - 2.0**-53) == 2**63 - 2**10


def test_random_numbers():
    seed = torch.randint(-(2**63), 2**63 - 1, (200,))
    seed[:4] = torch.tensor([0, 1, -1, -(2**63)])
    position = torch.randint(0, 2**63 - 1, (200,))
    sample = torch.randint(0, 2**31, (200,))
    got, high = torch.empty_like(seed), torch.empty_like(seed)
    _uniform_kernel[(200,)](seed, position, sample, high, got)
    want = reference.uniform(seed, position, sample)
    assert torch.equal(got, want)
    assert torch.equal(high, reference.multiply_high(want, sample << 20))
