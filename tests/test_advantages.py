"""Advantages within groups: against loops over the groups, and at their edges."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pyllmtune import (
    GROUP_PRESETS,
    gpg_advantages,
    group_advantages,
    multi_objective_advantages,
    pass_at_k_advantages,
)
from pyllmtune.advantages.groups import Baseline, Scale, Singleton

# sizes 6, 3, 5, 1, 2, in any order
IDS = torch.tensor([5, 5, -3, 9, 9, 9, 5, 100, 9, -3, -3, 5, 5, 2, 2, 9, 5])
BAD = (math.nan, math.inf, -math.inf)


def std(values: list[float], unbiased: bool) -> float:
    if len(values) < 2:
        return 1.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - unbiased))


def loop(rewards, ids, baseline, scale, eps, unbiased, singleton="zero", lengths=None):
    """The definition, one answer at a time, in Python floats."""
    rewards, ids = rewards.tolist(), ids.tolist()
    lengths = [1.0] * len(rewards) if lengths is None else lengths.tolist()
    members = range(len(rewards))
    batch = [r for r in rewards if math.isfinite(r)]
    out = []
    for i, r in enumerate(rewards):
        if not math.isfinite(r):
            out.append(0.0)
            continue
        group = [j for j in members if ids[j] == ids[i] and math.isfinite(rewards[j])]
        values = [rewards[j] for j in group]
        others = [rewards[j] for j in group if j != i]
        if baseline == "none" or (not others and singleton == "raw"):
            base = 0.0
        elif not others:
            base = r
        elif baseline == "mean":
            base = sum(values) / len(values)
        elif baseline == "leave-one-out":
            base = sum(others) / len(others)
        else:
            base = sum(lengths[j] * rewards[j] for j in group) / sum(lengths[j] for j in group)
        spread = {"none": 1.0, "std": std(values, unbiased), "batch-std": std(batch, unbiased)}
        out.append((r - base) / (spread[scale] + (0.0 if scale == "none" else eps)))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("baseline", Baseline.__args__)
@pytest.mark.parametrize("scale", Scale.__args__)
@pytest.mark.parametrize("unbiased", (True, False))
@pytest.mark.parametrize("singleton", Singleton.__args__)
@pytest.mark.parametrize("broken", (False, True))
def test_against_a_loop(baseline, scale, unbiased, singleton, broken):
    rewards, lengths = torch.randn(17, dtype=torch.float64), torch.randint(1, 50, (17,))
    if broken:  # one of a group of six, two of three, all of two
        rewards[[0, 2, 9, 13, 14]] = torch.tensor([*BAD, math.nan, math.inf], dtype=torch.float64)
    options = {"baseline": baseline, "scale": scale, "eps": 1e-3, "unbiased": unbiased}
    options |= {"singleton": singleton, "lengths": lengths}
    got = group_advantages(rewards, IDS, **options)
    torch.testing.assert_close(got, loop(rewards, IDS, **options))


def test_group_size_is_consecutive_ids():
    rewards = torch.rand(12)
    ids = torch.arange(12) // 4
    for baseline, scale in itertools.product(("mean", "leave-one-out", "none"), Scale.__args__):
        assert torch.equal(
            group_advantages(rewards, group_size=4, baseline=baseline, scale=scale),
            group_advantages(rewards, ids, baseline=baseline, scale=scale),
        )


def test_equal_rewards_and_single_answers_give_zero():
    assert torch.equal(group_advantages(torch.full((6,), 0.25), group_size=3), torch.zeros(6))
    assert torch.equal(group_advantages(torch.rand(4), group_size=1), torch.zeros(4))
    empty = torch.empty(0), torch.empty(0, dtype=torch.long)
    for function in (group_advantages, gpg_advantages, pass_at_k_advantages):
        assert function(*empty).shape == (0,)
    assert multi_objective_advantages(torch.empty(0, 3), empty[1]).shape == (0,)


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("scale", Scale.__args__)
@pytest.mark.parametrize("baseline", ("mean", "leave-one-out", "none"))
def test_a_reward_that_is_not_finite_was_not_given(bad, scale, baseline):
    """The others get what they would get without it, under the batch's deviation too."""
    rewards = torch.tensor([1.0, 2.0, bad, 0.0, 3.0, 5.0])
    ids = torch.tensor([0, 0, 1, 1, 0, 1])
    got = group_advantages(rewards, ids, scale=scale, baseline=baseline)
    rest = torch.tensor([0, 1, 3, 4, 5])
    want = group_advantages(rewards[rest], ids[rest], scale=scale, baseline=baseline)
    assert got[2] == 0
    torch.testing.assert_close(got[rest], want)


def test_leave_one_out_of_trl_and_verl():
    """(k / (k - 1)) (r - mean): a group of one is 0, or its raw reward."""
    rewards = torch.tensor([1.0, 3.0, 8.0, 7.0])
    ids = torch.tensor([0, 0, 0, 1])
    options = {"baseline": "leave-one-out", "scale": "none"}
    got = group_advantages(rewards, ids, **options)
    torch.testing.assert_close(got, torch.tensor([-4.5, -1.5, 6.0, 0.0]))
    assert group_advantages(rewards, ids, singleton="raw", **options)[3] == 7.0


@pytest.mark.parametrize(
    "trainer, deviation, eps, alone",
    (
        ("trl", math.sqrt(1 / 3), 1e-4, 0.0),
        ("verl", math.sqrt(1 / 3), 1e-6, 5.0 / (1 + 1e-6)),
        ("nemo", math.sqrt(1 / 3), 1e-6, 0.0),
        ("openrlhf", math.sqrt(1 / 3), 1e-9, 0.0),
        ("open_instruct", math.sqrt(1 / 4), 1e-8, 0.0),
    ),
)
def test_presets(trainer, deviation, eps, alone):
    """Two of four right: the unbiased deviation is sqrt(1/3), the biased one 1/2."""
    rewards = torch.tensor([0.0, 1.0, 0.0, 1.0, 5.0], dtype=torch.float64)
    got = group_advantages(rewards, torch.tensor([0, 0, 0, 0, 1]), **GROUP_PRESETS[trainer])
    signs = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(got[:4], signs * 0.5 / (deviation + eps), rtol=1e-12, atol=0)
    assert got[4].item() == pytest.approx(alone, rel=1e-12)


def test_every_preset_is_tested():
    (mark,) = (m for m in test_presets.pytestmark if m.name == "parametrize")
    assert {row[0] for row in mark.args[1]} == set(GROUP_PRESETS)


@pytest.mark.parametrize("singleton", Singleton.__args__)
def test_gpg_against_a_loop(singleton):
    rewards = torch.randn(17, dtype=torch.float64) * (torch.rand(17) > 0.4)
    centred = loop(rewards, IDS, "mean", "none", 0.0, True, singleton)
    alpha = 17 / max(sum(r != 0 for r in rewards.tolist()), 1)
    got = gpg_advantages(rewards, IDS, norm=2.0, singleton=singleton)
    torch.testing.assert_close(got, alpha * centred / 2.0)
    assert torch.equal(gpg_advantages(torch.zeros(4), group_size=2), torch.zeros(4))


@pytest.mark.parametrize("scale", ("std", "none"))
@pytest.mark.parametrize("unbiased", (True, False))
def test_pass_at_k_against_a_loop(scale, unbiased):
    rewards = torch.randn(16, dtype=torch.float64)
    ids = torch.tensor([5, 5, -3, 9, 9, 9, 5, 9, -3, -3, 5, 5, 2, 2, 9, 5])
    want = torch.zeros_like(rewards)
    for group in set(ids.tolist()):
        members = [i for i in range(16) if ids[i] == group]
        first, second, *_ = sorted(members, key=lambda i: -rewards[i].item())
        lead = rewards[first] - rewards[second]
        values = [rewards[i].item() for i in members]
        want[first] = lead if scale == "none" else lead / (std(values, unbiased) + 1e-6)
    got = pass_at_k_advantages(rewards, ids, scale=scale, unbiased=unbiased)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_pass_at_k_at_its_edges(bad):
    """Two equal bests lead by nothing; what was not given is neither best nor second."""
    rewards = torch.tensor([3.0, 3.0, 1.0, bad, 5.0, 2.0, bad, 4.0, bad])
    got = pass_at_k_advantages(rewards, group_size=3, scale="none")
    assert got.tolist() == [0, 0, 0, 0, 3.0, 0, 0, 0, 0]
    assert pass_at_k_advantages(rewards, group_size=3).isfinite().all()
    for ids in (torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3]), None):
        with pytest.raises(ValueError, match="pass@k needs groups of at least 2"):
            pass_at_k_advantages(rewards, ids, group_size=1 if ids is None else None)


def objectives_loop(rewards, weights, size, aggregation):
    """GDPO and its rival as TRL's trainer defines them: a group after the other."""
    total = torch.zeros(len(rewards), dtype=torch.float64)
    for start in range(0, len(rewards), size):
        rows = slice(start, start + size)
        for k, weight in enumerate(weights):
            values = rewards[rows, k]
            if aggregation == "normalize-then-sum":
                values = (values - values.mean()) / (values.std() + 1e-4)
            total[rows] += weight * values
    pieces = [total] if aggregation == "normalize-then-sum" else total.split(size)
    return torch.cat([(piece - piece.mean()) / (piece.std() + 1e-4) for piece in pieces])


@pytest.mark.parametrize("aggregation", ("normalize-then-sum", "sum-then-normalize"))
def test_several_rewards_against_a_loop(aggregation):
    rewards = torch.randn(12, 3, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1])
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    want = objectives_loop(rewards, weights, 4, aggregation)
    got = multi_objective_advantages(
        rewards, group_size=4, weights=weights, aggregation=aggregation
    )
    torch.testing.assert_close(got, want)
    order = torch.randperm(12)
    by_id = multi_objective_advantages(
        rewards[order], order // 4, weights=weights, aggregation=aggregation
    )
    torch.testing.assert_close(by_id, want[order])


@pytest.mark.parametrize("aggregation", ("normalize-then-sum", "sum-then-normalize"))
def test_a_missing_reward_adds_nothing_and_an_answer_without_any_gets_zero(aggregation):
    """A reward of zero weight, and a missing one in a column that is otherwise equal, are alike."""
    rewards = torch.tensor([[1.0, 7.0], [4.0, math.nan], [2.0, 7.0], [math.inf, math.nan]])
    got = multi_objective_advantages(rewards, group_size=4, aggregation=aggregation)
    assert got.isfinite().all() and got[3] == 0
    if aggregation == "normalize-then-sum":
        alone = multi_objective_advantages(rewards[:, :1], group_size=4)
        torch.testing.assert_close(got, alone)


def test_normalising_first_keeps_a_rare_reward():
    """Why GDPO: summed first, (1, 0) and (0, 1) are the same answer."""
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    summed = multi_objective_advantages(rewards, group_size=4, aggregation="sum-then-normalize")
    apart = multi_objective_advantages(rewards, group_size=4)
    assert summed[0] == summed[1] and apart[0] > apart[1]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_dtypes(dtype):
    rewards = torch.rand(6).to(dtype)
    for function in (group_advantages, gpg_advantages, pass_at_k_advantages):
        got = function(rewards, group_size=3)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got, function(rewards.to(got.dtype), group_size=3))


def test_compiles_as_one_graph():
    def all_of_them(rewards, ids):
        return (
            group_advantages(rewards, ids),
            gpg_advantages(rewards, ids),
            pass_at_k_advantages(rewards, ids),
            multi_objective_advantages(rewards[:, None].expand(-1, 2), ids),
        )

    torch._dynamo.reset()
    compiled = torch.compile(all_of_them, fullgraph=True, backend="eager")
    rewards, ids = torch.randn(8), torch.arange(8) // 3
    for got, want in zip(compiled(rewards, ids), all_of_them(rewards, ids), strict=True):
        torch.testing.assert_close(got, want)


REFUSED = {
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
    "singleton must be one of zero": (torch.rand(4), {"group_size": 2, "singleton": "nan"}),
    "needs lengths=": (torch.rand(4), {"group_size": 2, "baseline": "length-weighted"}),
    "lengths must have shape \\[4\\]": (
        torch.rand(4),
        {"group_size": 2, "baseline": "length-weighted", "lengths": torch.ones(3)},
    ),
}


@pytest.mark.parametrize("message", REFUSED, ids=lambda message: message[:40])
def test_bad_input_is_refused_by_name(message):
    rewards, options = REFUSED[message]
    with pytest.raises((TypeError, ValueError), match=message):
        group_advantages(rewards, **options)


def test_bad_objectives_are_refused_by_name():
    with pytest.raises(ValueError, match="rewards must be \\[B, K\\]"):
        multi_objective_advantages(torch.rand(4), group_size=2)
    with pytest.raises(ValueError, match="weights must have shape \\[3\\]"):
        multi_objective_advantages(torch.rand(4, 3), group_size=2, weights=torch.ones(2))
    with pytest.raises(ValueError, match="aggregation must be one of normalize-then-sum"):
        multi_objective_advantages(torch.rand(4, 3), group_size=2, aggregation="sum")
    with pytest.raises(ValueError, match="scale must be one of std, none"):
        pass_at_k_advantages(torch.rand(4), group_size=2, scale="batch-std")
