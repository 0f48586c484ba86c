"""Every loss as a module, for people who compose modules: options in the constructor, tensors in
``forward``. And the lm_head as one.

The options, their defaults and their meaning are those of the function of the same name. Type
checkers see the arguments of ``forward`` in a call of the module, where torch declares any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pyllmtune._backend import Backend
from pyllmtune.logprob_head import LogprobHead as LogprobHead
from pyllmtune.losses.config import Aggregation, KlEstimator, Level, PolicyLossConfig
from pyllmtune.losses.dpo import dpo_loss
from pyllmtune.losses.dpo_types import LossType
from pyllmtune.losses.f_divergence import FDivergence
from pyllmtune.losses.kto import kto_loss
from pyllmtune.losses.ppo import grpo_loss, ppo_clip_loss
from pyllmtune.losses.preference import preference_loss
from pyllmtune.losses.reference_free import CPOType, cpo_loss, orpo_loss, simpo_loss
from pyllmtune.losses.reinforce import reinforce_loss
from pyllmtune.losses.sequences import Reduction
from pyllmtune.losses.value import Aggregation as ValueAggregation
from pyllmtune.losses.value import ValueLossOutput, value_loss
from pyllmtune.ops.linear_policy_loss import linear_policy_loss
from pyllmtune.ops.policy_loss import PolicyLossOutput, policy_loss

_DEFAULT = PolicyLossConfig()


@dataclass(eq=False, repr=False, kw_only=True)
class _Loss(nn.Module):
    """A dataclass whose fields are the options of a function."""

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def options(self) -> dict[str, Any]:
        """What the function is called with, beside the tensors."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


@dataclass(eq=False, repr=False, kw_only=True)
class PolicyLoss(_Loss):
    """``policy_loss`` under one configuration.

    >>> import torch
    >>> loss = PolicyLoss(config=PolicyLossConfig(eps_high=0.3))
    >>> old = torch.zeros(1, 1)
    >>> loss(old + 1.0, old, torch.tensor([2.0])).loss  # ratio e, bounded by 1.3
    tensor(-2.6000)
    """

    config: PolicyLossConfig = _DEFAULT
    backend: Backend = "auto"

    def forward(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor | None = None,
        **tensors: Tensor | float | None,
    ) -> PolicyLossOutput:
        """``tensors``: cu_seqlens, ref_logprobs, entropy, weights, normalizer."""
        return policy_loss(logprobs, old_logprobs, advantages, mask, **tensors, **self.options)

    if TYPE_CHECKING:
        __call__ = forward


@dataclass(eq=False, repr=False, kw_only=True)
class LinearPolicyLoss(_Loss):
    """``linear_policy_loss`` under one configuration; the lm_head's weight comes with the call.

    >>> import torch
    >>> hidden, weight = torch.zeros(1, 1, 2), torch.zeros(4, 2)  # four tokens, alike
    >>> old = torch.full((1, 1), 0.5).log()
    >>> LinearPolicyLoss()(hidden, weight, torch.tensor([[3]]), old, torch.tensor([1.0])).loss
    tensor(-0.5000)
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    config: PolicyLossConfig = _DEFAULT
    workspace_bytes: int | None = None
    backend: Backend = "auto"

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor | None = None,
        **tensors: Tensor | float | None,
    ) -> PolicyLossOutput:
        """``tensors``: bias, temperature, cu_seqlens, ref_logprobs, weights, normalizer."""
        given = (hidden, weight, tokens, old_logprobs, advantages, mask)
        return linear_policy_loss(*given, **tensors, **self.options)

    if TYPE_CHECKING:
        __call__ = forward


@dataclass(eq=False, repr=False, kw_only=True)
class PPOClipLoss(_Loss):
    """``ppo_clip_loss``."""

    eps: float = 0.2
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    aggregation: Aggregation = "token-mean"
    backend: Backend = "auto"

    def forward(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor | None = None,
        **tensors: Tensor | float | None,
    ) -> PolicyLossOutput:
        """``tensors``: cu_seqlens, entropy, normalizer."""
        return ppo_clip_loss(logprobs, old_logprobs, advantages, mask, **tensors, **self.options)

    if TYPE_CHECKING:
        __call__ = forward


@dataclass(eq=False, repr=False, kw_only=True)
class GRPOLoss(_Loss):
    """``grpo_loss``."""

    eps_low: float = 0.2
    eps_high: float = 0.2
    kl_coef: float = 0.0
    kl: KlEstimator = "k3"
    entropy_coef: float = 0.0
    level: Level = "token"
    delta: float | None = None
    aggregation: Aggregation = "token-mean"
    preset: str | None = None
    backend: Backend = "auto"

    def forward(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor | None = None,
        **tensors: Tensor | float | None,
    ) -> PolicyLossOutput:
        """``tensors``: cu_seqlens, ref_logprobs, entropy, weights, normalizer."""
        return grpo_loss(logprobs, old_logprobs, advantages, mask, **tensors, **self.options)

    if TYPE_CHECKING:
        __call__ = forward


@dataclass(eq=False, repr=False, kw_only=True)
class ReinforceLoss(_Loss):
    """``reinforce_loss``."""

    entropy_coef: float = 0.0
    aggregation: Aggregation = "seq-mean-token-sum"
    backend: Backend = "auto"

    def forward(
        self,
        logprobs: Tensor,
        rewards: Tensor,
        mask: Tensor | None = None,
        **tensors: Tensor | float | None,
    ) -> PolicyLossOutput:
        """``tensors``: cu_seqlens, entropy, normalizer."""
        return reinforce_loss(logprobs, rewards, mask, **tensors, **self.options)

    if TYPE_CHECKING:
        __call__ = forward


@dataclass(eq=False, repr=False, kw_only=True)
class ValueLoss(_Loss):
    """``value_loss``; with ``clip``, the call needs ``old_values=``.

    >>> import torch
    >>> ValueLoss(clip=0.5)(torch.ones(1, 1), torch.zeros(1, 1), old_values=torch.ones(1, 1)).loss
    tensor(0.5000)
    """

    clip: float | None = None
    aggregation: ValueAggregation = "token-mean"

    def forward(
        self,
        values: Tensor,
        returns: Tensor,
        mask: Tensor | None = None,
        **tensors: Tensor | float | None,
    ) -> ValueLossOutput:
        """``tensors``: old_values, cu_seqlens, normalizer."""
        return value_loss(values, returns, mask, **tensors, **self.options)

    if TYPE_CHECKING:
        __call__ = forward


@dataclass(eq=False, repr=False, kw_only=True)
class PreferenceLoss(_Loss):
    """``preference_loss``."""

    margin: float | Tensor = 0.0
    center: float = 0.0
    reduction: Reduction = "mean"

    def forward(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference_loss(chosen, rejected, **self.options)

    if TYPE_CHECKING:
        __call__ = forward


@dataclass(eq=False, repr=False, kw_only=True)
class DPOLoss(_Loss):
    """``dpo_loss``.

    >>> DPOLoss(loss_type="robust", label_smoothing=0.1).label_smoothing
    0.1
    """

    beta: float = 0.1
    loss_type: LossType = "sigmoid"
    label_smoothing: float = 0.0
    f_divergence: FDivergence = "reverse_kl"
    alpha: float = 1.0
    discopop_tau: float = 0.05
    reduction: Reduction = "mean"

    def forward(
        self,
        chosen_logprobs: Tensor,
        rejected_logprobs: Tensor,
        ref_chosen_logprobs: Tensor | None = None,
        ref_rejected_logprobs: Tensor | None = None,
        **tensors: Tensor | None,
    ) -> Tensor:
        """``tensors``: chosen_lengths, rejected_lengths, weights."""
        reference = (ref_chosen_logprobs, ref_rejected_logprobs)
        return dpo_loss(chosen_logprobs, rejected_logprobs, *reference, **tensors, **self.options)

    if TYPE_CHECKING:
        __call__ = forward


@dataclass(eq=False, repr=False, kw_only=True)
class SimPOLoss(_Loss):
    """``simpo_loss``; with ``alpha``, AlphaPO."""

    beta: float = 2.0
    gamma: float = 0.5
    alpha: float = 0.0
    label_smoothing: float = 0.0
    reduction: Reduction = "mean"

    def forward(
        self,
        chosen_logprobs: Tensor,
        rejected_logprobs: Tensor,
        chosen_lengths: Tensor,
        rejected_lengths: Tensor,
    ) -> Tensor:
        lengths = (chosen_lengths, rejected_lengths)
        return simpo_loss(chosen_logprobs, rejected_logprobs, *lengths, **self.options)

    if TYPE_CHECKING:
        __call__ = forward


@dataclass(eq=False, repr=False, kw_only=True)
class CPOLoss(_Loss):
    """``cpo_loss``."""

    beta: float = 0.1
    loss_type: CPOType = "sigmoid"
    label_smoothing: float = 0.0
    nll_coef: float = 1.0
    reduction: Reduction = "mean"

    def forward(
        self, chosen_logprobs: Tensor, rejected_logprobs: Tensor, chosen_lengths: Tensor
    ) -> Tensor:
        return cpo_loss(chosen_logprobs, rejected_logprobs, chosen_lengths, **self.options)

    if TYPE_CHECKING:
        __call__ = forward


@dataclass(eq=False, repr=False, kw_only=True)
class ORPOLoss(_Loss):
    """``orpo_loss``."""

    beta: float = 0.1
    nll_coef: float = 1.0
    reduction: Reduction = "mean"

    def forward(
        self,
        chosen_logprobs: Tensor,
        rejected_logprobs: Tensor,
        chosen_lengths: Tensor,
        rejected_lengths: Tensor,
    ) -> Tensor:
        lengths = (chosen_lengths, rejected_lengths)
        return orpo_loss(chosen_logprobs, rejected_logprobs, *lengths, **self.options)

    if TYPE_CHECKING:
        __call__ = forward


@dataclass(eq=False, repr=False, kw_only=True)
class KTOLoss(_Loss):
    """``kto_loss``."""

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reduction: Reduction = "mean"

    def forward(
        self,
        logprobs: Tensor,
        desirable: Tensor,
        ref_logprobs: Tensor | None = None,
        *,
        mismatched_logratios: Tensor | None = None,
    ) -> Tensor:
        return kto_loss(
            logprobs,
            desirable,
            ref_logprobs,
            mismatched_logratios=mismatched_logratios,
            **self.options,
        )

    if TYPE_CHECKING:
        __call__ = forward
