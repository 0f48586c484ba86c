"""Advantages of tokens: what is still to come of the reward, and whitening over the tokens of a
batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyllmtune import _checks
from pyllmtune._backend import Backend
from pyllmtune._sequences import sequence_offsets
from pyllmtune.advantages.groups import Singleton, group_advantages
from pyllmtune.ops.gae import gae


def rewards_to_go(
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    reset_at_masked: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Discounted sum of the rewards from each token on: ``G_t = r_t + gamma G_{t+1}``. It is
    ``gae`` without a critic and with ``lam=1``, and runs on that op.

    Args:
        rewards: ``[B, T]``, or packed ``[total]`` with ``cu_seqlens``, any float dtype.
        mask: true selects; masked rewards do not count and masked results are 0.
        gamma: discount in [0, 1], or one per sequence ``[B]``.
        reset_at_masked: nothing flows back across a masked token (REINFORCE++ of verl). Otherwise
            it is passed over, without a discount.
        cu_seqlens: ``[B + 1]`` int, cumulative lengths starting at 0, for packed tensors.
        backend: as in ``gae``.

    Returns:
        The shape of ``rewards``, float32 (float64 for float64), without gradient.

    >>> import torch
    >>> rewards_to_go(torch.tensor([[1.0, 0.0, 4.0]]), gamma=0.5)
    tensor([[2., 2., 4.]])
    """
    _checks.check_tensor("rewards", rewards, _checks.FLOATS)
    ends = None
    if mask is not None and reset_at_masked:
        sequence_offsets("rewards", rewards, cu_seqlens)  # refuses what has no next token
        selected = _checks.as_mask(mask, rewards.shape, rewards.device, "the shape of rewards")
        ends = torch.zeros_like(selected)
        ends[..., :-1] = ~selected[..., 1:]  # nothing comes after the last one of a sequence anyway
    nothing = torch.zeros_like(rewards)
    out = gae(
        rewards,
        nothing,
        mask,
        gamma=gamma,
        lam=1.0,
        terminated=ends,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    return out.returns


def whiten(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """``(x - mean) / sqrt(variance + eps)`` over all selected elements.

    An element that is not finite is treated as masked, so that one overflow does not undo a batch.
    No element gives an empty statistic; a single one has variance 0 and becomes 0.

    Args:
        values: any shape and float dtype.
        mask: true selects; of the shape of ``values``. Masked elements may hold anything.
        shift_mean: False adds the mean again (TRL's rewards).
        unbiased: n - 1 in the variance.
        eps: added to the variance.

    Returns:
        The shape of ``values``, float32 (float64 for float64), 0 where masked.

    >>> import torch
    >>> whiten(torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([1, 1, 1, 0]))
    tensor([-1.,  0.,  1.,  0.])
    """
    _checks.check_tensor("values", values, _checks.FLOATS)
    keep = values.isfinite()
    select = _checks.as_mask(mask, values.shape, values.device, "the shape of values")
    if select is not None:
        keep = keep & select
    wide = values if values.dtype == torch.float64 else values.float()
    x = torch.where(keep, wide, 0)
    count = keep.sum().to(x.dtype)
    mean = x.sum() / count.clamp(min=1)
    centred = torch.where(keep, x - mean, 0)
    variance = (centred**2).sum() / (count - int(unbiased)).clamp(min=1)
    white = centred * (variance + eps).rsqrt()
    return white if shift_mean else torch.where(keep, white + mean, 0)


def reinforce_plus_plus_advantages(
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    unbiased: bool = True,
    eps: float = 1e-8,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """REINFORCE++ (Hu et al. 2025): discounted reward-to-go, reset at masked tokens, whitened over
    the tokens of the batch. Arguments as in ``rewards_to_go`` and ``whiten``; a KL penalty belongs
    into the rewards.

    >>> import torch
    >>> reinforce_plus_plus_advantages(torch.tensor([[0.0, 1.0], [0.0, 0.0]])).round(decimals=3)
    tensor([[ 0.8660,  0.8660],
            [-0.8660, -0.8660]])
    """
    to_go = rewards_to_go(
        rewards, mask, gamma=gamma, reset_at_masked=True, cu_seqlens=cu_seqlens, backend=backend
    )
    return whiten(to_go, mask, unbiased=unbiased, eps=eps)


def reinforce_plus_plus_baseline_advantages(
    rewards: Tensor,
    mask: Tensor,
    group_ids: Tensor | None = None,
    *,
    group_size: int | None = None,
    singleton: Singleton = "raw",
    unbiased: bool = True,
    eps: float = 1e-8,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """REINFORCE++ with a baseline: reward minus group mean, given to each token of the answer, then
    whitened over the tokens of the batch, so long answers weigh more. Arguments as in
    ``group_advantages`` and ``whiten``; the defaults are verl's.

    Args:
        rewards: ``[B]``, one per answer.
        mask: ``[B, T]``, or packed ``[total]`` with ``cu_seqlens``; its shape is the result's.

    >>> import torch
    >>> ones = torch.ones(2, 2)
    >>> reinforce_plus_plus_baseline_advantages(torch.tensor([1.0, 0.0]), ones, group_size=2)
    tensor([[ 0.8660,  0.8660],
            [-0.8660, -0.8660]])
    """
    centred = group_advantages(
        rewards, group_ids, group_size=group_size, scale="none", singleton=singleton
    )
    spread = _each_token("rewards", centred, mask, cu_seqlens)
    return whiten(spread, mask, unbiased=unbiased, eps=eps)


def remax_advantages(
    rewards: Tensor,
    greedy_rewards: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """ReMax (Li et al. 2023): reward-to-go minus the reward of the greedy answer to the same
    question. Arguments as in ``rewards_to_go``.

    Args:
        rewards: of the tokens, ``[B, T]`` or packed ``[total]``.
        greedy_rewards: ``[B]``.

    >>> import torch
    >>> remax_advantages(torch.tensor([[0.0, 1.0]]), torch.tensor([0.25]))
    tensor([[0.7500, 0.7500]])
    """
    to_go = rewards_to_go(rewards, mask, cu_seqlens=cu_seqlens, backend=backend)
    _checks.check_tensor("greedy_rewards", greedy_rewards, _checks.FLOATS)
    greedy = greedy_rewards.detach().to(to_go.dtype)
    advantages = to_go - _each_token("greedy_rewards", greedy, to_go, cu_seqlens)
    select = _checks.as_mask(mask, rewards.shape, rewards.device, "the shape of rewards")
    return advantages if select is None else torch.where(select, advantages, 0)


def _each_token(name: str, answers: Tensor, tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``[B]`` to the shape of ``tokens``, ``[B, T]`` or packed ``[total]``."""
    offsets = sequence_offsets("tokens", tokens, cu_seqlens)
    batch = torch.Size((offsets.shape[0] - 1,))
    _checks.check_like(name, answers, batch, tokens.device, "one per sequence")
    if cu_seqlens is None:
        return answers[:, None].expand(tokens.shape)
    place = torch.arange(tokens.shape[0], device=offsets.device)
    return answers[torch.bucketize(place, offsets[1:], right=True)]
