"""Weights and masks for tokens that another policy has drawn: truncated and masked importance
weights, rejection, off-policy sequences, high-entropy tokens. Plain torch, without a host sync.

Tensors are padded ``[B, T]``, or packed ``[total]`` with ``cu_seqlens``; results are per token, of
the same shape, detached: they go into ``weights=`` or ``mask=`` of ``policy_loss``. A log-prob that
is not finite gives no evidence: it counts as a log-ratio of 0.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from pyllmtune import _checks
from pyllmtune._sequences import sequence_offsets

Over = Literal["token", "sum", "mean", "max"]
Estimator = Literal["k1", "k2", "k3"]


class _Batch:
    """Selected tokens, and statistics of a sequence handed back to each of its tokens."""

    def __init__(self, like: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
        offsets = sequence_offsets("logprobs", like, cu_seqlens)
        self.sequences = offsets.shape[0] - 1
        tokens = torch.arange(like.numel(), device=like.device)
        self.owner = torch.bucketize(tokens, offsets[1:], right=True)  # [total]
        select = _checks.as_mask(mask, like.shape, like.device, "the shape of logprobs")
        self.select = torch.ones_like(like, dtype=torch.bool) if select is None else select

    def log_ratio(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        ratio = numerator.detach().float() - denominator.detach().float()
        return torch.where(self.select & ratio.isfinite(), ratio, 0.0)

    def over(self, values: Tensor, how: str) -> Tensor:
        """Token values as they are, or the sum, mean or maximum over the selected of a sequence."""
        if how == "token":
            return values
        flat, select = values.reshape(-1), self.select.reshape(-1)
        start = -math.inf if how == "max" else 0.0
        out = flat.new_full((self.sequences,), start)
        chosen = torch.where(select, flat, start)
        if how == "max":
            out = out.scatter_reduce(0, self.owner, chosen, "amax")
        else:
            out = out.index_add(0, self.owner, chosen)
        if how == "mean":
            count = torch.zeros_like(out).index_add(0, self.owner, select.to(flat.dtype))
            out = out / count.clamp(min=1)
        return out[self.owner].view(values.shape)


def importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    over: Over = "token",
    mode: Literal["truncate", "mask"] = "truncate",
    low: float = 0.0,
    high: float = 2.0,
    limit: float = 20.0,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Importance weights ``exp(old - rollout)`` of a trainer against the sampler that drew.

    TIS is ``mode="truncate"``, MIS and IcePop are ``mode="mask"``. verl: ``high=2``; TRL: ``high=3,
    over="sum", mode="mask", limit=inf``.

    Args:
        old_logprobs: under the policy at the start of the update.
        rollout_logprobs: as the sampler returned them.
        mask: true selects; what is masked gets the weight 1.
        over: ``"token"``, or one weight for a sequence: of the ``"sum"`` of its log-ratios, of
            their ``"mean"`` (geometric) or of their ``"max"``.
        mode: outside ``[low, high]``, clamp (``"truncate"``) or weigh 0 (``"mask"``).
        limit: log-ratios are clamped to at most this in size before ``exp``.
        normalize: divide by the mean over the selected tokens.

    Raises:
        ValueError: shapes differ, an option is unknown, or ``low > high``.

    >>> import torch
    >>> old, rollout = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -3.0]])
    >>> importance_weights(old, rollout)
    tensor([[1., 2.]])
    >>> importance_weights(old, rollout, mode="mask")
    tensor([[1., 0.]])
    """
    _choose("over", over, Over)
    if mode not in ("truncate", "mask"):
        raise ValueError(f"mode must be truncate or mask, got {mode!r}")
    if not low <= high:
        raise ValueError(f"low must be at most high, got low={low} and high={high}")
    batch = _batch(old_logprobs, rollout_logprobs, mask, cu_seqlens)
    log_ratio = batch.over(batch.log_ratio(old_logprobs, rollout_logprobs), over)
    weights = log_ratio.clamp(-limit, limit).exp()
    if mode == "mask":
        weights = torch.where((weights >= low) & (weights <= high), weights, 0.0)
    else:
        weights = weights.clamp(low, high)
    if normalize:
        total = torch.where(batch.select, weights, 0.0).sum()
        mean = total / batch.select.sum().clamp(min=1)
        weights = torch.where(mean > 0, weights / mean, weights)
    return torch.where(batch.select, weights, 1.0)


def effective_sample_share(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """``1 / mean((w / mean w)^2)``, 0-d: the share of the selected tokens that equal weights would
    leave; 1 for equal weights, 0 for none.

    >>> import torch
    >>> effective_sample_share(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    tensor(0.5000)
    """
    select = _checks.as_mask(mask, weights.shape, weights.device, "the shape of weights")
    chosen = weights if select is None else torch.where(select, weights, 0.0)
    count = chosen.new_tensor(weights.numel()) if select is None else select.sum()
    squares = count * chosen.square().sum()
    return torch.where(squares > 0, chosen.sum().square() / squares, 0.0)


def rejection_mask(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    estimator: Estimator = "k1",
    over: Over = "mean",
    low: float = -math.inf,
    high: float = math.inf,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Selected tokens whose divergence between sampler and trainer lies in ``[low, high]``, bool.

    The divergence is an estimate of KL(rollout || old), of a token or over its sequence: with ``r =
    old - rollout``, ``k1 = -r``, ``k2 = r^2 / 2``, ``k3 = e^r - 1 - r``.

    >>> import torch
    >>> old, rollout = torch.tensor([[-1.0], [-4.0]]), torch.tensor([[-1.0], [-1.0]])
    >>> rejection_mask(old, rollout, high=2.0)
    tensor([[ True],
            [False]])
    """
    _choose("over", over, Over)
    _choose("estimator", estimator, Estimator)
    batch = _batch(old_logprobs, rollout_logprobs, mask, cu_seqlens)
    ratio = batch.log_ratio(old_logprobs, rollout_logprobs)
    if estimator == "k1":
        divergence = -ratio
    elif estimator == "k2":
        divergence = ratio.square() / 2
    else:
        divergence = torch.expm1(ratio) - ratio
    divergence = batch.over(divergence, over)
    return batch.select & (divergence >= low) & (divergence <= high)


def off_policy_sequence_mask(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    threshold: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Tokens of the sequences that are kept, bool: off-policy sequence masking (DeepSeek-V3.2).

    A sequence with a negative advantage is dropped once the mean of ``rollout - logprob`` over its
    tokens exceeds ``threshold``: the policy has moved away from it already.

    Args:
        advantages: ``[B]``, or per token.

    >>> import torch
    >>> rollout = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]])
    >>> advantages = torch.tensor([1.0, -1.0])
    >>> off_policy_sequence_mask(rollout - 3, rollout, advantages, threshold=1.0)[:, 0]
    tensor([ True, False])
    """
    batch = _batch(logprobs, rollout_logprobs, mask, cu_seqlens)
    if advantages.shape != logprobs.shape:
        of = f"one per sequence, or {list(logprobs.shape)}, one per token"
        _checks.check_like(
            "advantages", advantages, torch.Size((batch.sequences,)), logprobs.device, of
        )
        advantages = advantages[batch.owner].view(logprobs.shape)
    moved = batch.over(batch.log_ratio(rollout_logprobs, logprobs), "mean")
    return batch.select & ((advantages >= 0) | (moved <= threshold))


def top_entropy_mask(
    entropy: Tensor, mask: Tensor | None = None, *, fraction: float = 0.2
) -> Tensor:
    """The ``fraction`` of the selected tokens with the highest entropy, bool ("Beyond the 80/20
    rule", Wang et al. 2025; TRL's ``top_entropy_quantile``).

    Those at or above the ``1 - fraction`` quantile, interpolated as ``torch.quantile`` does, of all
    selected tokens of the batch.

    >>> import torch
    >>> top_entropy_mask(torch.tensor([[0.1, 3.0, 0.2, 0.3]]), fraction=0.25)
    tensor([[False,  True, False, False]])
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    _checks.check_tensor("entropy", entropy, _checks.FLOATS)
    select = _checks.as_mask(mask, entropy.shape, entropy.device, "the shape of entropy")
    select = torch.ones_like(entropy, dtype=torch.bool) if select is None else select
    values = entropy.detach().float()
    if values.numel() == 0:
        return select
    chosen = select & values.isfinite()
    ranked = torch.where(chosen, values, math.inf).reshape(-1).sort().values  # the rest last
    place = (1.0 - fraction) * (chosen.sum() - 1).clamp(min=0).double()
    lower, upper = ranked[place.floor().long()], ranked[place.ceil().long()]
    # equal ends are taken as they are: inf - inf would be NaN where nothing is selected
    between = torch.lerp(lower, upper, (place - place.floor()).float())
    return chosen & (values >= torch.where(lower == upper, lower, between))


def _choose(name: str, value: str, literal: object) -> None:
    choices = literal.__args__
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _batch(first: Tensor, second: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> _Batch:
    _checks.check_tensor("logprobs", first, _checks.FLOATS)
    _checks.check_tensor("rollout_logprobs", second, _checks.FLOATS)
    _checks.check_like(
        "rollout_logprobs", second, first.shape, first.device, "the shape of the log-probs"
    )
    return _Batch(first, mask, cu_seqlens)
