"""The loss types of DPO: each a function of one batch of pairs, a value per pair.

Names and formulas are those of TRL's DPOTrainer, ``docs/preference_losses.md`` has the papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllmtune.losses.sequences import token_mean_nll

LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]

# who reads label_smoothing, who a divergence (the others need the log-ratio itself), who lengths
SMOOTHED = {"sigmoid", "sigmoid_norm", "exo_pair", "robust", "aot", "aot_unpaired"}
SCORED = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}
SORTED = {"aot", "aot_unpaired"}  # values that no longer belong to one pair
MEASURED = {"sigmoid_norm": ("chosen_lengths", "rejected_lengths"), "sft": ("chosen_lengths",)}


class Pairs(NamedTuple):
    """What the types read; every tensor ``[B]``."""

    chosen_logprobs: Tensor
    rejected_logprobs: Tensor
    ref_chosen_logprobs: Tensor
    ref_rejected_logprobs: Tensor
    chosen: Tensor  # log-ratio to the reference
    rejected: Tensor
    chosen_score: Tensor  # f' of the ratio; the log-ratio for the reverse KL
    rejected_score: Tensor
    chosen_lengths: Tensor | None
    rejected_lengths: Tensor | None
    beta: float
    label_smoothing: float
    discopop_tau: float

    @property
    def margin(self) -> Tensor:
        return self.beta * (self.chosen_score - self.rejected_score)

    @property
    def mean_score_gap(self) -> Tensor:
        """Difference of the scores per token."""
        return self.chosen_score / self.chosen_lengths - self.rejected_score / self.rejected_lengths


def smoothed_logistic(margin: Tensor, smoothing: float) -> Tensor:
    """``-log sigmoid(margin)``, expected over labels of which a share ``smoothing`` is flipped."""
    if smoothing == 0.0:
        return -F.logsigmoid(margin)
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def _sigmoid(p: Pairs) -> Tensor:
    return smoothed_logistic(p.margin, p.label_smoothing)


def _hinge(p: Pairs) -> Tensor:
    return torch.relu(1 - p.margin)


def _ipo(p: Pairs) -> Tensor:
    gap = p.chosen_score - p.rejected_score if p.chosen_lengths is None else p.mean_score_gap
    return (gap - 1 / (2 * p.beta)) ** 2


def _exo_pair(p: Pairs) -> Tensor:
    """KL(softmax of the pair's margins || the smoothed labels)."""
    log_chosen, log_rejected = F.logsigmoid(p.margin), F.logsigmoid(-p.margin)
    label, flipped = math.log1p(-p.label_smoothing), math.log(p.label_smoothing)
    return log_chosen.exp() * (log_chosen - label) + log_rejected.exp() * (log_rejected - flipped)


def _nca_pair(p: Pairs) -> Tensor:
    chosen, rejected = p.beta * p.chosen, p.beta * p.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _robust(p: Pairs) -> Tensor:
    """Unbiased under labels of which a share ``label_smoothing`` is flipped."""
    flipped = p.label_smoothing
    clean = (1 - flipped) * F.logsigmoid(p.margin) - flipped * F.logsigmoid(-p.margin)
    return -clean / (1 - 2 * flipped)


def _bco_pair(p: Pairs) -> Tensor:
    return -F.logsigmoid(p.beta * p.chosen) - F.logsigmoid(-p.beta * p.rejected)


def _sppo_hard(p: Pairs) -> Tensor:
    return (p.chosen - 0.5 / p.beta) ** 2 + (p.rejected + 0.5 / p.beta) ** 2


def _aot(p: Pairs) -> Tensor:
    """Stochastic dominance of the policy's gaps over the reference's: sorted against sorted."""
    policy = (p.chosen_logprobs - p.rejected_logprobs).sort().values
    reference = (p.ref_chosen_logprobs - p.ref_rejected_logprobs).sort().values
    return smoothed_logistic(p.beta * (policy - reference), p.label_smoothing)


def _aot_unpaired(p: Pairs) -> Tensor:
    gap = p.chosen.sort().values - p.rejected.sort().values
    return smoothed_logistic(p.beta * gap, p.label_smoothing)


def _apo_zero(p: Pairs) -> Tensor:
    return torch.sigmoid(-p.beta * p.chosen) + torch.sigmoid(p.beta * p.rejected)


def _apo_down(p: Pairs) -> Tensor:
    gap = p.chosen - p.rejected
    return torch.sigmoid(p.beta * p.chosen) + torch.sigmoid(-p.beta * gap)


def _discopop(p: Pairs) -> Tensor:
    """Logistic below, exponential above; the gate joins the exponent, where e^-margin overflows."""
    gate = p.margin / p.discopop_tau
    exponential = torch.exp(F.logsigmoid(gate) - p.margin)
    return -F.logsigmoid(p.margin) * torch.sigmoid(-gate) + exponential


def _sft(p: Pairs) -> Tensor:
    return token_mean_nll(p.chosen_logprobs, p.chosen_lengths)


def _sigmoid_norm(p: Pairs) -> Tensor:
    return smoothed_logistic(p.beta * p.mean_score_gap, p.label_smoothing)


TYPES: dict[str, Callable[[Pairs], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": _sft,
    "sigmoid_norm": _sigmoid_norm,
}
