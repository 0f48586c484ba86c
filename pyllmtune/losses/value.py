"""value_loss: the critic's squared error, clipped as PPO does, in plain torch."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pyllmtune import _checks
from pyllmtune._sequences import sequence_offsets

# those of PolicyLossConfig
Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"]


class ValueLossOutput(NamedTuple):
    """The loss, a 0-d tensor to call ``backward`` on, and the share of valid tokens whose clipped
    error was the larger one, so that they have no gradient.
    """

    loss: Tensor
    clip_fraction: Tensor


def value_loss(
    values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
    cu_seqlens: Tensor | None = None,
    aggregation: Aggregation = "token-mean",
    normalizer: float | Tensor | None = None,
) -> ValueLossOutput:
    """``(V - R)^2 / 2``, and with ``clip`` (PPO's implementation) the larger of that and
    ``(clamp(V, old - clip, old + clip) - R)^2 / 2``.

    Differentiable in ``values``; everything else is a constant of the update.

    Args:
        values: ``[B, T]``, or packed ``[total]`` with ``cu_seqlens``, any float dtype.
        returns: targets of the shape of ``values``. One that is not finite drops its token.
        mask: true selects; of the shape of ``values``. Masked tokens may hold anything.
        old_values: the critic's values when the batch was made; needed with ``clip``. One that is
            not finite drops its token.
        clip: how far a value may move from its old one before its gradient stops.
        cu_seqlens: ``[B + 1]`` int, cumulative lengths starting at 0, for packed tensors.
        aggregation: as in ``PolicyLossConfig``.
        normalizer: as in ``policy_loss``: the divisor, a number or a 0-d tensor; None counts valid
            tokens, or sequences that have one; ``"constant"`` needs it.

    Returns:
        ``ValueLossOutput(loss, clip_fraction)``, float32 (float64 for float64). A batch without a
        valid token has loss 0 and gradient 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, ``clip`` and ``old_values`` are not given together, or
            the normalizer is missing or not positive.

    >>> import torch
    >>> value_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 3.0]])).loss
    tensor(0.2500)
    >>> old = torch.tensor([[0.0, 0.0]])
    >>> value_loss(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), old_values=old, clip=0.5).loss
    tensor(2.5000)
    """
    _checks.check_tensor("values", values, _checks.FLOATS)
    shape, device = values.shape, values.device
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    offsets = sequence_offsets("values", values, cu_seqlens)
    if (clip is None) != (old_values is None):
        raise ValueError("clip= and old_values= belong together; give both, or neither")
    if clip is not None and not 0.0 < clip < math.inf:
        raise ValueError(f"clip must be positive and finite, got {clip}")

    def target(name: str, tensor: Tensor) -> Tensor:
        _checks.check_tensor(name, tensor, _checks.FLOATS)
        _checks.check_like(name, tensor, shape, device, "the shape of values")
        return tensor.detach().to(dtype)

    targets = target("returns", returns)
    old = None if old_values is None else target("old_values", old_values)
    valid = targets.isfinite() if old is None else targets.isfinite() & old.isfinite()
    select = _checks.as_mask(mask, shape, device, "the shape of values")
    valid = valid if select is None else valid & select

    # masks select: what is not valid leaves the graph before it enters the arithmetic
    value = torch.where(valid, values.to(dtype), 0)
    targets = torch.where(valid, targets, 0)
    error = (value - targets) ** 2
    clipped = torch.zeros_like(valid)
    if old is not None:
        old = torch.where(valid, old, 0)
        bounded = (value.clamp(old - clip, old + clip) - targets) ** 2
        clipped = bounded > error
        error = torch.where(clipped, bounded, error)
    loss = _aggregate(0.5 * error, valid, offsets, cu_seqlens is None, aggregation, normalizer)
    return ValueLossOutput(loss, clipped.sum() / valid.sum().clamp(min=1))


def _aggregate(
    error: Tensor,
    valid: Tensor,
    offsets: Tensor,
    padded: bool,
    aggregation: str,
    normalizer: float | Tensor | None,
) -> Tensor:
    """Sum over tokens and sequences, weighted and divided as ``aggregation`` says."""
    if aggregation not in get_args(Aggregation):
        choices = ", ".join(get_args(Aggregation))
        raise ValueError(f"aggregation must be one of {choices}, got {aggregation!r}")

    def per_sequence(tokens: Tensor) -> Tensor:  # [B, T] or [total] -> [B]
        if padded:
            return tokens.sum(-1)
        place = torch.arange(tokens.shape[0], device=tokens.device)
        owner = torch.bucketize(place, offsets[1:], right=True)
        return tokens.new_zeros(offsets.shape[0] - 1).index_add(0, owner, tokens)

    sums, count = per_sequence(error), per_sequence(valid.to(error.dtype))  # [B]
    if aggregation == "seq-mean-token-mean":
        sums = sums / count.clamp(min=1)
    counted = count.sum() if aggregation == "token-mean" else (count > 0).sum()
    if normalizer is None:
        if aggregation == "constant":
            raise ValueError("aggregation='constant' needs normalizer=, the number to divide by")
        return sums.sum() / counted.clamp(min=1)
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(
                f"normalizer must be a number or a 0-d tensor, got shape {list(normalizer.shape)}"
            )
        divisor = normalizer.detach().to(error.device, error.dtype).reshape(())
        # no valid token: loss 0, whatever the divisor
        return sums.sum() / torch.where(counted > 0, divisor, 1)
    if not 0 < normalizer < math.inf:
        raise ValueError(f"normalizer must be positive and finite, got {normalizer}")
    return sums.sum() / normalizer
