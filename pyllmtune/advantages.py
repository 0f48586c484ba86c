"""Advantages from rewards: group-relative ones (GRPO, RLOO). Vectors of the batch, plain torch, no
loop over groups.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pyllmtune import _checks

Baseline = Literal["mean", "leave-one-out", "none"]
Scale = Literal["std", "batch-std", "none"]


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    group_size: int | None = None,
    baseline: Baseline = "mean",
    scale: Scale = "std",
    eps: float = 1e-4,
    unbiased: bool = True,
) -> Tensor:
    """Advantage of each answer within its group, the answers to one question.

    Args:
        rewards: ``[B]``, any float dtype; one per answer.
        group_ids: ``[B]`` int, equal ids form a group; groups may differ in size and be in any
            order.
        group_size: groups are consecutive runs of this many answers. Exactly one of the two is
            given.
        baseline: ``"mean"`` of the group (GRPO), ``"leave-one-out"``, the mean of the others
            (RLOO), or ``"none"``.
        scale: divide by the standard deviation of the group plus ``eps`` (GRPO), of the whole
            batch, or not at all (Dr. GRPO, the lecture).
        eps: added to the standard deviation. TRL uses 1e-4, verl 1e-6.
        unbiased: n - 1 in the variance; a group of one has deviation 0.

    Returns:
        ``[B]`` float32 (float64 for float64). A group of one, or of equal rewards, gets 0 (with
        ``baseline="none"``, reward / (0 + eps)).

    Raises:
        TypeError: rewards are not floating point.
        ValueError: not exactly one of ``group_ids`` and ``group_size``, or they do not fit the
            rewards.

    >>> import torch
    >>> group_advantages(torch.tensor([0.9, 0.5, 0.2]), group_size=3, scale="none")
    tensor([ 0.3667, -0.0333, -0.3333])
    """
    _checks.check_tensor("rewards", rewards, _checks.FLOATS)
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be [B], one per answer, got {list(rewards.shape)}")
    for name, value, choices in (("baseline", baseline, Baseline), ("scale", scale, Scale)):
        if value not in choices.__args__:
            raise ValueError(f"{name} must be one of {', '.join(choices.__args__)}, got {value!r}")
    group = _group_index(rewards, group_ids, group_size)  # [B], in [0, B)
    reward = rewards if rewards.dtype == torch.float64 else rewards.float()

    def per_group(values: Tensor) -> Tensor:  # [B] -> sum of each answer's group, [B]
        return torch.zeros_like(values).index_add(0, group, values)[group]

    size = per_group(torch.ones_like(reward))  # [B]
    mean = per_group(reward) / size
    centred = reward - mean
    if baseline == "mean":
        advantages = centred
    elif baseline == "leave-one-out":
        advantages = centred * size / (size - 1).clamp(min=1)
    else:
        advantages = reward
    if scale == "none":
        return advantages
    if scale == "std":
        squares, count = per_group(centred**2), size
    else:
        count = torch.full_like(reward, reward.shape[0])
        squares = ((reward - reward.mean()) ** 2).sum().expand_as(reward)
    deviation = (squares / (count - int(unbiased)).clamp(min=1)).sqrt()
    return advantages / (deviation + eps)


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
