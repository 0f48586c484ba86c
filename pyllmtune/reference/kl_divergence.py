"""kl_divergence, the specification: what every kernel must return, in eager torch.

Arguments are those of the operator (``pyllmtune/_ops.py``): logits ``[outer, inner, V]``, the rest
``[outer, inner]``. Computed in float64 for any dtype: the difference of the log-probs of two nearly
equal rows has few digits in float32, and a divergence, which is of second order in it, none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kl_divergence(
    logits: Tensor,
    ref_logits: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    mask: Tensor | None,
    js_weight: float,
) -> tuple[Tensor]:
    """``KL(p || q)`` of p = softmax(logits / T) and q = softmax(ref_logits / T), ``[outer,
    inner]``; with a weight W in (0, 1) ``(1 - W) KL(p || m) + W KL(q || m)``, m = (1 - W) p + W q.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    live = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)  # [rows]
    live = live if mask is None else mask
    # masks select: a dead row is replaced before any arithmetic
    z, r = (torch.where(live[..., None], x, 0).double() for x in (logits, ref_logits))  # [rows, V]

    forbidden, ref_forbidden = z == -math.inf, r == -math.inf  # [rows, V]
    invalid = (~(z < math.inf) | ~(r < math.inf)).any(-1)  # [rows]  NaN or +inf
    nothing = forbidden.all(-1)  # [rows]  no token to compare
    if js_weight:
        nothing = nothing | ref_forbidden.all(-1)
        infinite = torch.zeros_like(nothing)
    else:
        infinite = (ref_forbidden & ~forbidden).any(-1) & ~nothing  # [rows]

    # rows whose value is a constant get no gradient, invalid ones NaN in value and gradient
    constant = (nothing | infinite) & ~invalid
    spoiled = torch.where(invalid, math.nan, 1.0)[..., None].double()
    inverse = 1 / (temperature if row_temperature is None else row_temperature[..., None].double())
    log_p, log_q = (
        torch.log_softmax(torch.where(constant[..., None], 0, x) * spoiled * inverse, -1)
        for x in (z, r)
    )  # [rows, V]
    p, q = log_p.exp(), log_q.exp()
    if js_weight:
        m = (1 - js_weight) * p + js_weight * q
        log_m = torch.where(m == 0, 1, m).log()
        value = (1 - js_weight) * _relative(p, log_p, log_m) + js_weight * _relative(
            q, log_q, log_m
        )
    else:
        value = _relative(p, log_p, torch.where(log_q == -math.inf, 0, log_q))
    value = torch.where(infinite & ~invalid, math.inf, torch.where(nothing & ~invalid, 0, value))
    return (torch.where(live, value, 0).to(dtype),)


def _relative(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_j p_j (log p_j - log q_j), where 0 log 0 = 0.  ``[rows]``"""
    return torch.where(p == 0, 0, p * (torch.where(p == 0, 0, log_p) - log_q)).sum(-1)
