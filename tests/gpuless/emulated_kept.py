"""The ops over kept sets of the emulated floor: what kept_token_logprobs.cu and
kept_logits.cu launch."""

from __future__ import annotations

import torch
from torch import Tensor

from .emulated_floor import _dtype_code, _flat, library


def _rows(
    logits: Tensor,
    offsets: Tensor,
    token_ids: Tensor,
    tokens: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    mask: Tensor | None,
) -> tuple:
    sizes = (0, 0, 0, 0) if logits.dim() == 1 else (*logits.shape[1:], *logits.stride()[:2])
    return (
        *(_dtype_code(logits), logits, tokens.shape[0], token_ids.shape[0], *sizes),
        *map(_flat, (offsets, token_ids, tokens)),
        *(float(temperature), _flat(row_temperature), _flat(mask)),
    )


def kept_token_logprobs(logits: Tensor, *rest) -> tuple[Tensor, ...]:
    rows = rest[2].shape[0]
    results = [torch.empty(size) for size in [(rows,)] * 3 + [(2, rows)]]
    library("kept_token_logprobs").call("kept_token_logprobs", *_rows(logits, *rest), *results)
    return tuple(results)


def kept_token_logprobs_backward(logits: Tensor, *rest) -> Tensor:
    grad = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    per_row = map(_flat, rest[6:])
    library("kept_token_logprobs").call(
        "kept_token_logprobs_backward", *_rows(logits, *rest[:6]), *per_row, grad
    )
    return grad


def kept_logits(
    hidden: Tensor, weight: Tensor, offsets: Tensor, token_ids: Tensor, mask: Tensor | None
) -> Tensor:
    logits = torch.empty(token_ids.shape)
    library("kept_logits").call(
        *("kept_logits", _dtype_code(hidden), hidden, weight, *weight.shape),
        *(hidden.shape[0], token_ids.shape[0], offsets, token_ids, _flat(mask), logits),
    )
    return logits


def kept_logits_backward_hidden(
    grad: Tensor, weight: Tensor, offsets: Tensor, token_ids: Tensor
) -> Tensor:
    rows = offsets.shape[0] - 1
    out = weight.new_empty(rows, weight.shape[1])
    library("kept_logits").call(
        *("kept_logits_backward_hidden", _dtype_code(weight), grad, weight, *weight.shape),
        *(rows, token_ids.shape[0], offsets, token_ids, out),
    )
    return out


def kept_logits_backward_weight(
    grad: Tensor, rows: Tensor, token_ids: Tensor, hidden: Tensor, weight: Tensor
) -> Tensor:
    out = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    library("kept_logits").call(
        *("kept_logits_backward_weight", _dtype_code(weight), grad, rows, token_ids),
        *(token_ids.shape[0], hidden, *weight.shape, out),
    )
    return out
