"""The policy loss of TRL's ``GRPOTrainer`` by :func:`pyllmtune.policy_loss`.

TRL writes the loss as two dozen operations over ``[B, T]`` and reads up to seven numbers for its
log from the device, one by one. Here loss, gradient and the sums of the log are one pass, and the
log is one read. What our op does not express runs in TRL's own function, whole: see
:func:`_expressible`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from pyllmtune import _backend
from pyllmtune.losses.config import PolicyLossConfig
from pyllmtune.losses.metrics import SUMS
from pyllmtune.ops.policy_loss import policy_loss

# what the model may get beside the tokens
_MODEL_INPUTS = (
    *("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes"),
    *("num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"),
)
_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def compute_loss(original: Any) -> Any:
    """What replaces ``GRPOTrainer._compute_loss``."""

    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not _expressible(self, inputs):
            return original(self, model, inputs)
        logprobs, entropy = _score(self, model, inputs)
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        old = inputs.get("old_per_token_logps")
        old = logprobs.detach() if old is None else old
        advantages = inputs["advantages"]
        if advantages.dim() == 2:
            advantages = advantages.expand_as(logprobs)
        out = policy_loss(
            logprobs,
            old,
            advantages,
            mask,
            ref_logprobs=inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
            entropy=entropy.detach(),
            weights=_weights(self, inputs, logprobs.detach(), old, entropy.detach(), mask),
            normalizer=_normalizer(self, inputs, mask),
            config=_config_of(self),
        )
        with torch.no_grad():
            clipped = _clipped(self, logprobs, old, advantages, mask)
            _log(self, clipped, mask, out.metrics.vector)
        return out.loss

    return _compute_loss


def _expressible(trainer: Any, inputs: dict[str, Any]) -> bool:
    """Whether our op computes this loss. It does not: the entropy bonus, which is a mean of its own
    with a controller; the router's loss; VESPO, whose log shows a weight that our op keeps to
    itself; bounds that are none (cispo's ratio of at most 0.9); answers of one token, which TRL
    averages without their mask; devices where only the reference would run.
    """
    completion = inputs["completion_ids"]
    return (
        _bounded(trainer)
        and trainer.importance_sampling_level in ("token", "sequence")
        and not trainer._entropy_bonus_enabled
        and not trainer.aux_loss_enabled
        and completion.shape[1] > 1
        and _backend.resolve("auto", completion.device, torch.float32) != "reference"
    )


def _bounded(trainer: Any) -> bool:
    """Whether the loss is one of ours, with bounds that are some."""
    if trainer.loss_type in _CLIPPED:
        high, delta = 1.0 + trainer.epsilon_high, trainer.args.delta
        return 0.0 <= trainer.epsilon_low <= 1.0 <= high and (delta is None or delta > high)
    if trainer.loss_type == "cispo":
        return trainer.epsilon_high >= 1.0
    return trainer.loss_type == "sapo" and all(0.0 < tau <= 80.0 for tau in _taus(trainer))


def _taus(trainer: Any) -> tuple[float, float]:
    return trainer.args.sapo_temperature_pos, trainer.args.sapo_temperature_neg


def _config_of(trainer: Any) -> PolicyLossConfig:
    return _config(
        trainer.loss_type,
        trainer.importance_sampling_level,
        trainer.epsilon_low,
        trainer.epsilon_high,
        trainer.args.delta,
        _taus(trainer),
        trainer.beta,
        trainer.args.use_bias_correction_kl,
    )


@functools.lru_cache
def _config(
    loss_type: str,
    level: str,
    low: float,
    high: float,
    delta: float | None,
    taus: tuple[float, float],
    beta: float,
    corrected: bool,
) -> PolicyLossConfig:
    changes: dict[str, Any] = {"level": level}
    if loss_type == "cispo":
        changes["eps_high"] = high - 1.0
    elif loss_type == "sapo":
        changes["sapo_tau"] = taus
    else:
        changes |= {"eps_low": low, "eps_high": high, "cap": delta}
    if beta != 0.0:
        kl_gradient = "ratio" if corrected else "plain"
        changes |= {"kl": "k3", "kl_coef": beta, "kl_gradient": kl_gradient}
    return PolicyLossConfig.preset(f"trl.{loss_type}", **changes)


def _score(trainer: Any, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of the answers' tokens, ``[B, T]`` each."""
    pairs = (("prompt_ids", "completion_ids"), ("prompt_mask", "completion_mask"))
    tokens, attention = (torch.cat([inputs[name] for name in pair], dim=1) for pair in pairs)
    logprobs, entropy, _ = trainer._get_per_token_logps_and_entropies(
        model,
        tokens,
        attention,
        inputs["completion_ids"].shape[1],
        compute_entropy=True,
        compute_aux_loss=False,
        **{name: inputs.get(name) for name in _MODEL_INPUTS},
    )
    return logprobs, entropy


def _weights(
    trainer: Any,
    inputs: dict[str, Any],
    logprobs: Tensor,
    old: Tensor,
    entropy: Tensor,
    mask: Tensor,
) -> Tensor | None:
    """The factors on the policy term: masks of sequences and tokens, importance weights."""
    factors = []
    if trainer.off_policy_mask_threshold is not None:
        advantages = inputs["advantages"]
        factors.append(
            trainer.get_off_policy_mask(
                advantages=advantages[:, None] if advantages.dim() == 1 else advantages,
                per_token_logps=logprobs,
                sampling_per_token_logps=inputs.get("sampling_per_token_logps", old),
                mask=mask,
                off_policy_threshold=trainer.off_policy_mask_threshold,
            )
        )
    if trainer.top_entropy_quantile < 1.0:
        quantile = 1.0 - trainer.top_entropy_quantile
        factors.append(trainer.get_high_entropy_mask(entropy, mask, quantile))
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        factors.append(inputs["importance_sampling_ratio"])
    if not factors:
        return None
    return functools.reduce(torch.mul, factors).to(logprobs.dtype)


def _normalizer(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> float | Tensor:
    """What TRL divides by; in evaluation nothing is accumulated."""
    train = trainer.model.training
    accumulated = trainer.current_gradient_accumulation_steps if train else 1.0
    rows = mask.shape[0]
    if trainer.loss_type == "bnpo":
        return mask.sum().clamp(min=1.0) * accumulated
    if trainer.loss_type == "dr_grpo":
        return rows * trainer.max_completion_length * accumulated
    if trainer.loss_type in ("cispo", "dapo"):
        items = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        return items * (accumulated / trainer.args.steps_per_generation) if train else items
    return rows * accumulated


def _clipped(
    trainer: Any, logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor | None:
    """Whether the ratio lies beyond the bound that the advantage pushes it to, lower and upper:
    ``[2, B, T]``, or ``[2, B, 1]`` of sequences; None where the log does not show it.
    """
    if trainer.loss_type == "sapo":
        return None
    log_ratio = logprobs - old
    if trainer.importance_sampling_level == "sequence":
        length = mask.sum(-1, keepdim=True).clamp(min=1.0)
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / length
    ratio = log_ratio.exp()
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    high = trainer.epsilon_high + (0.0 if trainer.loss_type == "cispo" else 1.0)
    below = (ratio < 1.0 - trainer.epsilon_low) & (advantages < 0)
    return torch.stack((below, (ratio > high) & (advantages > 0)))


def _log(trainer: Any, clipped: Tensor | None, mask: Tensor, sums: Tensor) -> None:
    """The metrics under TRL's names: one sum over the processes, one gather, one read."""
    columns = [sums[SUMS.index("kl_ref")], sums[SUMS.index("entropy")], mask.sum()]
    if clipped is not None:
        where = mask if clipped.shape[-1] == mask.shape[-1] else torch.ones_like(mask[:, :1])
        counts = (clipped * where).sum(-1)  # [2, B]
        columns += [where.sum(), *counts.sum(-1)]
    numbers = torch.stack([column.double() for column in columns])
    numbers = trainer.accelerator.reduce(numbers, reduction="sum")
    if trainer.loss_type in _CLIPPED:
        shares = trainer.accelerator.gather((counts / where.sum(-1)).T.contiguous())  # [B, 2]
        shares = shares.double()
        least, most = shares[:, 0].nan_to_num(torch.inf).min(), shares[:, 1].nan_to_num(-1.0).max()
        numbers = torch.cat((numbers, torch.stack((least, most))))
    kl, entropy, tokens, *rest = numbers.tolist()
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]

    def log(name: str, total: float, count: float = 1.0) -> None:
        metrics[name].append(total / max(count, 1.0))

    if trainer.beta != 0.0:
        log("kl", kl, tokens)
    log("entropy", entropy, tokens)
    if trainer.loss_type == "cispo":
        places, _, above = rest
        log("cispo_clip_ratio", above, places)
    elif clipped is not None:
        places, below, above, least, most = rest
        log("clip_ratio/low_mean", below, places)
        log("clip_ratio/high_mean", above, places)
        log("clip_ratio/region_mean", below + above, places)
        # no sequence with a token: TRL logs NaN, which its averages leave out
        log("clip_ratio/low_min", least if least <= 1.0 else math.nan)
        log("clip_ratio/high_max", most if most >= 0.0 else math.nan)
