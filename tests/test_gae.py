"""gae against its definition, other trainers' loops, and itself on every floor."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pyllmtune import GaeOutput, gae
from tests import helpers

SMALL_BLOCK = 16  # of the Triton kernel, whose interpreter walks a scan lane by lane in Python


@pytest.fixture(autouse=True)
def _small_triton_blocks(request, monkeypatch):
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if parameters.get("backend") == "triton":
        helpers.need("triton")
        from pyllmtune.kernels import gae as kernels

        monkeypatch.setattr(kernels, "BLOCK_T", SMALL_BLOCK)


def compare(backend: str, rewards: Tensor, values: Tensor, mask=None, **options) -> None:
    """One floor against the reference in float64 on the same inputs."""
    wide = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in options.items()
    }
    got = gae(rewards, values, mask, backend=helpers.use(backend), **options)
    want = gae(rewards.double(), values.double(), mask, backend="reference", **wide)
    for name, value, expected in zip(GaeOutput._fields, got, want, strict=True):
        assert value.dtype == helpers.accumulator(rewards.dtype)
        helpers.assert_close(value, expected, helpers.FORWARD[rewards.dtype], name)


def steps_until_end(rewards, values, after, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l} of one sequence, term by term."""
    following = [*values[1:], after]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    return [
        sum((gamma * lam) ** later * delta for later, delta in enumerate(deltas[t:]))
        for t in range(len(deltas))
    ]


@pytest.mark.parametrize("gamma, lam", ((1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0), (0.0, 1)))
def test_reference_is_the_definition(gamma, lam):
    rewards = torch.randn(3, 9, dtype=torch.float64)
    values = torch.randn(3, 10, dtype=torch.float64)
    out = gae(rewards, values, gamma=gamma, lam=lam, backend="reference")
    for row in range(3):
        r, v = rewards[row].tolist(), values[row].tolist()
        want = steps_until_end(r, v[:-1], v[-1], gamma, lam)
        torch.testing.assert_close(out.advantages[row], torch.tensor(want, dtype=torch.float64))
    torch.testing.assert_close(out.returns, out.advantages + values[:, :-1])


def test_reference_ends_episodes_within_a_row():
    rewards, values = (torch.randn(1, 9, dtype=torch.float64) for _ in range(2))
    ends = torch.zeros(1, 9, dtype=torch.bool)
    ends[0, [2, 6]] = True
    out = gae(rewards, values, gamma=0.9, terminated=ends, backend="reference").advantages[0]
    r, v = rewards[0].tolist(), values[0].tolist()
    want = []
    for a, b in ((0, 3), (3, 7), (7, 9)):
        want += steps_until_end(r[a:b], v[a:b], 0.0, 0.9, 0.95)
    torch.testing.assert_close(out, torch.tensor(want, dtype=torch.float64))


def carrying_loop(rewards, values, mask, gamma, lam):
    """As verl computes it: masked tokens hand the value and the advantage on."""
    next_value, last, out = 0, 0, []
    for t in reversed(range(rewards.shape[1])):
        on = mask[:, t].to(rewards.dtype)
        step = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * last
        next_value = values[:, t] * on + next_value * (1 - on)
        last = step * on + last * (1 - on)
        out.append(last)
    return torch.stack(out[::-1], 1)


def zeroing_loop(rewards, values, mask, gamma, lam):
    """As TRL and OpenRLHF compute it: values and rewards are multiplied by the mask."""
    rewards, values = rewards * mask, values * mask
    last, out = 0, []
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        last = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * last
        out.append(last)
    return torch.stack(out[::-1], 1)


@pytest.mark.parametrize("backend", ("reference", "cpp"))
@pytest.mark.parametrize("carry", (True, False))
def test_masked_tokens_as_trainers_treat_them(backend, carry):
    rewards, values = (torch.randn(6, 20, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(6, 20) > 0.4
    out = gae(
        rewards,
        values,
        mask,
        gamma=0.9,
        lam=0.8,
        carry_masked=carry,
        backend=helpers.use(backend),
    )
    want = (carrying_loop if carry else zeroing_loop)(rewards, values, mask, 0.9, 0.8)
    torch.testing.assert_close(out.advantages, torch.where(mask, want, 0))
    torch.testing.assert_close(out.returns, torch.where(mask, want + values, 0))


@pytest.mark.parametrize("backend", helpers.KERNELS)
@pytest.mark.parametrize("carry", (True, False))
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("ends", (False, True))
@pytest.mark.parametrize("after", (False, True))
def test_full_product_against_the_reference(backend, carry, masked, ends, after):
    batch, length = 5, 41
    mask = torch.rand(batch, length) > 0.3 if masked else None
    terminated = torch.rand(batch, length) > 0.9 if ends else None
    discounts = [
        {"gamma": 0.97, "lam": 0.9},
        {"gamma": torch.rand(batch), "lam": torch.rand(batch)},
    ]
    for dtype, discount in itertools.product((torch.float32, torch.float64), discounts):
        if not helpers.runs(backend, dtype):
            continue
        given = {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in discount.items()}
        rewards, values = torch.randn(batch, length), torch.randn(batch, length + after)
        compare(
            backend,
            rewards.to(dtype),
            values.to(dtype),
            mask,
            terminated=terminated,
            carry_masked=carry,
            **given,
        )


@pytest.mark.parametrize("backend", helpers.KERNELS)
def test_lengths_around_those_of_a_block(backend):
    """Packed: Triton's blocks of 16 here, CUDA's chunks of 1024, the four sequences of cpp."""
    edges = {"triton": (0, 1, 15, 16, 17, 33), "emulated": (0, 3, 129, 1023, 1024, 1025, 2049)}
    lengths = edges.get(backend, (0, 1, 5, 100, 3, 3, 0, 17, 2000))
    total = sum(lengths)
    cu_seqlens = torch.tensor((0, *itertools.accumulate(lengths)))
    compare(
        backend,
        torch.randn(total),
        torch.randn(total),
        torch.rand(total) > 0.2,
        gamma=0.99,
        cu_seqlens=cu_seqlens,
        bootstrap=torch.randn(len(lengths)),
        terminated=torch.rand(total) > 0.98,
    )


def test_the_block_that_a_gpu_runs():
    """1024 lanes; a sequence longer than one block."""
    helpers.use("triton")
    compare("triton", torch.randn(1, 1030), torch.randn(1, 1030), gamma=0.99)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_by_hand(backend):
    """gamma = lam = 1: return minus value; lam = 0: delta; lam = 1/2 in between."""
    helpers.use(backend)
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, -1.0]])

    def advantages(gamma: float, lam: float) -> list[float]:
        return gae(rewards, values, gamma=gamma, lam=lam, backend=backend).advantages[0].tolist()

    assert advantages(1.0, 1.0) == [3.0 - 0.5, 2.0 - 1.0, 2.0 + 1.0]
    assert advantages(1.0, 0.0) == [1.0 + 1.0 - 0.5, 0.0 - 1.0 - 1.0, 2.0 + 1.0]
    assert advantages(1.0, 0.5) == [1.5 + 0.5 * (-2.0 + 0.5 * 3.0), -2.0 + 0.5 * 3.0, 3.0]
    assert advantages(0.5, 1.0) == [1.5 - 0.5, 1.0 - 1.0, 2.0 + 1.0]
    assert advantages(0.0, 1.0) == [0.5, -1.0, 3.0]


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_value_after_the_end(backend):
    """As a last column, as an argument, and taken away by `terminated`."""
    helpers.use(backend)
    rewards, values = torch.randn(4, 6), torch.randn(4, 7)
    inside, after = values[:, :-1], values[:, -1]
    done = torch.tensor([True, False, True, False])
    whole = gae(rewards, values, backend=backend)
    given = gae(rewards, inside, bootstrap=after, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(whole, given, strict=True))
    ended = gae(rewards, values, terminated=done, backend=backend)
    zeroed = gae(rewards, inside, bootstrap=torch.where(done, 0, after), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(ended, zeroed, strict=True))
    last = torch.zeros(4, 6, dtype=torch.bool)
    last[:, -1] = done
    per_token = gae(rewards, values, terminated=last, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(ended, per_token, strict=True))
    assert not torch.equal(ended.returns, whole.returns)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("carry", (True, False))
def test_masked_tokens_may_hold_anything_and_give_zero(backend, carry):
    helpers.use(backend)
    rewards, values, mask = torch.randn(4, 9), torch.randn(4, 9), torch.rand(4, 9) > 0.4
    mask[2] = False
    want = gae(rewards, values, mask, carry_masked=carry, backend=backend)
    rewards[~mask], values[~mask] = math.nan, math.inf
    got = gae(
        rewards,
        values,
        mask.long(),
        terminated=~mask,  # an end that is masked is none
        carry_masked=carry,
        backend=backend,
    )
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b) and (a[~mask] == 0).all() and (a[mask] != 0).any()


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_nan_stays_in_the_past_of_its_episode(backend):
    """It reaches earlier tokens, not later ones, not across an end, not another sequence."""
    helpers.use(backend)
    rewards, values = torch.randn(3, 20), torch.randn(3, 20)
    ends = torch.zeros(3, 20, dtype=torch.bool)
    ends[1, 4] = True
    clean = gae(rewards, values, terminated=ends, backend=backend)
    rewards[1, 12] = math.nan
    got = gae(rewards, values, terminated=ends, backend=backend)
    spoiled = torch.zeros(3, 20, dtype=torch.bool)
    spoiled[1, 5:13] = True
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a.isnan(), spoiled) and torch.equal(a[~spoiled], b[~spoiled])


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("carry", (True, False))
def test_packed_padded_and_permuted_have_the_same_bits(backend, carry):
    helpers.use(backend)
    lengths = torch.tensor([20, 3, 0, 17, 20])
    inside = torch.arange(25) < lengths[:, None]
    rewards, values, mask = torch.randn(5, 25), torch.randn(5, 25), torch.rand(5, 25) > 0.2
    options = {"gamma": 0.9, "carry_masked": carry, "backend": backend}
    padded = gae(rewards, values, mask & inside, **options)
    ends = torch.cat((torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()))
    packed = gae(rewards[inside], values[inside], mask[inside], cu_seqlens=ends, **options)
    order = torch.tensor([3, 0, 4, 2, 1])
    turned = gae(rewards[order], values[order], (mask & inside)[order], **options)
    for a, b, c in zip(padded, packed, turned, strict=True):
        assert torch.equal(a[inside], b) and torch.equal(a[order], c)
        assert (a[~inside] == 0).all()


def test_bits_do_not_depend_on_threads():
    helpers.use("cpp")
    rewards, values = torch.randn(13, 900), torch.randn(13, 900)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(gae(rewards, values, backend="cpp"))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("shape", ((0, 4), (3, 0), (1, 1)), ids=str)
def test_nothing_and_almost_nothing(backend, shape):
    helpers.use(backend)
    rewards, values = torch.randn(shape), torch.randn(shape)
    out = gae(rewards, values, backend=backend)
    assert torch.equal(out.returns, rewards)  # one step at most: nothing comes after it
    torch.testing.assert_close(out.advantages, rewards - values)


def test_long_sums_keep_their_digits():
    """gamma = lam = 1 over 100,000 rewards: the running sum of cpp is a double."""
    helpers.use("cpp")
    rewards = torch.rand(1, 100_000)
    out = gae(rewards, torch.zeros(1, 100_000), lam=1.0, backend="cpp")
    want = rewards.double().flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(out.returns.double(), want, rtol=1.2e-7, atol=0)  # one rounding


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=helpers.dtype_id)
def test_half_precision_is_computed_in_float32(dtype):
    rewards, values = torch.randn(2, 8).to(dtype), torch.randn(2, 8).to(dtype)
    out = gae(rewards, values)
    assert out.advantages.dtype == torch.float32
    assert torch.equal(out.advantages, gae(rewards.float(), values.float()).advantages)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_there_is_no_gradient(backend):
    values = torch.randn(2, 8, requires_grad=True)
    after = torch.randn(2, requires_grad=True)
    out = gae(torch.randn(2, 8), values, bootstrap=after, backend=helpers.use(backend))
    assert not out.advantages.requires_grad and not out.returns.requires_grad


X = torch.zeros(2, 3)
BAD = {
    "rewards must be \\[B, T\\], got \\[6\\]": ((torch.zeros(6), torch.zeros(6)), {}),
    "rewards must be \\[total\\] with cu_seqlens": ((X, X), {"cu_seqlens": torch.tensor([0, 6])}),
    "cu_seqlens must rise from 0 to 6": (
        (torch.zeros(6), torch.zeros(6)),
        {"cu_seqlens": torch.tensor([0, 5])},
    ),
    "values must have shape \\[2, 3\\], the shape of rewards, or one": ((X, torch.zeros(2, 5)), {}),
    "rewards must be one of float32": ((X.long(), X), {}),
    "values must be a torch.Tensor": ((X, 1.0), {}),
    "mask must have shape \\[2, 3\\]": ((X, X, torch.ones(2, 2)), {}),
    "gamma must be in \\[0, 1\\], got 1.5": ((X, X), {"gamma": 1.5}),
    "lam must be in \\[0, 1\\], got -0.1": ((X, X), {"lam": -0.1}),
    "lam must be in \\[0, 1\\], got nan": ((X, X), {"lam": math.nan}),
    "lam must be in \\[0, 1\\] in every sequence, got 0.5 to 2": (
        (X, X),
        {"lam": torch.tensor([0.5, 2.0])},
    ),
    "gamma must be in \\[0, 1\\] in every sequence, got nan": (
        (X, X),
        {"gamma": torch.tensor([math.nan, 0.5])},
    ),
    "gamma must have shape \\[2\\]": ((X, X), {"gamma": torch.ones(3)}),
    "bootstrap must have shape \\[2\\]": ((X, X), {"bootstrap": torch.ones(3)}),
    "leave bootstrap=None": ((X, torch.zeros(2, 4)), {"bootstrap": torch.ones(2)}),
    "terminated must be one of bool": ((X, X), {"terminated": torch.ones(2)}),
    "terminated must have shape \\[2\\], one per sequence, or \\[2, 3\\]": (
        (X, X),
        {"terminated": torch.ones(3, dtype=torch.bool)},
    ),
    "it has no kernel for torch.float64": ((X.double(), X), {"backend": "triton"}),
}


@pytest.mark.parametrize("message", BAD, ids=lambda message: message[:40])
def test_bad_input_is_refused_by_name(message):
    arguments, options = BAD[message]
    with pytest.raises((TypeError, ValueError), match=message):
        gae(*arguments, **options)


@pytest.mark.slow
def test_compile_has_no_graph_break_and_no_recompile():
    """Padded with a last column, packed with per-sequence discounts; new sizes compile nothing."""
    from torch._dynamo.testing import CompileCounterWithBackend

    helpers.use("cpp")
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch._dynamo.reset()

    def both(rewards, values, mask, cu_seqlens, lam):
        flat = gae(rewards.flatten(), rewards.flatten(), cu_seqlens=cu_seqlens, lam=lam)
        return *gae(rewards, values, mask, gamma=0.9), *flat

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, fullgraph=True, backend=counter, dynamic=True)
    first = 0
    for batch, length in ((3, 5), (3, 5), (4, 9), (2, 30)):
        arguments = (
            torch.randn(batch, length),
            torch.randn(batch, length + 1),
            torch.rand(batch, length) > 0.3,
            torch.arange(batch + 1) * length,
            torch.rand(batch),
        )
        for a, b in zip(compiled(*arguments), both(*arguments), strict=True):
            assert torch.equal(a, b)
        # tracing may start again where it meets a scalar argument, before the first call returns
        first = first or counter.frame_count
    assert counter.frame_count == first <= 2
