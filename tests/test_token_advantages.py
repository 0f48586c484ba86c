"""Rewards to go, whitening and what is made of them: against eager loops, and at their edges."""

from __future__ import annotations

import math

import pytest
import torch

from pyllmtune import (
    gae,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    remax_advantages,
    rewards_to_go,
    whiten,
)
from tests import helpers

BACKENDS = ("reference", "cpp")  # the op behind has its own tests on every floor


def whiten_loop(values, mask, unbiased=True, eps=1e-8, shift_mean=True):
    """Mean and variance of the selected, in Python floats."""
    kept = [
        x for x, on in zip(values.flatten().tolist(), mask.flatten().tolist(), strict=True) if on
    ]
    n = len(kept)
    mean = sum(kept) / n
    variance = sum((x - mean) ** 2 for x in kept) / (n - unbiased)
    white = (values - mean) / math.sqrt(variance + eps) + (0 if shift_mean else mean)
    return torch.where(mask, white, 0)


def resetting_loop(rewards, mask, gamma):
    """As verl's REINFORCE++: nothing comes back across a masked token."""
    running, out = torch.zeros(rewards.shape[0], dtype=rewards.dtype), torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        running = rewards[:, t] + gamma * running
        out[:, t] = running
        running = running * mask[:, t]
    return out * mask


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", (1.0, 0.9, 0.0))
def test_rewards_to_go_reset_at_masked_tokens(backend, gamma):
    rewards, mask = torch.randn(5, 17, dtype=torch.float64), torch.rand(5, 17) > 0.3
    got = rewards_to_go(
        rewards, mask, gamma=gamma, reset_at_masked=True, backend=helpers.use(backend)
    )
    torch.testing.assert_close(got, resetting_loop(rewards, mask, gamma))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", (1.0, 0.9, 0.0))
def test_rewards_to_go_pass_over_masked_tokens(backend, gamma):
    """What the selected tokens would get if the others were not there."""
    rewards, mask = torch.randn(3, 11, dtype=torch.float64), torch.rand(3, 11) > 0.4
    got = rewards_to_go(rewards, mask, gamma=gamma, backend=helpers.use(backend))
    for row in range(3):
        kept = rewards[row][mask[row]].tolist()
        want = [sum(gamma**i * r for i, r in enumerate(kept[t:])) for t in range(len(kept))]
        torch.testing.assert_close(
            got[row][mask[row]], torch.tensor(want, dtype=torch.float64).reshape(-1)
        )
    assert (got[~mask] == 0).all()


def test_rewards_to_go_are_gae_without_a_critic():
    rewards = torch.randn(4, 9)
    out = gae(rewards, torch.zeros(4, 9), gamma=0.9, lam=1.0)
    assert torch.equal(rewards_to_go(rewards, gamma=0.9), out.advantages)


@pytest.mark.parametrize("reset", (True, False))
def test_packed_rewards_to_go_are_the_padded_ones(reset):
    lengths = torch.tensor([7, 0, 3, 9])
    inside = torch.arange(9) < lengths[:, None]
    rewards, mask = torch.randn(4, 9), (torch.rand(4, 9) > 0.3) & inside
    ends = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    padded = rewards_to_go(rewards, mask, reset_at_masked=reset)
    packed = rewards_to_go(rewards[inside], mask[inside], reset_at_masked=reset, cu_seqlens=ends)
    assert torch.equal(padded[inside], packed)
    white = reinforce_plus_plus_advantages(rewards[inside], mask[inside], cu_seqlens=ends)
    torch.testing.assert_close(white, reinforce_plus_plus_advantages(rewards, mask)[inside])


@pytest.mark.parametrize("unbiased", (True, False))
@pytest.mark.parametrize("shift_mean", (True, False))
def test_whiten_against_a_loop(unbiased, shift_mean):
    values, mask = torch.randn(5, 8, dtype=torch.float64) * 3 + 2, torch.rand(5, 8) > 0.3
    options = {"unbiased": unbiased, "shift_mean": shift_mean, "eps": 1e-3}
    want = whiten_loop(values, mask, **options)
    torch.testing.assert_close(whiten(values, mask, **options), want)
    values[~mask] = math.nan
    got = whiten(values, mask.int(), **options)
    torch.testing.assert_close(got, want)
    assert (got[~mask] == 0).all()


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf), ids=str)
def test_whiten_leaves_out_what_is_not_finite(bad):
    values = torch.tensor([1.0, bad, 2.0, 3.0])
    assert torch.equal(whiten(values), whiten(values, torch.tensor([1, 0, 1, 1])))
    assert whiten(values)[1] == 0 and whiten(values, shift_mean=False)[1] == 0


@pytest.mark.parametrize("unbiased", (True, False))
def test_whiten_of_nothing_one_and_equal_values(unbiased):
    """verl raises for one; here it has no deviation and becomes 0."""
    assert whiten(torch.zeros(0), unbiased=unbiased).shape == (0,)
    nothing = whiten(torch.tensor([[3.0, math.nan]]), torch.zeros(1, 2), unbiased=unbiased)
    assert torch.equal(nothing, torch.zeros(1, 2))
    assert whiten(torch.tensor([3.0]), unbiased=unbiased) == 0
    assert whiten(torch.tensor([3.0]), unbiased=unbiased, shift_mean=False) == 3
    assert torch.equal(whiten(torch.full((4,), 0.5), unbiased=unbiased), torch.zeros(4))


def test_whiten_has_a_gradient():
    values = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 5) > 0.2
    assert torch.autograd.gradcheck(lambda x: whiten(x, mask), values)


@pytest.mark.parametrize("gamma", (1.0, 0.8))
def test_reinforce_plus_plus(gamma):
    rewards, mask = torch.randn(6, 9, dtype=torch.float64), torch.rand(6, 9) > 0.3
    want = whiten_loop(resetting_loop(rewards, mask, gamma), mask)
    got = reinforce_plus_plus_advantages(rewards, mask, gamma=gamma)
    torch.testing.assert_close(got, want)


def test_an_infinite_reward_does_not_undo_a_batch():
    rewards, mask = torch.randn(4, 6), torch.ones(4, 6)
    without = mask.clone()
    rewards[1, 3], without[1, :4] = math.inf, 0  # the tokens that it would be credited to
    got = reinforce_plus_plus_advantages(rewards, mask)
    torch.testing.assert_close(got, reinforce_plus_plus_advantages(rewards, without))


@pytest.mark.parametrize("singleton", ("zero", "raw"))
def test_reinforce_plus_plus_with_a_baseline(singleton):
    rewards = torch.randn(6, dtype=torch.float64)
    ids, mask = torch.tensor([3, 1, 3, 3, 1, 7]), torch.rand(6, 9) > 0.3
    centred = rewards.clone()
    for group in (1, 3):
        centred[ids == group] -= rewards[ids == group].mean()
    if singleton == "zero":
        centred[5] = 0
    want = whiten_loop(centred[:, None].expand(6, 9), mask)
    got = reinforce_plus_plus_baseline_advantages(rewards, mask, ids, singleton=singleton)
    torch.testing.assert_close(got, want)
    lengths = torch.tensor([9, 2, 0, 4, 9, 5])
    inside = torch.arange(9) < lengths[:, None]
    ends = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    padded = reinforce_plus_plus_baseline_advantages(rewards, mask & inside, ids)
    packed = reinforce_plus_plus_baseline_advantages(rewards, mask[inside], ids, cu_seqlens=ends)
    torch.testing.assert_close(packed, padded[inside])


def test_remax():
    rewards, mask = torch.randn(4, 7, dtype=torch.float64), torch.rand(4, 7) > 0.3
    greedy = torch.randn(4, dtype=torch.float64)
    to_go = (rewards * mask).flip(-1).cumsum(-1).flip(-1)
    want = torch.where(mask, to_go - greedy[:, None], 0)
    torch.testing.assert_close(remax_advantages(rewards, greedy, mask), want)
    ends = torch.arange(5) * 7
    packed = remax_advantages(rewards.flatten(), greedy, mask.flatten(), cu_seqlens=ends)
    torch.testing.assert_close(packed, want.flatten())
    rewards[~mask] = math.nan
    torch.testing.assert_close(remax_advantages(rewards, greedy, mask), want)


def test_bad_input_is_refused_by_name():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="rewards must be \\[B, T\\], got \\[6\\]"):
        rewards_to_go(torch.zeros(6), torch.ones(6), reset_at_masked=True)
    with pytest.raises(TypeError, match=r"rewards must be a torch\.Tensor, got list"):
        rewards_to_go([1.0])
    with pytest.raises(ValueError, match="mask must have shape \\[2, 3\\]"):
        rewards_to_go(x, torch.ones(3), reset_at_masked=True)
    with pytest.raises(ValueError, match="mask must have shape \\[2, 3\\], the shape of values"):
        whiten(x, torch.ones(3))
    with pytest.raises(TypeError, match="values must be one of float32"):
        whiten(x.long())
    with pytest.raises(ValueError, match="rewards must have shape \\[2\\], one per sequence"):
        reinforce_plus_plus_baseline_advantages(torch.zeros(4), x, group_size=2)
    with pytest.raises(ValueError, match="greedy_rewards must have shape \\[2\\]"):
        remax_advantages(x, torch.zeros(3))
