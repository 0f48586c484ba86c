"""gae, the specification, in eager torch: the recurrence, one step of time for all sequences.

Arguments are those of the operator (``pyllmtune/_ops.py``): per-token tensors are flat ``[total]``,
sequence ``i`` is ``offsets[i]:offsets[i + 1]``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    terminated: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    sequence_gamma: Tensor | None,
    sequence_lam: Tensor | None,
    carry_masked: bool,
) -> tuple[Tensor, Tensor]:
    """``(advantages, returns)``, each ``[total]``."""
    lengths = offsets.diff()  # [B]
    batch, longest = lengths.shape[0], int(lengths.max()) if lengths.numel() else 0
    inside = torch.arange(longest, device=offsets.device) < lengths[:, None]  # [B, T]

    def padded(flat: Tensor) -> Tensor:  # [total] -> [B, T]
        return flat.new_zeros(batch, longest).masked_scatter(inside, flat)

    selected = inside if mask is None else padded(mask)  # [B, T]
    ends = torch.zeros_like(inside) if terminated is None else padded(terminated) & selected
    reward = torch.where(selected, padded(rewards), 0)  # [B, T]  masked is no arithmetic
    value = torch.where(selected, padded(values), 0)  # [B, T]
    moves = selected if carry_masked else inside  # [B, T]  elsewhere the state is carried over
    by = gamma if sequence_gamma is None else sequence_gamma  # scalar or [B]
    weight = by * (lam if sequence_lam is None else sequence_lam)

    next_value = rewards.new_zeros(batch) if bootstrap is None else bootstrap  # [B]
    ahead = rewards.new_zeros(batch)  # [B]  the advantage of the next step
    advantages = torch.zeros_like(reward)  # [B, T]
    for t in reversed(range(longest)):
        stop = ends[:, t]
        delta = reward[:, t] + by * torch.where(stop, 0, next_value) - value[:, t]
        advantage = delta + weight * torch.where(stop, 0, ahead)
        next_value = torch.where(moves[:, t], value[:, t], next_value)
        ahead = torch.where(moves[:, t], advantage, ahead)
        advantages[:, t] = torch.where(selected[:, t], advantage, 0)
    return advantages[inside], torch.where(selected, advantages + value, 0)[inside]
