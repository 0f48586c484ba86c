"""Temperature, top-k, top-p and min-p as one kept set a row, the specification.

Every filter keeps a prefix of the total order (value descending, id ascending), so the kept set is
one too. The fused kernels find where it ends without this sort.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyllmtune.reference import masses

ORDERS = ("hf", "vllm", "llama.cpp", "joint")


class Filtered(NamedTuple):
    """Rows of logits after the filters."""

    z: Tensor  # [rows, V] float32, invalid rows replaced by zeros
    valid: Tensor  # [rows] a logit is allowed, none is NaN or +inf
    temperature: Tensor  # [rows] float32
    greedy: Tensor  # [rows] the temperature is 0: one token is kept
    y: Tensor  # [rows, V] exponents at this temperature
    mass: Tensor  # [rows, V] int64
    ahead: Tensor  # [rows, V] tokens strictly ahead in the total order
    kept: Tensor  # [rows, V] bool; nothing in an invalid row


def of_rows(scalar: float, per_row: Tensor | None, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter as one value per row of ``rows``."""
    if per_row is not None:
        return per_row.to(dtype)
    return torch.full(rows.shape[:1], scalar, dtype=dtype, device=rows.device)


def filter_rows(
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
) -> Filtered:
    """Apply the filters to ``logits [rows, V]``."""
    vocab = logits.shape[-1]
    bits = masses.mass_bits(vocab)
    t = of_rows(temperature, row_temperature, logits, torch.float32)  # [rows]
    k = of_rows(top_k, row_top_k, logits, torch.int64)
    p = of_rows(top_p, row_top_p, logits, torch.float64)
    m = of_rows(min_p, row_min_p, logits, torch.float32)

    z = logits.float()  # [rows, V]  read V, write V
    bad = z.isnan().any(-1) | (z == math.inf).any(-1)  # [rows]  read 2V
    sound = (t >= 0) & (t < math.inf) & ~p.isnan() & ~m.isnan()  # [rows]
    valid = ~bad & (z > -math.inf).any(-1) & sound  # [rows]  read V
    z = torch.where(valid[:, None], z, 0.0)
    greedy = t < masses.GREEDY_BELOW  # [rows]
    t = torch.where(greedy | ~sound, 1.0, t)

    y = masses.exponents(z, t)  # [rows, V]  read 2V, write V
    mass = masses.masses(y, bits)  # [rows, V]
    if ORDERS[order] == "llama.cpp":  # its filters see the logits before the temperature
        filter_y = masses.exponents(z, torch.ones_like(t))
        filter_mass = masses.masses(filter_y, bits)
    else:
        filter_y, filter_mass = y, mass

    by_rank = z.argsort(dim=-1, descending=True, stable=True)  # [rows, V]  a sort
    place = torch.arange(vocab, device=z.device)  # [V]
    ahead = torch.empty_like(by_rank).scatter_(-1, by_rank, place.expand_as(by_rank))
    ranked_mass = filter_mass.gather(-1, by_rank)  # [rows, V]
    ranked_y = filter_y.gather(-1, by_rank)

    least_y = masses.log2_exact(m.clamp(1e-45, 1.0))  # [rows]
    off = torch.ones_like(by_rank, dtype=torch.bool)
    in_k = (place < k[:, None]) | (k <= 0)[:, None]  # [rows, V]
    in_m = (ranked_y >= least_y[:, None]) | (m <= 0)[:, None]
    base = {"hf": in_k, "vllm": in_k & in_m, "llama.cpp": in_k, "joint": off}[ORDERS[order]]
    ranked_mass = torch.where(base, ranked_mass, 0)
    need = masses.needed_mass(ranked_mass.sum(-1), p.nan_to_num().clamp(0, 1 - 2**-53))  # [rows]
    before = ranked_mass.cumsum(-1) - ranked_mass  # [rows, V] mass strictly ahead
    in_p = (before < need[:, None]) | (p >= 1)[:, None]
    one = (place == 0) & greedy[:, None]
    kept = torch.where(greedy[:, None], one, in_k & in_m & in_p & base)
    kept = torch.zeros_like(kept).scatter_(-1, by_rank, kept)  # back in id order
    kept &= (z > -math.inf) & valid[:, None]
    return Filtered(z, valid, t, greedy, y, mass, ahead, kept)
