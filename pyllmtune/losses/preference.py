"""Learning from comparisons: the Bradley-Terry loss, and the pairs that a ranking contains."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllmtune import _checks
from pyllmtune.losses.sequences import Reduction, as_vectors, reduce


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: float | Tensor = 0.0,
    center: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Bradley-Terry: ``-log sigmoid(chosen - rejected - margin) + center (chosen + rejected)^2``.

    For a reward model ``chosen`` and ``rejected`` are its rewards; for a language model tuned
    without a reference, the log-probs of the two answers.

    Args:
        chosen: ``[B]``, any float dtype: score of the preferred answer of each pair.
        rejected: ``[B]``: score of the other one.
        margin: by how much the preferred answer should lead (Llama 2); a number, or ``[B]``.
        center: weight of the term that keeps a pair's rewards around 0 (Eisenstein et al. 2023);
            TRL's ``center_rewards_coefficient``.
        reduction: ``"mean"``, ``"sum"`` (for micro-batches: divide by the pairs of the whole
            batch) or ``"none"``.

    Returns:
        0-d, or ``[B]`` for ``"none"``; float32, float64 for float64 scores.

    Raises:
        TypeError: scores are not floating point tensors.
        ValueError: shapes or devices differ, ``center`` is negative, the reduction is unknown.

    >>> import torch
    >>> preference_loss(torch.tensor([-2.0]), torch.tensor([-3.0]))  # -log sigmoid(1)
    tensor(0.3133)
    """
    if not 0.0 <= center < math.inf:
        raise ValueError(f"center must be at least 0 and finite, got {center}")
    per_pair = margin if isinstance(margin, Tensor) and margin.dim() else None
    better, worse, lead = as_vectors(chosen=chosen, rejected=rejected, margin=per_pair)
    values = -F.logsigmoid(better - worse - (margin if lead is None else lead))
    if center:
        values = values + center * (better + worse) ** 2
    return reduce(values, reduction)


class PreferencePairs(NamedTuple):
    """Indices of answers, ``[pairs]`` int64 each: ``chosen[k]`` is preferred to ``rejected[k]``."""

    chosen: Tensor
    rejected: Tensor


def preference_pairs(ranks: Tensor, group_ids: Tensor | None = None) -> PreferencePairs:
    """Every ordered pair that a ranking of answers contains (Ouyang et al. 2022).

    Args:
        ranks: ``[B]``, integer or float, the smaller the better; negate rewards to rank by them.
            Equal ranks, and NaN, give no pair.
        group_ids: ``[B]`` int: only answers of one group, the answers to one question, are
            compared; None compares all.

    Returns:
        ``PreferencePairs(chosen, rejected)``, in the order of the answers. The number of pairs
        depends on the data, so on a GPU this waits for the device.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: ``ranks`` is not one-dimensional, or shapes or devices differ.

    >>> import torch
    >>> pairs = preference_pairs(torch.tensor([1, 2, 3]))  # A > B > C
    >>> list(zip(pairs.chosen.tolist(), pairs.rejected.tolist()))
    [(0, 1), (0, 2), (1, 2)]
    """
    _checks.check_tensor("ranks", ranks, (torch.int64, torch.int32, *_checks.FLOATS))
    if ranks.dim() != 1:
        raise ValueError(f"ranks must be [B], one per answer, got {list(ranks.shape)}")
    better = ranks[:, None] < ranks[None, :]  # [B, B]
    if group_ids is not None:
        _checks.check_tensor("group_ids", group_ids, (torch.int64, torch.int32))
        _checks.check_like("group_ids", group_ids, ranks.shape, ranks.device, "one per answer")
        better &= group_ids[:, None] == group_ids[None, :]
    return PreferencePairs(*better.nonzero(as_tuple=True))
