"""The decoding ops of the emulated floor: what their .cu files launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .emulated_floor import _dtype_code, _flat, library


def _filters(*values: Any) -> tuple[Any, ...]:
    """(scalar, per row) of temperature, top_k, top_p and min_p, as a driver takes them."""
    kinds = (float, int, float, float)
    pairs = zip(kinds, values[::2], values[1::2], strict=True)
    return tuple(part for kind, scalar, rows in pairs for part in (kind(scalar), _flat(rows)))


def filter_logits(logits: Tensor, *filters: Any) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype)
    filter_logits_out(logits, *filters, out)
    return out


def filter_logits_out(logits: Tensor, *rest: Any) -> None:
    *filters, order, out = rest
    outer, inner, vocab = logits.shape
    library("filter_logits").call(
        "filter_logits",
        _dtype_code(logits),
        logits,
        *logits.stride()[:2],
        out,
        *out.stride()[:2],
        outer * inner,
        inner,
        vocab,
        *_filters(*filters),
        order,
    )


def filter_logits_backward(
    grad: Tensor, output: Tensor, temperature: float, row_temperature: Tensor | None
) -> Tensor:
    outer, inner, vocab = output.shape
    grad_logits = torch.empty(output.shape, dtype=output.dtype)
    library("filter_logits").call(
        "filter_logits_backward",
        _dtype_code(output),
        grad,
        *grad.stride()[:2],
        output,
        *output.stride()[:2],
        grad_logits,
        outer * inner,
        inner,
        vocab,
        float(temperature),
        _flat(row_temperature),
    )
    return grad_logits


def _allowed(allowed: Tensor | None) -> tuple[Tensor | None, Tensor | None, bool]:
    """Flags, bits, and whether there is a set for each row."""
    per_row = allowed is not None and allowed.shape[0] > 1
    flags = allowed if allowed is not None and allowed.dtype == torch.bool else None
    return flags, allowed if flags is None else None, per_row


def sample(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *filters, order = args[:9]
    allowed, row_indices, samples, *numbers = args[9:15]
    position_rows, scores, stats, _, kept = args[15:]
    outer, inner, vocab = logits.shape
    rows = outer * inner if row_indices is None else row_indices.shape[0]
    rows_read = (
        *(_dtype_code(logits), logits, outer * inner, inner, vocab, *logits.stride()[:2]),
        *(*_allowed(allowed), row_indices, rows),
    )
    tokens = torch.empty(rows, samples, dtype=torch.int64)
    valid = torch.empty(rows, dtype=torch.bool)
    logprobs = torch.empty(3 if scores else 0, rows, samples)
    rank = torch.empty(rows if stats else 0, samples, dtype=torch.int64)
    num_kept = torch.empty(rows, dtype=torch.int64)
    kept_mass, entropy = (torch.empty(rows if stats else 0) for _ in range(2))
    cuts = torch.empty(rows, 2, dtype=torch.int32)
    library("sample").call(
        "sample",
        *rows_read,
        *_filters(*filters),
        order,
        samples,
        *numbers,
        position_rows,
        tokens,
        valid,
        logprobs if scores else None,
        rank if stats else None,
        num_kept,
        *((kept_mass, entropy) if stats else (None, None)),
        cuts if kept else None,
    )
    ids = torch.empty(0, dtype=torch.int32)
    if kept:
        offsets = torch.empty(rows + 1, dtype=torch.int64)
        library("sample").call("kept_offsets", num_kept, rows, offsets)
        ids = torch.empty(int(offsets[-1]), dtype=torch.int32)
        library("sample").call("kept_ids", *rows_read, cuts, offsets, ids)
    return tokens, valid, logprobs, rank, num_kept, kept_mass, entropy, ids


def beam_step(
    logits: Tensor,
    beam_scores: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    allowed: Tensor | None,
    renormalize: bool,
    widths: Tensor | None,
    eos_token_ids: Tensor | None,
    num_candidates: int,
    num_groups: int,
    diversity_penalty: float,
) -> tuple[Tensor, ...]:
    batch, beams, vocab = logits.shape
    parts = batch * beams * -(-vocab // 8192)
    size = beams // num_groups
    kept = min(vocab, num_candidates // num_groups + beams - size)
    results = [torch.empty(batch, num_candidates)]
    results += [torch.empty(batch, num_candidates, dtype=torch.int64) for _ in range(2)]
    results += [torch.empty(batch, count, dtype=torch.bool) for count in (num_candidates, beams)]
    library("beam_step").call(
        "beam_step",
        *(_dtype_code(logits), logits, batch, beams, vocab, *logits.stride()[:2]),
        *(_flat(beam_scores), float(temperature), _flat(row_temperature)),
        *(*_allowed(allowed), renormalize, widths, eos_token_ids),
        *(0 if eos_token_ids is None else eos_token_ids.numel(), num_candidates, num_groups),
        *(float(diversity_penalty), torch.empty(parts, 2)),
        *(torch.empty(parts, kept, dtype=torch.int32) for _ in range(2)),
        torch.empty(batch, beams, dtype=torch.int32),
        *results,
    )
    return tuple(results)
