"""The common policy losses by name: thin calls of ``policy_loss``."""

from __future__ import annotations

from torch import Tensor

from pyllmtune._backend import Backend
from pyllmtune.losses.config import Aggregation, KlEstimator, Level, PolicyLossConfig
from pyllmtune.ops.policy_loss import PolicyLossOutput, policy_loss


def ppo_clip_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    eps: float = 0.2,
    dual_clip: float | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    aggregation: Aggregation = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> PolicyLossOutput:
    """PPO's clipped objective (Schulman et al. 2017), token level; arguments as in ``policy_loss``.

    Args:
        eps: clip width on both sides.
        dual_clip: bound of the ratio for negative advantages (Ye et al. 2020), above ``1 + eps``.

    >>> import torch
    >>> lp = torch.tensor([[1.5]]).log()  # against an old log-prob of 0: ratio 1.5, clipped to 1.2
    >>> ppo_clip_loss(lp, torch.zeros(1, 1), torch.tensor([1.0])).loss
    tensor(-1.2000)
    """
    config = PolicyLossConfig(
        eps_low=eps, eps_high=eps, cap=dual_clip, entropy_coef=entropy_coef, aggregation=aggregation
    )
    return policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        cu_seqlens=cu_seqlens,
        entropy=entropy,
        normalizer=normalizer,
        config=config,
        backend=backend,
    )


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    kl_coef: float = 0.0,
    kl: KlEstimator = "k3",
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    weights: Tensor | None = None,
    level: Level = "token",
    delta: float | None = None,
    aggregation: Aggregation = "token-mean",
    preset: str | None = None,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> PolicyLossOutput:
    """GRPO (Shao et al. 2024): clipped ratio, group-relative advantages, k3 penalty; arguments as
    in ``policy_loss``.

    ``level="sequence"`` is GSPO; ``aggregation="seq-mean-token-mean"`` is the original length
    normalisation, ``"constant"`` Dr. GRPO's.

    Args:
        eps_low: lower clip width.
        eps_high: upper clip width; larger than ``eps_low`` is DAPO's "clip higher".
        kl_coef: weight of the penalty; 0 leaves it out, a reference given all the same is measured.
        delta: bound of the ratio for negative advantages.
        preset: the loss of a trainer by its name, ``"trl.dapo"`` or ``"lecture"`` for example
            (``docs/policy_loss_presets.md``). It replaces ``eps_low`` to ``aggregation``;
            ``PolicyLossConfig.preset(name, eps_low=0.1)`` changes some of it.

    >>> import torch
    >>> lp = torch.log(torch.tensor([[0.15]]))
    >>> old = torch.log(torch.tensor([[0.10]]))
    >>> grpo_loss(lp, old, torch.tensor([0.4]), eps_high=1.0).loss  # ratio 1.5 times 0.4
    tensor(-0.6000)
    """
    config = PolicyLossConfig(
        level=level,
        eps_low=eps_low,
        eps_high=eps_high,
        cap=delta,
        kl=kl if kl_coef != 0.0 else "none",
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        aggregation=aggregation,
    )
    if preset is not None:
        if config != PolicyLossConfig():
            raise ValueError(
                f"preset={preset!r} sets every option of the loss; to change some, pass "
                f"config=PolicyLossConfig.preset({preset!r}, ...) to policy_loss"
            )
        config = PolicyLossConfig.preset(preset)
    return policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        cu_seqlens=cu_seqlens,
        ref_logprobs=ref_logprobs,
        entropy=entropy,
        weights=weights,
        normalizer=normalizer,
        config=config,
        backend=backend,
    )
