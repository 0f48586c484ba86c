"""kl_divergence of the emulated floor: what kl_divergence.cu launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .emulated_floor import _dtype_code, _flat, library


def _rows(
    logits: Tensor,
    ref_logits: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    mask: Tensor | None,
    js_weight: float,
) -> tuple[Any, ...]:
    outer, inner, vocab = logits.shape
    return (
        _dtype_code(logits),
        logits,
        *logits.stride()[:2],
        ref_logits,
        *ref_logits.stride()[:2],
        outer * inner,
        inner,
        vocab,
        float(temperature),
        _flat(row_temperature),
        _flat(mask),
        float(js_weight),
    )


def kl_divergence(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    divergence, stats = torch.empty(logits.shape[:2]), torch.empty(6, *logits.shape[:2])
    library("kl_divergence").call("kl_divergence", *_rows(logits, *rest), divergence, stats)
    return divergence, stats


def kl_divergence_backward(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *row, stats, grad, logits_gradient, ref_gradient = rest
    grads = [
        torch.empty(logits.shape if wanted else (0, 0, 0), dtype=logits.dtype)
        for wanted in (logits_gradient, ref_gradient)
    ]
    pointers = (value if value.numel() else None for value in grads)
    library("kl_divergence").call(
        "kl_divergence_backward", *_rows(logits, *row), *map(_flat, (stats, grad)), *pointers
    )
    return grads[0], grads[1]
