"""Checks of what ``sample`` and ``filter_logits`` share: temperature, top-k, top-p, min-p and their
order.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from pyllmtune import _checks
from pyllmtune.reference.row_filter import ORDERS

Order = Literal["hf", "vllm", "llama.cpp", "joint"]
_INTS = (torch.int64, torch.int32)


def _in_range(name: str, low: float, high: float, least: float, most: float, remedy: str) -> None:
    if not (low >= least and high <= most and high < math.inf):
        got = low if low == high else f"{low} to {high}"
        raise ValueError(f"{name} must be {remedy}, got {got}")


def split_parameter(
    name: str,
    value: float | Tensor | None,
    rows: torch.Size,
    device: torch.device,
    *,
    off: float,
    dtype: torch.dtype,
    least: float = -math.inf,
    most: float = math.inf,
    remedy: str,
) -> tuple[Any, Tensor | None]:
    """One value for all rows as (scalar, None), or one per row as (off, flat tensor of ``dtype``).

    ``None`` means ``off``. Values are checked where that needs no host sync: scalars always,
    tensors on the CPU outside ``torch.compile``; a GPU flags the row of a bad value as invalid.
    """
    integral = dtype == torch.int64
    if value is None:
        return off, None
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or (integral and not isinstance(value, int)):
            raise TypeError(f"{name} must be a number, {remedy}; got {value!r}")
        number = int(value) if integral else float(value)
        _in_range(name, number, number, least, most, remedy)
        return number, None
    _checks.check_tensor(name, value, _INTS if integral else _checks.FLOATS)
    if value.requires_grad:
        raise ValueError(
            f"{name} requires grad, but this op has no gradient in it; pass {name}.detach()"
        )
    if value.dim() == 0:
        value = value.to(device).expand(rows)
    _checks.check_like(name, value, rows, device, "one value per row")
    if device.type == "cpu" and not torch.compiler.is_compiling() and value.numel():
        low, high = (bound.item() for bound in value.aminmax())
        _in_range(name, low, high, least, most, remedy)
    return off, value.to(dtype).reshape(-1).contiguous()


def check_filters(
    temperature: float | Tensor,
    top_k: int | Tensor | None,
    top_p: float | Tensor | None,
    min_p: float | Tensor | None,
    order: str,
    rows: torch.Size,
    device: torch.device,
) -> tuple[Any, ...]:
    """The filters as arguments of the operators: (scalar, per row or None) four times, and the
    order's number.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    return (
        *split_parameter(
            *("temperature", temperature, rows, device),
            off=1.0,
            dtype=torch.float32,
            least=0.0,
            remedy="finite and 0 or more; 0 is greedy",
        ),
        *split_parameter(
            *("top_k", top_k, rows, device),
            off=0,
            dtype=torch.int64,
            least=0,
            remedy="an integer, 0 or more; 0 and None turn it off",
        ),
        *split_parameter(
            *("top_p", top_p, rows, device),
            off=1.0,
            dtype=torch.float64,
            remedy="a finite number; 1 and None turn it off, 0 keeps one token",
        ),
        *split_parameter(
            *("min_p", min_p, rows, device),
            off=0.0,
            dtype=torch.float32,
            least=0.0,
            most=1.0,
            remedy="in [0, 1]; 0 and None turn it off",
        ),
        ORDERS.index(order),
    )
