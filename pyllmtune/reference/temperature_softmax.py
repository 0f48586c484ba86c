"""temperature_softmax, the specification: what every kernel must return, in eager torch.

Arguments are those of the operator (``pyllmtune/_ops.py``): logits ``[outer, inner, V]``,
``row_temperature`` ``[outer, inner]``. Autograd through these lines is the specification of the
gradient. Eager torch moves about 20 V elements a row for what a fused kernel does with one read and
one write.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def temperature_softmax(
    logits: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    log: bool,
    dtype: torch.dtype,
) -> Tensor:
    """``softmax(logits / T)``, or its logarithm, over the last axis; ``[outer, inner, V]``."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = logits.to(wide)  # [rows, V]  read V, write V
    if row_temperature is None:
        row_temperature = z.new_full(z.shape[:-1], temperature)
    scale = row_temperature[..., None]  # [rows, 1]

    # NaN for the whole row, in value and gradient
    invalid = (z.isnan() | (z == math.inf)).any(-1, keepdim=True)  # [rows, 1]  read 2V
    z = z * torch.where(invalid, math.nan, 1.0).to(wide)  # [rows, V]  read V, write V
    # -inf is selected out, never computed with: it has p = 0 and no gradient
    allowed = z != -math.inf  # [rows, V]  read V
    top = z.detach().amax(-1, keepdim=True)  # [rows, 1]  read V
    top = torch.where(top == -math.inf, 0.0, top)  # nothing is allowed
    greedy = (scale == 0) & ~invalid  # [rows, 1]

    d = (torch.where(allowed, z, top) - top) / torch.where(
        scale == 0, 1.0, scale
    )  # read V, write V
    e = torch.where(allowed, d.exp(), 0.0)  # [rows, V]  read V, write V
    total = e.sum(-1, keepdim=True)  # [rows, 1]  read V
    total = torch.where(total == 0, 1.0, total)
    ids = torch.arange(z.shape[-1], device=z.device)
    first = torch.where(z == top, ids, z.shape[-1]).amin(-1, keepdim=True)  # lowest id of a tie
    best = (ids == first) & allowed  # [rows, V]
    if log:
        value = torch.where(allowed, d - total.log(), -math.inf)  # [rows, V]  read V, write V
        only = torch.where(best, 0.0, -math.inf)
    else:
        value = torch.where(allowed, e / total, 0.0)  # [rows, V]  read V, write V
        only = best
    return torch.where(greedy, only.to(wide), value).to(dtype)  # read V, write V
