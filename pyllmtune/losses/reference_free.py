"""Preference losses that need no reference model: SimPO and AlphaPO, CPO, ORPO."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllmtune.losses.dpo_types import smoothed_logistic
from pyllmtune.losses.f_divergence import power_score
from pyllmtune.losses.sequences import (
    Reduction,
    as_lengths,
    as_vectors,
    check_positive,
    check_smoothing,
    reduce,
    token_mean_nll,
)

CPOType = Literal["sigmoid", "hinge", "ipo"]


def simpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """SimPO (Meng et al. 2024): ``-log sigmoid(beta (a_chosen - a_rejected) - gamma)`` with ``a``
    the mean log-prob per token; with ``alpha`` AlphaPO (Gupta et al. 2025), whose reward is
    ``(1 - p^-alpha) / alpha`` of ``p = e^a``.

    Args:
        chosen_logprobs: ``[B]``, any float dtype: log-prob of the whole preferred answer.
        rejected_logprobs: ``[B]``, of the other one.
        chosen_lengths: ``[B]`` numbers of tokens.
        rejected_lengths: ``[B]``.
        beta: scale of the rewards, positive.
        gamma: by how much the preferred answer should lead.
        alpha: shape of AlphaPO's reward; 0 is SimPO.
        label_smoothing: share of pairs believed to be labelled the wrong way round.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        0-d, or ``[B]`` for ``"none"``; float32, float64 for float64 log-probs.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, or a number is out of its range.

    >>> import torch
    >>> lengths = torch.tensor([2])  # means of -1 and -1.5
    >>> simpo_loss(torch.tensor([-2.0]), torch.tensor([-3.0]), lengths, lengths, gamma=0.0)
    tensor(0.3133)
    """
    check_positive("beta", beta)
    check_smoothing(label_smoothing)
    for name, value in (("gamma", gamma), ("alpha", alpha)):
        if not abs(value) < math.inf:
            raise ValueError(f"{name} must be finite, got {value}")
    chosen, rejected = as_vectors(
        chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs
    )
    chosen = power_score(chosen / as_lengths("chosen_lengths", chosen_lengths, chosen), -alpha)
    rejected = power_score(
        rejected / as_lengths("rejected_lengths", rejected_lengths, rejected), -alpha
    )
    return reduce(smoothed_logistic(beta * (chosen - rejected) - gamma, label_smoothing), reduction)


def cpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_lengths: Tensor,
    *,
    beta: float = 0.1,
    loss_type: CPOType = "sigmoid",
    label_smoothing: float = 0.0,
    nll_coef: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """CPO (Xu et al. 2024): DPO without a reference, and ``nll_coef`` times the preferred answers'
    negative log-likelihood per token of the batch, which keeps their probability from falling.

    Args:
        chosen_logprobs: ``[B]``, any float dtype: log-prob of the whole preferred answer.
        rejected_logprobs: ``[B]``, of the other one.
        chosen_lengths: ``[B]`` numbers of tokens.
        beta: scale of the log-probs, positive.
        loss_type: ``"sigmoid"``, ``"hinge"`` (SLiC) or ``"ipo"``.
        label_smoothing: share of pairs believed to be labelled the wrong way round; ``"sigmoid"``
            only.
        nll_coef: weight of the second term; TRL's ``cpo_alpha``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        0-d, or ``[B]`` for ``"none"``; float32, float64 for float64 log-probs.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, or a number is out of its range.

    >>> import torch
    >>> pair = torch.tensor([-2.0]), torch.tensor([-3.0])
    >>> cpo_loss(*pair, torch.tensor([4]), beta=1.0)  # -log sigmoid(1) + 2/4
    tensor(0.8133)
    """
    check_positive("beta", beta)
    check_smoothing(label_smoothing)
    if label_smoothing and loss_type != "sigmoid":
        raise ValueError(f"label_smoothing={label_smoothing} belongs to loss_type='sigmoid'")
    chosen, rejected = as_vectors(
        chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs
    )
    gap = chosen - rejected
    if loss_type == "sigmoid":
        values = smoothed_logistic(beta * gap, label_smoothing)
    elif loss_type == "hinge":
        values = torch.relu(1 - beta * gap)
    elif loss_type == "ipo":
        values = (gap - 1 / (2 * beta)) ** 2
    else:
        raise ValueError(f"loss_type must be one of sigmoid, hinge, ipo, got {loss_type!r}")
    nll = token_mean_nll(chosen, as_lengths("chosen_lengths", chosen_lengths, chosen))
    return reduce(values + nll_coef * nll, reduction)


def orpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 0.1,
    nll_coef: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """ORPO (Hong et al. 2024): the preferred answers' negative log-likelihood per token of the
    batch, and ``-beta log sigmoid(o_chosen - o_rejected)`` with ``o = log p / (1 - p)``, ``p`` the
    geometric mean of an answer's token probabilities.

    Args:
        chosen_logprobs: ``[B]``, any float dtype: log-prob of the whole preferred answer.
        rejected_logprobs: ``[B]``, of the other one.
        chosen_lengths: ``[B]`` numbers of tokens.
        rejected_lengths: ``[B]``.
        beta: weight of the odds ratio, positive; the paper's lambda.
        nll_coef: weight of the first term. TRL takes it over the prompt's tokens too: for its
            number, pass 0 and add that mean yourself.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        0-d, or ``[B]`` for ``"none"``; float32, float64 for float64 log-probs.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, or a number is out of its range.

    >>> import torch
    >>> chosen, rejected = torch.tensor([0.5, 0.2]).log().unbind()  # odds 1 and 1/4
    >>> one = torch.tensor([1])
    >>> orpo_loss(chosen[None], rejected[None], one, one, beta=1.0, nll_coef=0.0)  # log(1 + 1/4)
    tensor(0.2231)
    """
    check_positive("beta", beta)
    chosen, rejected = as_vectors(
        chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs
    )
    lengths = as_lengths("chosen_lengths", chosen_lengths, chosen)
    odds = log_odds(chosen / lengths)
    other = log_odds(rejected / as_lengths("rejected_lengths", rejected_lengths, rejected))
    values = -beta * F.logsigmoid(odds - other) + nll_coef * token_mean_nll(chosen, lengths)
    return reduce(values, reduction)


def log_odds(logprob: Tensor) -> Tensor:
    """``log p / (1 - p)`` of a log-prob, exact where p is near 1.

    Nearer than the dtype's eps counts as eps away: no finite number says more.
    """
    below = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    return below - torch.log(-torch.expm1(below))
