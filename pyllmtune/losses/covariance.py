"""The two rules that look at a whole batch, as a pass before ``policy_loss`` ("The entropy
mechanism of reinforcement learning", Cui et al. 2025; verl's clip_cov and kl_cov).

Both rank tokens by the covariance ``(A - mean A)(logprob - mean logprob)``, means over the selected
tokens. Plain torch on the device, without a host sync.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyllmtune import _checks


def _covariance(logprobs: Tensor, advantages: Tensor, mask: Tensor | None):
    """Covariance and selection, ``[B, T]``, and the number of selected tokens."""
    _checks.check_tensor("logprobs", logprobs, _checks.FLOATS)
    select = _checks.as_mask(mask, logprobs.shape, logprobs.device, "the shape of logprobs")
    select = torch.ones_like(logprobs, dtype=torch.bool) if select is None else select
    lp = logprobs.detach()
    A = advantages if advantages.shape == logprobs.shape else advantages[:, None]
    _checks.check_like(
        "advantages",
        A.expand(logprobs.shape) if A.shape[:1] == logprobs.shape[:1] else A,
        logprobs.shape,
        logprobs.device,
        "one per sequence or the shape of logprobs",
    )
    select = select & lp.isfinite() & A.isfinite()
    count = select.sum()

    def centred(values: Tensor) -> Tensor:
        chosen = torch.where(select, values, 0.0)
        return torch.where(select, values - chosen.sum() / count.clamp(min=1), 0.0)

    return centred(A.expand_as(lp)) * centred(lp), select, count


def _largest(values: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The ``count`` largest values among some, bool; ``count`` stays on the device."""
    ranked = torch.where(among, values, -math.inf).reshape(-1)
    order = ranked.argsort(descending=True, stable=True)
    place = torch.empty_like(order).scatter_(
        0, order, torch.arange(len(order), device=order.device)
    )
    return among & (place.view(values.shape) < count)


def _share(fraction: float, count: Tensor) -> Tensor:
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    return (fraction * count.double()).long().clamp(min=1)


def clip_cov_weights(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    fraction: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Weights for the preset ``"verl.clip_cov"``: 0 for a random ``fraction`` (at least one) of the
    tokens, taken from those that PPO does not clip and whose covariance lies between ``low`` and
    ``high``; else 1. ``[B, T]``.

    >>> import torch
    >>> lp = torch.tensor([[-0.1, -4.0], [-4.0, -0.1]])
    >>> clip_cov_weights(lp, lp, torch.tensor([2.0, -2.0]), fraction=1.0)
    tensor([[0., 1.],
            [0., 1.]])
    """
    covariance, select, count = _covariance(logprobs, advantages, mask)
    A = advantages if advantages.shape == logprobs.shape else advantages[:, None]
    ratio = (logprobs.detach() - old_logprobs).exp()
    clipped = ((A > 0) & (ratio > 1 + eps_high)) | ((A < 0) & (ratio < 1 - eps_low))
    among = select & ~clipped & (covariance > low) & (covariance < high)
    drawn = torch.rand(logprobs.shape, generator=generator, device=logprobs.device)
    return (~_largest(drawn, among, _share(fraction, count))).to(logprobs.dtype)


def kl_cov_reference(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    fraction: float = 2e-4,
) -> Tensor:
    """Reference log-probs for the preset ``"verl.kl_cov"``: the old ones for the ``fraction`` of
    tokens (at least one) with the largest covariance, where ``|logprob - old|`` is penalised; the
    log-probs themselves elsewhere, where the penalty and its gradient are 0. ``[B, T]``.

    >>> import torch
    >>> lp = torch.tensor([[-0.1, -4.0, -2.0]])
    >>> kl_cov_reference(lp, lp - 1, torch.tensor([[2.0, 1.0, 1.5]]))
    tensor([[-0.1000, -5.0000, -2.0000]])
    """
    covariance, select, count = _covariance(logprobs, advantages, mask)
    chosen = _largest(covariance, select, _share(fraction, count))
    return torch.where(chosen, old_logprobs, logprobs.detach())
