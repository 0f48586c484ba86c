"""KTO: answers marked good or bad one by one, without pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyllmtune import _checks
from pyllmtune.losses.sequences import Reduction, as_vectors, check_positive, reduce


def kto_loss(
    logprobs: Tensor,
    desirable: Tensor,
    ref_logprobs: Tensor | None = None,
    *,
    mismatched_logratios: Tensor | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """KTO (Ethayarajh et al. 2024): ``1 - sigmoid(beta (D - K))`` of a good answer, ``1 -
    sigmoid(beta (K - D))`` of a bad one, with ``D`` the log-ratio to the reference and ``K`` an
    estimate of the KL between the two.

    Args:
        logprobs: ``[B]``, any float dtype: log-probs of whole answers.
        desirable: ``[B]`` bool: which of them are good.
        ref_logprobs: ``[B]`` under the reference, constants; None is the form without one.
        mismatched_logratios: log-ratios ``[...]`` of answers to other prompts: ``K = max(0,
            mean)``, a constant. On several ranks, pass the mean over all of them. None takes ``K =
            0``, which is TRL's ``apo_zero_unpaired``.
        beta: how strongly the policy is held to the reference; positive.
        desirable_weight: weight of the good answers, at least 0.
        undesirable_weight: weight of the bad answers, at least 0.
        reduction: ``"mean"`` (over good and bad together), ``"sum"`` or ``"none"``.

    Returns:
        0-d, or ``[B]`` for ``"none"``; float32, float64 for float64 log-probs.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, or a number is out of its range.

    >>> import torch
    >>> good, marks = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    >>> kto_loss(good, marks, beta=0.5, reduction="none")  # sigmoid(-1) and sigmoid(1)
    tensor([0.2689, 0.7311])
    """
    check_positive("beta", beta)
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    for name, weight in weights.items():
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {weight}")
    policy, reference = as_vectors(logprobs=logprobs, ref_logprobs=ref_logprobs)
    _checks.check_tensor("desirable", desirable, (torch.bool,))
    _checks.check_like("desirable", desirable, policy.shape, policy.device, "one per answer")

    ratio = policy if reference is None else policy - reference.detach()
    if mismatched_logratios is not None:
        _checks.check_tensor("mismatched_logratios", mismatched_logratios, _checks.FLOATS)
        ratio = ratio - mismatched_logratios.detach().to(policy.dtype).mean().clamp(min=0)
    values = torch.where(
        desirable,
        desirable_weight * torch.sigmoid(-beta * ratio),
        undesirable_weight * torch.sigmoid(beta * ratio),
    )
    return reduce(values, reduction)
