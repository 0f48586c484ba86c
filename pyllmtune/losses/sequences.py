"""Vectors of one number per sequence: their checks, and how a loss over them is reduced."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from pyllmtune import _checks

Reduction = Literal["mean", "sum", "none"]


def as_vectors(**named: Tensor | None) -> list[Tensor | None]:
    """Every argument as a ``[B]`` vector, float32, or float64 if the first is; None stays None."""
    (first_name, first), *_ = named.items()
    _checks.check_tensor(first_name, first, _checks.FLOATS)
    if first.dim() != 1:
        raise ValueError(
            f"{first_name} must be [B], one per sequence, got {list(first.shape)}; "
            "sum token log-probs over the tokens first"
        )
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    for name, value in named.items():
        if value is not None:
            _checks.check_tensor(name, value, _checks.FLOATS)
            _checks.check_like(name, value, first.shape, first.device, f"one per {first_name}")
    return [None if value is None else value.to(dtype) for value in named.values()]


def as_lengths(name: str, lengths: Tensor, like: Tensor) -> Tensor:
    """Numbers of tokens ``[B]`` in the dtype of ``like``; an empty sequence counts as one token."""
    _checks.check_tensor(name, lengths, (torch.int64, torch.int32, *_checks.FLOATS))
    _checks.check_like(name, lengths, like.shape, like.device, "one per sequence")
    return lengths.to(like.dtype).clamp(min=1)


def check_positive(name: str, value: float) -> None:
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_smoothing(label_smoothing: float) -> None:
    """Half of the labels flipped says nothing, more than half says the opposite."""
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")


def token_mean_nll(logprobs: Tensor, lengths: Tensor) -> Tensor:
    """``[B]`` whose mean is the negative log-likelihood per token of the whole batch."""
    return -logprobs * (logprobs.shape[0] / lengths.sum().clamp(min=1))


def reduce(values: Tensor, reduction: Reduction) -> Tensor:
    """Mean, sum or the ``[B]`` values themselves; the mean of no sequence is 0."""
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if reduction == "mean":
        return values.sum() / max(values.shape[0], 1)
    raise ValueError(f"reduction must be one of mean, sum, none, got {reduction!r}")
