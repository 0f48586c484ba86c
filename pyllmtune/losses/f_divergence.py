"""What a log-ratio is worth under an f-divergence: f'(t) of ``t = policy / reference``.

f-DPO (Wang et al. 2023) puts these scores in the place of log t. Additive constants follow TRL.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

LIMIT = 80.0  # of an exponent: e^80 and what a loss adds to it are finite in float32


def power_score(logratio: Tensor, power: float) -> Tensor:
    """``(t^power - 1) / power`` of ``t = e^logratio``; towards power 0 that is the log-ratio."""
    if abs(power) < 1e-6:
        return logratio
    return torch.expm1((power * logratio).clamp(max=LIMIT)) / power


def divergence_score(logratio: Tensor, divergence: FDivergence, alpha: float) -> Tensor:
    """The score that replaces the log-ratio; ``alpha`` belongs to ``"alpha_divergence"``."""
    if divergence == "reverse_kl":
        return logratio
    if divergence == "forward_kl":
        return power_score(logratio, -1.0)
    if divergence == "js_divergence":
        return math.log(2.0) + F.logsigmoid(logratio)
    if divergence == "alpha_divergence":
        return power_score(logratio, alpha - 1.0)
    raise ValueError(
        "f_divergence must be one of reverse_kl, forward_kl, js_divergence, alpha_divergence, "
        f"got {divergence!r}"
    )
