"""verl's policy losses and advantage estimators on our ops, under names of their own.

    import pyllmtune.integrations.verl
    pyllmtune.integrations.verl.register()

in every worker (verl's ``external_lib``, for example), then ``policy_loss.loss_mode:
pyllmtune.vanilla`` and ``algorithm.adv_estimator: pyllmtune.rloo``. Names, options and numbers are
verl's. Its trainer calls its own ``gae`` and ``grpo`` without the registry; ``pyllmtune.grpo`` is
one of ours all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyllmtune import advantages
from pyllmtune.losses.config import PolicyLossConfig
from pyllmtune.losses.covariance import clip_cov_weights, kl_cov_reference
from pyllmtune.ops.policy_loss import policy_loss

PREFIX = "pyllmtune."


def register() -> list[str]:
    """Put our functions into verl's two registries; again is harmless.

    Returns:
        The names, all of which begin with ``pyllmtune.``.

    Raises:
        ImportError: verl is not installed.
        RuntimeError: verl's registries are not where they are expected.
    """
    from verl.trainer.ppo import core_algos

    for name in ("POLICY_LOSS_REGISTRY", "ADV_ESTIMATOR_REGISTRY"):
        if not isinstance(getattr(core_algos, name, None), dict):
            raise RuntimeError(f"expected a dict verl.trainer.ppo.core_algos.{name}, found none")
    core_algos.POLICY_LOSS_REGISTRY |= {PREFIX + name: run for name, run in LOSSES.items()}
    core_algos.ADV_ESTIMATOR_REGISTRY |= {PREFIX + name: run for name, run in ESTIMATORS.items()}
    return [PREFIX + name for name in (*LOSSES, *ESTIMATORS)]


def _divisor(mode: str, mask: Tensor, batch: dict[str, Any]) -> tuple[str, Tensor | float]:
    """verl's aggregation as ours, and what it divides by; ``batch`` is its global_batch_info."""
    ranks = batch.get("dp_size") or 1
    if mode == "token-mean":
        tokens = batch.get("batch_num_tokens")
        return mode, (mask.sum() if tokens is None else tokens) / ranks
    if mode == "token-sum":
        return "constant", 1.0 / ranks
    sequences = batch.get("global_batch_size")
    count = (mask.any(-1).sum() if sequences is None else sequences) / ranks
    if mode == "seq-mean-token-sum-norm":
        return "seq-mean-token-sum", count * (batch.get("loss_scale_factor") or mask.shape[-1])
    if mode in ("seq-mean-token-sum", "seq-mean-token-mean"):
        return mode, count
    raise ValueError(f"loss_agg_mode must be one of verl's, got {mode!r}")


def _widths(config: Any) -> dict[str, float]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return {
        "eps_low": config.clip_ratio if low is None else low,
        "eps_high": config.clip_ratio if high is None else high,
    }


def _bounded(config: Any) -> dict[str, float]:
    return {**_widths(config), "cap": config.clip_ratio_c}


def _taus(config: Any) -> dict[str, Any]:
    return {"sapo_tau": (config.tau_pos, config.tau_neg)}


def _policy_loss(preset: str, options: Callable[[Any], dict[str, Any]], mode: str | None = None):
    """A function with the signature of verl's registry.

    Args:
        preset: of ``PolicyLossConfig.preset``.
        options: fields of it that verl's actor config sets.
        mode: the aggregation that verl takes whatever is configured.
    """

    def compute(
        old_log_prob: Tensor,  # [B, T], as all that follow
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        mask = response_mask.bool()
        given: dict[str, Tensor | None] = {"weights": rollout_is_weights}
        pair = (log_prob, old_log_prob, advantages, mask)
        if preset == "verl.clip_cov":
            own = config.policy_loss
            chosen = clip_cov_weights(
                *pair,
                fraction=own.clip_cov_ratio,
                low=own.clip_cov_lb,
                high=own.clip_cov_ub,
                **_widths(config),
            )
            given["weights"] = chosen if rollout_is_weights is None else chosen * rollout_is_weights
        elif preset == "verl.kl_cov":
            if rollout_is_weights is not None:
                raise ValueError(
                    "pyllmtune.kl_cov has no rollout_is_weights: verl weights the penalty with the "
                    "loss, policy_loss does not; leave the correction out or use verl's kl_cov"
                )
            fraction = config.policy_loss.kl_cov_ratio
            given["ref_logprobs"] = kl_cov_reference(*pair, fraction=fraction)
        elif preset == "verl.gmpo" and rollout_is_weights is not None:
            length = mask.sum(-1, keepdim=True).clamp(min=1)
            logs = torch.where(mask, (rollout_is_weights + 1e-10).log(), 0.0)
            given["weights"] = (logs.sum(-1, keepdim=True) / length).exp().expand_as(log_prob)
        batch = {} if preset == "verl.gmpo" else config.global_batch_info
        aggregation, divisor = _divisor(mode or loss_agg_mode, mask, batch)
        if preset == "verl.gmpo":  # a plain mean over the rows, whatever they hold
            divisor = float(len(mask))
        chosen_config = PolicyLossConfig.preset(
            preset, **{"aggregation": aggregation, **options(config)}
        )
        loss, metrics = policy_loss(*pair, normalizer=divisor, config=chosen_config, **given)
        found = metrics.to_dict()
        return loss, {
            "actor/pg_clipfrac": found["clip_low_fraction"] + found["clip_high_fraction"],
            "actor/ppo_kl": found["approx_kl"],
            "actor/pg_clipfrac_lower": found["clip_cap_fraction"],
        }

    return compute


LOSSES = {
    "vanilla": _policy_loss("verl.vanilla", _bounded),
    "gspo": _policy_loss("verl.gspo", _widths),
    "cispo": _policy_loss("verl.cispo", _widths),
    "sapo": _policy_loss("verl.sapo", _taus, mode="seq-mean-token-mean"),
    "dppo_tv": _policy_loss("verl.dppo_tv", _bounded),
    "dppo_kl": _policy_loss("verl.dppo_kl", _bounded),
    "gpg": _policy_loss("verl.gpg", lambda config: {}),
    "geo_mean": _policy_loss("verl.gmpo", _widths, mode="seq-mean-token-mean"),
    "clip_cov": _policy_loss("verl.clip_cov", _widths),
    "kl_cov": _policy_loss(
        "verl.kl_cov", lambda config: {"kl_coef": config.policy_loss.ppo_kl_coef}
    ),
}


def _ids(index: Any, device: torch.device) -> Tensor:
    """Group ids ``[B]`` from verl's array of any hashable names."""
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(one, len(numbers)) for one in index], device=device)


def _of_answers(advantage: Callable[..., Tensor]):
    """An estimator of one reward an answer: the sum of its tokens', given to each of them."""

    def estimate(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Any,
        config: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        rewards, ids = token_level_rewards.sum(-1), _ids(index, token_level_rewards.device)
        spread = advantage(rewards, ids, response_mask, config)[:, None] * response_mask
        return spread, spread

    return estimate


def _scale(config: Any) -> str:
    normed = config is None or config.get("norm_adv_by_std_in_grpo", True)
    return "std" if normed else "none"


def _grpo(rewards: Tensor, ids: Tensor, mask: Tensor, config: Any) -> Tensor:
    options = {**advantages.GROUP_PRESETS["verl"], "scale": _scale(config)}
    return advantages.group_advantages(rewards, ids, **options)


def _rloo(rewards: Tensor, ids: Tensor, mask: Tensor, config: Any) -> Tensor:
    return advantages.group_advantages(
        rewards, ids, baseline="leave-one-out", scale="none", singleton="raw"
    )


def _opo(rewards: Tensor, ids: Tensor, mask: Tensor, config: Any) -> Tensor:
    return advantages.group_advantages(
        rewards,
        ids,
        baseline="length-weighted",
        scale="none",
        lengths=mask.sum(-1).float(),
        singleton="raw",
    )


def _passk(rewards: Tensor, ids: Tensor, mask: Tensor, config: Any) -> Tensor:
    return advantages.pass_at_k_advantages(rewards, ids, scale=_scale(config))


def _gpg(rewards: Tensor, ids: Tensor, mask: Tensor, config: Any) -> Tensor:
    return advantages.gpg_advantages(rewards, ids)


def _reinforce_plus_plus(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    returns = advantages.rewards_to_go(
        token_level_rewards, response_mask.bool(), gamma=config.gamma
    )
    return advantages.whiten(returns, response_mask.bool()), returns


def _reinforce_plus_plus_baseline(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, **_: Any
) -> tuple[Tensor, Tensor]:
    white = advantages.reinforce_plus_plus_baseline_advantages(
        token_level_rewards.sum(-1),
        response_mask.bool(),
        _ids(index, token_level_rewards.device),
    )
    return white, white


def _remax(
    token_level_rewards: Tensor, reward_baselines: Tensor, response_mask: Tensor, **_: Any
) -> tuple[Tensor, Tensor]:
    mask = response_mask.bool()
    rewards = torch.where(mask, token_level_rewards, 0.0)
    return (
        advantages.remax_advantages(rewards, reward_baselines, mask),
        advantages.rewards_to_go(rewards),
    )


ESTIMATORS = {
    "grpo": _of_answers(_grpo),
    "rloo": _of_answers(_rloo),
    "opo": _of_answers(_opo),
    "grpo_passk": _of_answers(_passk),
    "gpg": _of_answers(_gpg),
    "reinforce_plus_plus": _reinforce_plus_plus,
    "reinforce_plus_plus_baseline": _reinforce_plus_plus_baseline,
    "remax": _remax,
}
