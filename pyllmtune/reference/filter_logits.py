"""filter_logits, the specification: scaled logits where kept, -inf elsewhere.

Arguments are those of the operator (``pyllmtune/_ops.py``): logits ``[outer, inner, V]``, per-row
parameters ``[outer * inner]``. Eager torch sorts the vocabulary and moves about 30 V elements a
row; a fused kernel reads V and writes V.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyllmtune.reference.row_filter import filter_rows, of_rows


def filter_logits(
    logits: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    top_k: int,
    row_top_k: Tensor | None,
    top_p: float,
    row_top_p: Tensor | None,
    min_p: float,
    row_min_p: Tensor | None,
    order: int,
) -> Tensor:
    """``logits / T`` on the kept set, -inf elsewhere; NaN in a row that holds NaN or +inf."""
    rows = logits.reshape(-1, logits.shape[-1])  # [rows, V]
    rest = (top_k, row_top_k, top_p, row_top_p, min_p, row_min_p, order)
    found = filter_rows(rows.detach(), temperature, row_temperature, *rest)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    # 1 / T in the type of the arithmetic; a greedy row has one kept token, at 0
    t = of_rows(temperature, row_temperature, rows, dtype)
    inverse = torch.where(found.greedy, 0.0, 1 / torch.where(found.greedy, 1.0, t))  # [rows]
    scaled = rows.to(dtype) * inverse[:, None]  # [rows, V]
    bad = rows.isnan().any(-1) | (rows == math.inf).any(-1)  # [rows]
    spoiled = torch.where(bad, math.nan, 1).to(dtype)[:, None]  # NaN in value and gradient
    out = torch.where(found.kept | bad[:, None], scaled * spoiled, -math.inf)
    return out.to(logits.dtype).reshape(logits.shape)
