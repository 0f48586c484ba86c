"""Liger-Kernel's fused linear GRPO loss on our ops: its class name, its constructor, its call.

    from pyllmtune.integrations.liger import LigerFusedLinearGRPOLoss

in place of the import from ``liger_kernel.chunked_loss``. Liger need not be installed.
"""

from __future__ import annotations

import warnings
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from pyllmtune import _checks
from pyllmtune._backend import Backend
from pyllmtune.losses.config import PolicyLossConfig
from pyllmtune.losses.metrics import SUMS
from pyllmtune.ops.linear_policy_loss import linear_policy_loss
from pyllmtune.ops.linear_token_logprobs import linear_token_logprobs
from pyllmtune.ops.policy_loss import PolicyLossOutput, policy_loss

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
ImportanceSamplingLevel = Literal["token", "sequence"]

_UNCLIPPED = ("cispo", "sapo", "vespo")  # their own rules in place of PPO's bounds
_PER_BATCH_TOKEN = ("dapo", "cispo", "vespo")  # divided by the tokens of the generation batch
_MASKS = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(eq=False, repr=False)
class LigerFusedLinearGRPOLoss(nn.Module):
    """``linear_policy_loss`` with the constructor, the call and the results of
    ``liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss`` (0.8.5).

    What differs from Liger's numbers:

    - ``"luspo"`` is TRL's: the sum over the tokens of an answer, the mean over answers. Liger takes
      the mean over the padded row, padding included, times the length; without padding, and at
      sequence level without a penalty and weights per token, that is the same.
    - Masks select. Liger multiplies by them, and so needs finite numbers at padding; the ratio of
      ``"vespo"`` takes the weights of padding too.
    - A token with an input that is not finite is dropped, see ``policy_loss``.
    - Logits of float16 and bfloat16 operands stay in float32. Liger rounds them.

    As in Liger: with ``use_ref_model=False`` there is no penalty, whatever ``beta`` is, and without
    ``num_items_in_batch`` the divisor of ``"dapo"``, ``"cispo"`` and ``"vespo"`` counts the tokens
    of this call, over all ranks; TRL's counts those of the generation batch.

    Attributes may be changed between calls. Without ``old_per_token_logps``, and for ``"cispo"``,
    whose metric needs the log-probs, the head and the loss are two nodes, ``linear_token_logprobs``
    and ``policy_loss``.

    Args:
        beta: weight of the k3 penalty.
        compiled: has no effect; nothing here needs ``torch.compile``.
        use_ref_model: whether ``forward`` gets a reference.
        chunk_size: has no effect; ``workspace_bytes`` bounds the memory.
        epsilon_low: lower width of the clip.
        epsilon_high: upper width; for ``"cispo"`` the bound of the ratio itself, at least 1.
        loss_type: the loss and what it is divided by: the presets ``"trl.grpo"`` and so on.
        max_completion_length: a factor of the divisor of ``"dr_grpo"``, which needs it.
        importance_sampling_level: ``"token"``, or ``"sequence"`` (GSPO).
        sapo_temperature_pos: of ``"sapo"``, for advantages above 0; at most 80.
        sapo_temperature_neg: for the others.
        temperature: of the logits.
        delta: upper bound of the ratio where the advantage is negative, above ``1 +
            epsilon_high``.
        use_bias_correction_kl: multiply the penalty by the ratio; not for ``"vespo"``.
        vespo_k_pos: of ``"vespo"``, for advantages of at least 0, as ``vespo_lambda_pos``.
        vespo_k_neg: for the others, as ``vespo_lambda_neg``.
        workspace_bytes: as of ``linear_policy_loss``, as ``backend``.

    Raises:
        ValueError: an option is unknown, out of its range, or has no equal in ``policy_loss``; the
            message says which, and what to do.

    >>> import torch
    >>> loss = LigerFusedLinearGRPOLoss(beta=0.0)
    >>> hidden, weight = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    >>> tokens, mask, advantages = torch.tensor([[1]]), torch.tensor([[1]]), torch.tensor([-1.0])
    >>> old = torch.tensor([[-0.6931]])
    >>> loss(hidden, weight, tokens, mask, advantages, old_per_token_logps=old)
    (tensor(0.8000), (tensor(1.),))
    """

    beta: float = 0.04
    compiled: bool = True
    use_ref_model: bool = True
    chunk_size: int = 1
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    loss_type: LossType = "dapo"
    max_completion_length: int | None = None
    importance_sampling_level: ImportanceSamplingLevel = "token"
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    temperature: float = 1.0
    delta: float | None = None
    use_bias_correction_kl: bool = False
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    _: KW_ONLY
    workspace_bytes: int | None = None
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        super().__init__()
        self._config()

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, a 0-d tensor, and metrics: with ``beta`` the mean of the penalty's estimate,
        then the share of the tokens whose ratio was bounded in the direction of the advantage.

        Args:
            _input: ``[B, T, D]``, the states that predict ``selected_token_ids``.
            lin_weight: ``[V, D]``, the lm_head; converted to the dtype of ``_input``.
            selected_token_ids: ``[B, T]``.
            attention_mask: ``[B, T]``; what is not 0 selects.
            advantages: ``[B]``, or one per token.
            bias: ``[V]``.
            ref_per_token_logps: ``[B, T]``.
            old_per_token_logps: ``[B, T]``; None takes the policy as it is, with ratio 1.
            ref_input: states of the reference, with ``ref_weight`` and ``ref_bias`` an alternative
                to ``ref_per_token_logps``; read only where there is a penalty.
            vllm_is_ratio: detached factors, ``[B]``, ``[B, 1]`` or ``[B, T]``.
            num_items_in_batch: tokens of the generation batch over all ranks; read by ``"dapo"``,
                ``"cispo"`` and ``"vespo"``.
        """
        self._check_tensors(
            _input, selected_token_ids, attention_mask, ref_per_token_logps, old_per_token_logps
        )
        mask, old = attention_mask != 0, old_per_token_logps
        hidden, weight = _input, _in_dtype_of(_input, lin_weight)
        head = {
            "temperature": self.temperature,
            "workspace_bytes": self.workspace_bytes,
            "backend": self.backend,
        }
        ref = ref_per_token_logps
        if not self._penalized:
            ref = None
        elif ref is None:
            ref = _reference(ref_input, ref_weight, ref_bias, selected_token_ids, mask, head)
        elif ref_input is not None:
            warnings.warn(
                "ref_input is not read, because ref_per_token_logps is given; give one of them",
                stacklevel=2,
            )
        loss = {
            "ref_logprobs": ref,
            "weights": self._weights(vllm_is_ratio, mask),
            "normalizer": self._normalizer(mask, num_items_in_batch),
            "config": self._config(),
        }
        head["bias"] = bias
        if old is not None and self.loss_type != "cispo":
            given = (hidden, weight, selected_token_ids, old, advantages, mask)
            return self._results(linear_policy_loss(*given, **head, **loss))
        scores = linear_token_logprobs(hidden, weight, selected_token_ids, mask=mask, **head)
        logprobs = scores.logprobs
        old = logprobs.detach() if old is None else old
        given = (logprobs, old, advantages, mask)
        out = policy_loss(*given, **loss, backend=self.backend)
        if self.loss_type != "cispo":
            return self._results(out)
        A = advantages if advantages.shape == mask.shape else advantages[:, None]
        above = (logprobs.detach() - old).exp() > self.epsilon_high
        return self._results(out, (above & (A > 0) & mask).sum())

    def _results(
        self, out: PolicyLossOutput, clipped: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        sums = dict(zip(SUMS, out.metrics.vector, strict=False))
        if clipped is None:
            clipped = sums["clipped_low"] + sums["clipped_high"]
        counted = ([sums["kl_ref"]] if self.beta != 0.0 else []) + [clipped]
        tokens = sums["tokens"].clamp(min=1)
        return out.loss, tuple((value / tokens).to(out.loss.dtype) for value in counted)

    @property
    def _penalized(self) -> bool:
        return self.use_ref_model and self.beta != 0.0

    def _config(self) -> PolicyLossConfig:
        self._check_options()
        changes: dict[str, object] = {}
        if self.loss_type == "cispo":
            changes["eps_high"] = self.epsilon_high - 1.0
        elif self.loss_type == "sapo":
            changes["sapo_tau"] = (self.sapo_temperature_pos, self.sapo_temperature_neg)
        elif self.loss_type == "vespo":
            rates = (max(rate, 1e-4) for rate in (self.vespo_lambda_pos, self.vespo_lambda_neg))
            k = (self.vespo_k_pos, self.vespo_k_neg)
            changes["vespo_gamma"] = tuple(
                number for pair in zip(k, rates, strict=True) for number in pair
            )
        else:
            changes = {
                "level": self.importance_sampling_level,
                "eps_low": min(self.epsilon_low, 1.0),  # a ratio is never below 0
                "eps_high": self.epsilon_high,
                "cap": self.delta,
            }
        if self._penalized:
            changes |= {"kl": "k3", "kl_coef": self.beta}
            changes["kl_gradient"] = "ratio" if self.use_bias_correction_kl else "plain"
        return PolicyLossConfig.preset(f"trl.{self.loss_type}", **changes)

    def _check_options(self) -> None:
        for name, literal in (
            ("loss_type", LossType),
            ("importance_sampling_level", ImportanceSamplingLevel),
        ):
            value, choices = getattr(self, name), get_args(literal)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        own_rule = self.loss_type in _UNCLIPPED
        if own_rule and self.importance_sampling_level != "token":
            raise ValueError(
                f"importance_sampling_level='sequence' has no meaning for loss_type="
                f"{self.loss_type!r}; set it to 'token'"
            )
        if own_rule and self.delta is not None:
            raise ValueError(
                f"delta={self.delta} has no effect on loss_type={self.loss_type!r}; leave it None"
            )
        if self.delta is not None and not self.delta > 1.0 + self.epsilon_high:
            raise ValueError(
                f"delta must be greater than 1 + epsilon_high = {1.0 + self.epsilon_high}, got "
                f"{self.delta}; None is no second bound"
            )
        if self.loss_type == "cispo" and not self.epsilon_high >= 1.0:
            raise ValueError(
                "epsilon_high must be at least 1 for loss_type='cispo', where it bounds the ratio "
                f"itself, got {self.epsilon_high}; 5 is usual"
            )
        for name in ("epsilon_low", "epsilon_high"):
            if not own_rule and not getattr(self, name) >= 0.0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            if not 0.0 < getattr(self, name) <= 80.0:
                raise ValueError(f"{name} must be in (0, 80], got {getattr(self, name)}")
        if self.loss_type == "dr_grpo" and not (self.max_completion_length or 0) > 0:
            raise ValueError(
                "max_completion_length must be given for loss_type='dr_grpo', the longest answer "
                f"in tokens, got {self.max_completion_length}"
            )
        if self.loss_type == "vespo" and self.use_bias_correction_kl and self._penalized:
            raise ValueError(
                "use_bias_correction_kl takes the ratio of a token, loss_type='vespo' that of the "
                "sequence, and policy_loss has one of them; set it to False"
            )

    @staticmethod
    def _check_tensors(
        _input: Tensor, tokens: Tensor, mask: Tensor, ref: Tensor | None, old: Tensor | None
    ) -> None:
        _checks.check_tensor("_input", _input, _checks.FLOATS)
        if _input.dim() != 3:
            raise ValueError(f"_input must be [B, T, D], got {list(_input.shape)}")
        for name, value, dtypes in (
            ("selected_token_ids", tokens, (torch.int64, torch.int32)),
            ("attention_mask", mask, _MASKS + _checks.FLOATS),
            ("ref_per_token_logps", ref, _checks.FLOATS),
            ("old_per_token_logps", old, _checks.FLOATS),
        ):
            if value is None and dtypes is _checks.FLOATS:
                continue
            _checks.check_tensor(name, value, dtypes)
            _checks.check_like(name, value, _input.shape[:2], _input.device, "[B, T] of _input")

    def _normalizer(self, mask: Tensor, items: float | Tensor | None) -> float | Tensor | None:
        """What Liger divides by; None counts the tokens."""
        sequences = float(max(len(mask), 1))
        if self.loss_type == "dr_grpo":
            return sequences * self.max_completion_length
        if self.loss_type not in _PER_BATCH_TOKEN:
            return None if self.loss_type == "bnpo" else sequences
        ranks = 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = torch.distributed.get_world_size()
            if items is None:
                items = mask.sum(dtype=torch.float32)
                torch.distributed.all_reduce(items)
        if items is None:
            return None
        if isinstance(items, Tensor):
            return (items.detach().float() / ranks).clamp(min=1.0)
        return max(items / ranks, 1.0)

    def _weights(self, ratio: Tensor | None, mask: Tensor) -> Tensor | None:
        if ratio is None:
            return None
        B, T = mask.shape
        if tuple(ratio.shape) not in ((B,), (B, 1), (B, T)):
            raise ValueError(
                f"vllm_is_ratio must be [{B}], [{B}, 1] or [{B}, {T}], got {list(ratio.shape)}"
            )
        ratio = ratio[:, None] if ratio.dim() == 1 else ratio
        if self.loss_type == "vespo" and ratio.shape[1] == 1:
            # a factor of the sequence: its tokens share it
            log = ratio.float().clamp(min=1e-8).log().clamp(max=20.0)
            ratio = (log / mask.sum(-1, keepdim=True).clamp(min=1)).exp()
        return ratio


def _in_dtype_of(hidden: Tensor, weight: Tensor) -> Tensor:
    """Liger multiplies in the dtype of the hidden states; autocast chooses for itself."""
    if torch.is_autocast_enabled(hidden.device.type):
        return weight
    return weight.to(hidden.dtype)


def _reference(
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor,
    head: dict[str, object],
) -> Tensor:
    """Log-probs under the reference from its own head, ``[B, T]``."""
    if hidden is None or weight is None:
        raise ValueError(
            "use_ref_model=True needs ref_per_token_logps, or ref_input with ref_weight; set "
            "use_ref_model=False or beta=0 for no penalty"
        )
    with torch.no_grad():
        return linear_token_logprobs(
            hidden, _in_dtype_of(hidden, weight), tokens, bias=bias, mask=mask, **head
        ).logprobs
