"""Direct preference optimisation: pairs of answers instead of a reward model and a critic."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyllmtune.losses.dpo_types import MEASURED, SCORED, SMOOTHED, SORTED, TYPES, LossType, Pairs
from pyllmtune.losses.f_divergence import FDivergence, divergence_score
from pyllmtune.losses.sequences import (
    Reduction,
    as_lengths,
    as_vectors,
    check_positive,
    check_smoothing,
    reduce,
)


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor | None = None,
    ref_rejected_logprobs: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    f_divergence: FDivergence = "reverse_kl",
    alpha: float = 1.0,
    discopop_tau: float = 0.05,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """DPO (Rafailov et al. 2023) and its relatives: ``-log sigmoid(beta (D_chosen - D_rejected))``
    with ``D`` the log-ratio of an answer to the reference.

    Log-probs are of whole answers: ``token_logprobs(..., mask=mask).logprobs.sum(-1)``. They must
    be finite. Values and gradients stay finite where a naive formula overflows.

    Args:
        chosen_logprobs: ``[B]``, any float dtype, of the preferred answer of each pair.
        rejected_logprobs: ``[B]``, of the other one.
        ref_chosen_logprobs: ``[B]`` under the reference, constants. Both or none; none is the
            form without a reference, ``D = logprob``.
        ref_rejected_logprobs: ``[B]``.
        beta: how strongly the policy is held to the reference; positive.
        loss_type: one of TRL's names, formulas in ``docs/preference_losses.md``.
        label_smoothing: share of pairs believed to be labelled the wrong way round. With
            ``"sigmoid"`` this is cDPO, which TRL leaves out; ``"exo_pair"`` needs it.
        f_divergence: what holds the policy to the reference (f-DPO), with TRL's constants. Only
            for types that use the difference of two scores.
        alpha: of ``"alpha_divergence"``.
        discopop_tau: temperature of ``"discopop"``'s gate.
        chosen_lengths: ``[B]`` numbers of tokens. ``"sigmoid_norm"`` and ``"sft"`` need them;
            ``"ipo"`` averages per token, as TRL does, if both are given.
        rejected_lengths: ``[B]``.
        weights: ``[B]``, multiply the value of each pair (WPO), constants.
        reduction: ``"mean"``, ``"sum"`` (for micro-batches: divide by the pairs of the whole
            batch) or ``"none"``.

    Returns:
        0-d, or ``[B]`` for ``"none"``; float32, float64 for float64 log-probs.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, one reference is given without the other, a number is
            out of its range, an option was given that the type would not read.

    >>> import torch
    >>> dpo_loss(torch.tensor([-2.0]), torch.tensor([-3.0]), beta=2.0)  # -log sigmoid(2)
    tensor(0.1269)
    """
    _check_options(
        loss_type, beta, label_smoothing, f_divergence, alpha, discopop_tau, weights is not None
    )
    if (ref_chosen_logprobs is None) != (ref_rejected_logprobs is None):
        raise ValueError("give both ref_chosen_logprobs and ref_rejected_logprobs, or neither")
    chosen, rejected, ref_chosen, ref_rejected, factor = as_vectors(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        ref_chosen_logprobs=ref_chosen_logprobs,
        ref_rejected_logprobs=ref_rejected_logprobs,
        weights=weights,
    )
    if ref_chosen is None:
        ref_chosen = ref_rejected = torch.zeros_like(chosen)
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    averages = loss_type == "ipo" and any(n is not None for n in lengths.values())
    for name in lengths if averages else MEASURED.get(loss_type, ()):
        if lengths[name] is None:
            raise ValueError(f"loss_type={loss_type!r} needs {name}, the numbers of tokens")

    ratios = (chosen - ref_chosen.detach(), rejected - ref_rejected.detach())
    pairs = Pairs(
        chosen,
        rejected,
        ref_chosen.detach(),
        ref_rejected.detach(),
        *ratios,
        *(divergence_score(ratio, f_divergence, alpha) for ratio in ratios),
        *(None if n is None else as_lengths(name, n, chosen) for name, n in lengths.items()),
        beta,
        label_smoothing,
        discopop_tau,
    )
    values = TYPES[loss_type](pairs)
    return reduce(values if factor is None else values * factor.detach(), reduction)


def _check_options(
    loss_type: str,
    beta: float,
    label_smoothing: float,
    f_divergence: str,
    alpha: float,
    discopop_tau: float,
    weighted: bool,
) -> None:
    """Ranges, and no option that would be dropped in silence."""
    if loss_type not in TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(TYPES)}, got {loss_type!r}")
    check_positive("beta", beta)
    check_positive("discopop_tau", discopop_tau)
    check_smoothing(label_smoothing)
    if not abs(alpha) < math.inf:
        raise ValueError(f"alpha must be finite, got {alpha}")
    if label_smoothing != 0.0 and loss_type not in SMOOTHED:
        raise ValueError(
            f"label_smoothing={label_smoothing} has no meaning for loss_type={loss_type!r}; "
            f"it belongs to {', '.join(sorted(SMOOTHED))}"
        )
    if loss_type == "exo_pair" and label_smoothing == 0.0:
        raise ValueError("loss_type='exo_pair' needs a positive label_smoothing, such as 1e-3")
    if f_divergence != "reverse_kl" and loss_type not in SCORED:
        raise ValueError(
            f"f_divergence={f_divergence!r} has no meaning for loss_type={loss_type!r}; "
            f"it belongs to {', '.join(sorted(SCORED))}"
        )
    if weighted and loss_type in SORTED:
        raise ValueError(f"weights belong to pairs, and loss_type={loss_type!r} sorts them apart")
