"""group_advantages against a loop over groups, and its edges."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyllmtune import group_advantages
from pyllmtune.advantages import Baseline, Scale


def loop(rewards, ids, baseline, scale, eps, unbiased):
    """The definition, one group at a time."""
    out = torch.empty_like(rewards)
    for group in ids.unique():
        index = (ids == group).nonzero()[:, 0]
        values = rewards[index]
        n = len(index)
        for position, i in enumerate(index):
            others = torch.cat((values[:position], values[position + 1 :]))
            base = {
                "mean": values.mean(),
                "leave-one-out": others.mean() if n > 1 else values[0],
                "none": torch.zeros(()),
            }[baseline]
            spread = values if scale == "std" else rewards
            deviation = spread.std(unbiased=unbiased) if len(spread) > 1 else torch.zeros(())
            out[i] = (rewards[i] - base) / (1.0 if scale == "none" else deviation + eps)
    return out


@pytest.mark.parametrize("baseline", Baseline.__args__)
@pytest.mark.parametrize("scale", Scale.__args__)
@pytest.mark.parametrize("unbiased", (True, False))
def test_against_a_loop(baseline, scale, unbiased):
    rewards = torch.randn(17, dtype=torch.float64)
    ids = torch.tensor(
        [5, 5, -3, 9, 9, 9, 5, 100, 9, -3, -3, 5, 5, 2, 2, 9, 5]
    )  # sizes 6, 3, 5, 1, 2, any order
    got = group_advantages(
        rewards, ids, baseline=baseline, scale=scale, eps=1e-3, unbiased=unbiased
    )
    torch.testing.assert_close(got, loop(rewards, ids, baseline, scale, 1e-3, unbiased))


def test_group_size_is_consecutive_ids():
    rewards = torch.rand(12)
    ids = torch.arange(12) // 4
    for baseline, scale in itertools.product(Baseline.__args__, Scale.__args__):
        assert torch.equal(
            group_advantages(rewards, group_size=4, baseline=baseline, scale=scale),
            group_advantages(rewards, ids, baseline=baseline, scale=scale),
        )


def test_equal_rewards_and_single_answers_give_zero():
    assert torch.equal(group_advantages(torch.full((6,), 0.3), group_size=3), torch.zeros(6))
    assert torch.equal(group_advantages(torch.rand(4), group_size=1), torch.zeros(4))
    assert group_advantages(torch.empty(0), torch.empty(0, dtype=torch.long)).shape == (0,)


def test_a_group_does_not_see_another():
    """An infinite reward spoils its own group alone."""
    rewards = torch.tensor([1.0, 2.0, float("inf"), 0.0, 3.0])
    got = group_advantages(rewards, torch.tensor([0, 0, 1, 1, 0]))
    assert got[[0, 1, 4]].isfinite().all()
    torch.testing.assert_close(got[[0, 1, 4]], group_advantages(rewards[[0, 1, 4]], group_size=3))


BAD = {
    "exactly one of": (torch.rand(4), {}),
    "exactly one of group_ids= and": (
        torch.rand(4),
        {"group_size": 2, "group_ids": torch.zeros(4).long()},
    ),
    "group_size must divide the number of rewards, got 3 for 4": (torch.rand(4), {"group_size": 3}),
    "group_size must divide the number of rewards, got 0 for 4": (torch.rand(4), {"group_size": 0}),
    "rewards must be \\[B\\]": (torch.rand(2, 2), {"group_size": 2}),
    "rewards must be one of float32": (torch.ones(4).long(), {"group_size": 2}),
    "group_ids must have shape \\[4\\]": (torch.rand(4), {"group_ids": torch.zeros(3).long()}),
    "baseline must be one of mean": (torch.rand(4), {"group_size": 2, "baseline": "median"}),
    "scale must be one of std": (torch.rand(4), {"group_size": 2, "scale": "max"}),
}


@pytest.mark.parametrize("message", BAD, ids=lambda message: message[:40])
def test_bad_input_is_refused_by_name(message):
    rewards, options = BAD[message]
    with pytest.raises((TypeError, ValueError), match=message):
        group_advantages(rewards, **options)
