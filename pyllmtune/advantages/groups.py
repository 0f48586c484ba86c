"""Advantages of whole answers within their group, the answers to one question: one reward an
answer, no loop over groups, no host sync.

One rule everywhere: a reward that is not finite was not given. It counts in no size, mean or
deviation, of its group or of the batch, and its advantage is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pyllmtune import _checks

Baseline = Literal["mean", "leave-one-out", "length-weighted", "none"]
Scale = Literal["std", "batch-std", "none"]
Singleton = Literal["zero", "raw"]
Aggregation = Literal["normalize-then-sum", "sum-then-normalize"]

# options of group_advantages under which GRPO is that of a trainer
GROUP_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "trl": MappingProxyType({"eps": 1e-4}),
        "verl": MappingProxyType({"eps": 1e-6, "singleton": "raw"}),
        "nemo": MappingProxyType({"eps": 1e-6}),
        "openrlhf": MappingProxyType({"eps": 1e-9}),
        "open_instruct": MappingProxyType({"eps": 1e-8, "unbiased": False}),
    }
)


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    group_size: int | None = None,
    baseline: Baseline = "mean",
    scale: Scale = "std",
    eps: float = 1e-4,
    unbiased: bool = True,
    lengths: Tensor | None = None,
    singleton: Singleton = "zero",
) -> Tensor:
    """Advantage of each answer within its group: ``(reward - baseline) / (deviation + eps)``.

    ``**GROUP_PRESETS["verl"]`` and so on set ``eps``, ``unbiased`` and ``singleton`` as a trainer
    does.

    Args:
        rewards: ``[B]``, any float dtype; one per answer. One that is not finite was not given: it
            counts in no statistic, and its advantage is 0.
        group_ids: ``[B]`` int, equal ids form a group; groups may differ in size and be in any
            order.
        group_size: groups are consecutive runs of this many answers. Exactly one of the two is
            given.
        baseline: ``"mean"`` of the group (GRPO), ``"leave-one-out"``, the mean of the others
            (RLOO), ``"length-weighted"``, ``sum(length * reward) / sum(length)`` (OPO), or
            ``"none"``.
        scale: divide by the standard deviation of the group plus ``eps`` (GRPO), of the whole
            batch, or not at all (Dr. GRPO, the lecture).
        eps: added to the standard deviation.
        unbiased: n - 1 in the variance.
        lengths: ``[B]``, tokens of each answer, for ``"length-weighted"``.
        singleton: what a group of one gets, which has no deviation (1 is used): ``"zero"``, its
            reward is its own baseline (TRL, NeMo), or ``"raw"``, it has none (verl).

    Returns:
        ``[B]`` float32 (float64 for float64). A group of equal rewards gets 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: not exactly one of ``group_ids`` and ``group_size``, they do not fit the
            rewards, an unknown word, or ``lengths`` missing.

    >>> import torch
    >>> group_advantages(torch.tensor([0.9, 0.5, 0.2]), group_size=3, scale="none")
    tensor([ 0.3667, -0.0333, -0.3333])
    """
    for name, value, choices in (
        ("baseline", baseline, Baseline),
        ("scale", scale, Scale),
        ("singleton", singleton, Singleton),
    ):
        _check_word(name, value, get_args(choices))
    groups = _groups(rewards, group_ids, group_size)
    reward, size, mean = groups.reward, groups.size, groups.mean
    alone = size <= 1  # [B]
    if baseline == "mean":
        advantages = reward - mean
    elif baseline == "leave-one-out":
        advantages = (reward - mean) * size / (size - 1).clamp(min=1)
    elif baseline == "length-weighted":
        advantages = reward - _length_weighted_mean(groups, lengths)
    else:
        advantages = reward
    if baseline != "none":
        advantages = torch.where(alone, 0 if singleton == "zero" else reward, advantages)
    if scale != "none":
        deviation = groups.deviation(unbiased) if scale == "std" else groups.of_batch(unbiased)
        advantages = advantages / (deviation + eps)
    return groups.given_only(advantages)


def gpg_advantages(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    group_size: int | None = None,
    norm: float = 1.0,
    singleton: Singleton = "raw",
) -> Tensor:
    """GPG (Chu et al. 2025): ``alpha (reward - group mean) / norm``, with ``alpha = B / number of
    rewards that are not 0`` making up for questions without a signal. Arguments as in
    ``group_advantages``; the defaults are verl's.

    >>> import torch
    >>> gpg_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), group_size=2)  # alpha 4
    tensor([ 2., -2.,  0.,  0.])
    """
    centred = group_advantages(
        rewards, group_ids, group_size=group_size, scale="none", singleton=singleton
    )
    given = rewards.isfinite()
    nonzero = (given & (rewards != 0)).sum().clamp(min=1)
    alpha = given.sum().to(centred.dtype) / nonzero
    return alpha * centred / norm


def pass_at_k_advantages(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    group_size: int | None = None,
    scale: Literal["std", "none"] = "std",
    eps: float = 1e-6,
    unbiased: bool = True,
) -> Tensor:
    """Pass@k (Tang et al. 2025): the best answer of a group gets its lead over the second best, the
    others 0. Arguments as in ``group_advantages``.

    Raises:
        ValueError: besides the rest, a group has fewer than two answers (of ``group_ids`` on a GPU
            this is not looked at, and such a group gets 0).

    >>> import torch
    >>> pass_at_k_advantages(torch.tensor([0.2, 1.0, 0.7]), group_size=3, scale="none")
    tensor([0.0000, 0.3000, 0.0000])
    """
    _check_word("scale", scale, ("std", "none"))
    groups = _groups(rewards, group_ids, group_size)
    looked_at = group_size is not None or rewards.device.type == "cpu"
    if looked_at and not torch.compiler.is_compiling() and rewards.numel():
        members = group_size if group_size is not None else int(groups.index.bincount().min())
        if members < 2:
            raise ValueError(f"pass@k needs groups of at least 2 answers, got one of {members}")
    best = groups.extreme(torch.where(groups.given, groups.reward, -torch.inf))  # [B]
    # of equal bests the first, as a position; their lead is 0 anyway
    position = torch.arange(rewards.shape[0], device=rewards.device)
    leads = groups.given & (groups.reward == best)
    first = -groups.extreme(torch.where(leads, -position.to(best.dtype), -torch.inf))
    leader = leads & (position == first)
    second = groups.extreme(torch.where(groups.given & ~leader, groups.reward, -torch.inf))
    lead = torch.where(leader & (groups.size > 1), groups.reward - second, 0)
    if scale == "std":
        lead = lead / (groups.deviation(unbiased) + eps)
    return lead


def multi_objective_advantages(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    group_size: int | None = None,
    weights: Tensor | None = None,
    aggregation: Aggregation = "normalize-then-sum",
    eps: float = 1e-4,
    unbiased: bool = True,
) -> Tensor:
    """Advantages from several rewards an answer (GDPO). Arguments as in ``group_advantages``.

    Args:
        rewards: ``[B, K]``. One that is not finite was not given: it adds nothing to its answer and
            enters no statistic. An answer without any gets 0.
        weights: ``[K]``, of each reward; 1 by default.
        aggregation: ``"normalize-then-sum"`` (GDPO): each reward by its own group mean and
            deviation, weighted sum, then mean and deviation of the batch; rare rewards keep their
            say. ``"sum-then-normalize"`` (GRPO): weighted sum, then mean and deviation of the
            group.

    >>> import torch
    >>> rewards = torch.tensor([[0.0, 10.0], [0.0, 20.0], [1.0, 0.0]])
    >>> multi_objective_advantages(rewards, group_size=3, weights=torch.tensor([1.0, 0.5]))
    tensor([-0.9316, -0.1247,  1.0563])
    >>> multi_objective_advantages(rewards, group_size=3, aggregation="sum-then-normalize")
    tensor([-0.0351,  1.0171, -0.9820])
    """
    _checks.check_tensor("rewards", rewards, _checks.FLOATS)
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be [B, K], got {list(rewards.shape)}")
    _check_word("aggregation", aggregation, get_args(Aggregation))
    batch, kinds = rewards.shape
    if weights is not None:
        _checks.check_tensor("weights", weights, _checks.FLOATS)
        of = "one per column of rewards"
        _checks.check_like("weights", weights, torch.Size((kinds,)), rewards.device, of)
    index = _group_index(
        rewards[:, 0] if kinds else rewards.new_zeros(batch), group_ids, group_size
    )
    wide = rewards if rewards.dtype == torch.float64 else rewards.float()
    options = {"eps": eps, "unbiased": unbiased}
    parts = wide
    if aggregation == "normalize-then-sum":
        # reward k of group g is a group of its own
        separate = index[:, None] * kinds + torch.arange(kinds, device=index.device)
        flat = group_advantages(wide.reshape(-1), separate.reshape(-1), **options)
        parts = flat.reshape(batch, kinds)
    given = rewards.isfinite()  # [B, K]
    weighted = parts if weights is None else parts * weights.to(wide.dtype)
    summed = torch.where(given, weighted, 0).sum(-1)  # [B]
    summed = torch.where(given.any(-1), summed, torch.nan)  # not given
    if aggregation == "normalize-then-sum":
        index = torch.zeros_like(index)  # the batch is one group
    return group_advantages(summed, index, **options)


class _Groups(NamedTuple):
    """Rewards, 0 where not given, and what they are compared with; each ``[B]``."""

    reward: Tensor
    given: Tensor
    index: Tensor  # in [0, B), equal within a group
    size: Tensor  # of those given
    mean: Tensor

    def total(self, values: Tensor) -> Tensor:
        """Sum of each answer's group."""
        return torch.zeros_like(values).index_add(0, self.index, values)[self.index]

    def extreme(self, values: Tensor) -> Tensor:
        """Maximum of each answer's group."""
        lowest = torch.full_like(values, -torch.inf)
        return lowest.scatter_reduce(0, self.index, values, "amax")[self.index]

    def given_only(self, values: Tensor) -> Tensor:
        return torch.where(self.given, values, 0)

    def deviation(self, unbiased: bool) -> Tensor:
        """Of each answer's group; 1 where it has only one."""
        squares = self.total(self.given_only((self.reward - self.mean) ** 2))
        return _deviation(squares, self.size, unbiased)

    def of_batch(self, unbiased: bool) -> Tensor:
        """Of all the rewards around their common mean, 0-d."""
        count = self.given.sum().to(self.reward.dtype)
        mean = self.reward.sum() / count.clamp(min=1)
        squares = self.given_only((self.reward - mean) ** 2).sum()
        return _deviation(squares, count, unbiased)


def _deviation(squares: Tensor, count: Tensor, unbiased: bool) -> Tensor:
    spread = (squares / (count - int(unbiased)).clamp(min=1)).sqrt()
    return torch.where(count > 1, spread, 1)


def _groups(rewards: Tensor, group_ids: Tensor | None, group_size: int | None) -> _Groups:
    _checks.check_tensor("rewards", rewards, _checks.FLOATS)
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be [B], one per answer, got {list(rewards.shape)}")
    index = _group_index(rewards, group_ids, group_size)
    given = rewards.isfinite()
    wide = rewards if rewards.dtype == torch.float64 else rewards.float()
    groups = _Groups(torch.where(given, wide, 0), given, index, wide, wide)
    size = groups.total(given.to(wide.dtype))
    return groups._replace(size=size, mean=groups.total(groups.reward) / size.clamp(min=1))


def _length_weighted_mean(groups: _Groups, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        raise ValueError(
            "baseline='length-weighted' needs lengths=, the number of tokens of each answer"
        )
    _checks.check_tensor("lengths", lengths, (torch.int64, torch.int32, *_checks.FLOATS))
    _checks.check_like(
        "lengths", lengths, groups.reward.shape, groups.reward.device, "one per reward"
    )
    length = groups.given_only(lengths.to(groups.reward.dtype))
    tokens = groups.total(length)
    weighted = groups.total(length * groups.reward)
    return torch.where(tokens > 0, weighted / tokens, groups.mean)  # no tokens at all: plain mean


def _check_word(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _group_index(rewards: Tensor, group_ids: Tensor | None, group_size: int | None) -> Tensor:
    """``[B]`` int64 in ``[0, B)``, equal within a group; found by a sort, so without a host
    sync.
    """
    batch = rewards.shape[0]
    if (group_ids is None) == (group_size is None):
        raise ValueError("give exactly one of group_ids= and group_size=")
    if group_size is not None:
        if group_size < 1 or batch % group_size:
            raise ValueError(
                f"group_size must divide the number of rewards, got {group_size} for {batch}"
            )
        return torch.arange(batch, device=rewards.device) // group_size
    _checks.check_tensor("group_ids", group_ids, (torch.int64, torch.int32))
    _checks.check_like("group_ids", group_ids, rewards.shape, rewards.device, "one per reward")
    ordered, order = group_ids.sort()
    fresh = torch.zeros_like(ordered, dtype=torch.int64)
    fresh[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(fresh).scatter_(0, order, fresh.cumsum(0))
