"""filter_logits: logits / T where the filters keep them, -inf elsewhere; and the gradient.

    out_i = z_i * (1 / T) if i is kept else -inf          [outer, inner, V]
    dz_i  = grad_i * (1 / T) where out_i > -inf, else 0

Forward: one program a row; row_filter.py finds where the kept tokens end, then the row is read once
more and written. Without filters that is two reads and a write. The row may be written in place:
the last sweep stores each element behind its own load, after all others. Backward: programs over
(row, block of V), which read the gradient only where a token was kept.
Limits: V < 2^31, fewer than 2^31 rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyllmtune.reference.masses import mass_bits

from .common import INF, block_and_warps, device_function, on_device
from .masses import GREEDY_BELOW, order_key
from .row_filter import (
    CAPACITY,
    ROWS_PER_LAUNCH,
    find_kept,
    fraction_bits,
    is_kept,
    launch_options,
    new_lists,
    row_offset,
    row_parameters,
)


@device_function
def _inverse_temperature(temperature):
    """1 / T; 0 in a greedy row, whose one kept token gets logit 0."""
    greedy = temperature < GREEDY_BELOW
    return tl.where(greedy, 0.0, tl.div_rn(1.0, tl.where(greedy, 1.0, temperature)))


@triton.jit
def _filter_logits_fwd_kernel(
    logits_ptr,
    out_ptr,
    lists_ptr,
    row_temperature_ptr,
    row_top_k_ptr,
    row_top_p_ptr,
    row_min_p_ptr,
    temperature,
    top_k: tl.int64,
    fraction: tl.int64,
    min_p,
    first_row,
    inner,
    vocab,
    bits,
    stride_outer,
    stride_inner,
    out_stride_outer,
    out_stride_inner,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = first_row + tl.program_id(0)
    z_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner)
    out_row_ptr = out_ptr + row_offset(row, inner, out_stride_outer, out_stride_inner)
    list_ptr = lists_ptr + tl.program_id(0).to(tl.int64) * (2 * CAPACITY)
    parameters = row_parameters(
        row,
        temperature,
        row_temperature_ptr,
        top_k,
        row_top_k_ptr,
        fraction,
        row_top_p_ptr,
        min_p,
        row_min_p_ptr,
    )
    row_source = (z_ptr, None, vocab, list_ptr, 0)
    bad, valid, _, cut, _ = find_kept(row_source, parameters, bits, ORDER, BLOCK)
    inverse = _inverse_temperature(parameters[0])
    other = tl.where(bad, float("nan"), -INF)
    tl.debug_barrier()  # in place: no thread writes before all have read the row
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab
        z = tl.load(z_ptr + columns, mask=inside, other=-INF).to(tl.float32)
        kept = is_kept(order_key(z), columns, cut) & valid
        out = tl.where(kept, z * inverse, other)
        tl.store(out_row_ptr + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _filter_logits_bwd_kernel(
    grad_ptr,
    output_ptr,
    out_ptr,
    row_temperature_ptr,
    temperature,
    inner,
    vocab,
    grad_stride_outer,
    grad_stride_inner,
    output_stride_outer,
    output_stride_inner,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    t = tl.cast(temperature, tl.float32)
    if row_temperature_ptr is not None:
        t = tl.load(row_temperature_ptr + row)
    output_ptr += row_offset(row, inner, output_stride_outer, output_stride_inner)
    output = tl.load(output_ptr + columns, mask=inside, other=-INF).to(tl.float32)
    kept = output > -INF
    grad_ptr += row_offset(row, inner, grad_stride_outer, grad_stride_inner)
    grad = tl.load(grad_ptr + columns, mask=kept, other=0.0).to(tl.float32)
    dz = tl.where(kept, grad * _inverse_temperature(t), 0.0)
    dz = tl.where(output != output, output, dz)  # a row of NaN
    out_ptr += row.to(tl.int64) * vocab
    tl.store(out_ptr + columns, dz.to(out_ptr.dtype.element_ty), mask=inside)


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
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    filters = (temperature, row_temperature, top_k, row_top_k, top_p, row_top_p, min_p, row_min_p)
    filter_logits_out(logits, *filters, order, out)
    return out


def filter_logits_out(
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
    out: Tensor,
) -> None:
    outer, inner, vocab = logits.shape
    rows = outer * inner
    if rows == 0:
        return
    options = launch_options(vocab)
    lists = new_lists(rows, logits.device)
    with on_device(logits):
        for first in range(0, rows, ROWS_PER_LAUNCH):
            _filter_logits_fwd_kernel[(min(rows - first, ROWS_PER_LAUNCH),)](
                logits,
                out,
                lists,
                row_temperature,
                row_top_k,
                row_top_p,
                row_min_p,
                temperature,
                top_k,
                fraction_bits(top_p),
                min_p,
                first,
                inner,
                vocab,
                mass_bits(vocab),
                *logits.stride()[:2],
                *out.stride()[:2],
                ORDER=order,
                **options,
            )


def filter_logits_backward(
    grad: Tensor, output: Tensor, temperature: float, row_temperature: Tensor | None
) -> Tensor:
    outer, inner, vocab = grad.shape
    grad_logits = torch.empty_like(grad, memory_format=torch.contiguous_format)
    if outer * inner == 0:
        return grad_logits
    block, warps = block_and_warps(vocab, grad.dtype, vectors=2)
    with on_device(grad):
        _filter_logits_bwd_kernel[(outer * inner, triton.cdiv(vocab, block))](
            grad,
            output,
            grad_logits,
            row_temperature,
            temperature,
            inner,
            vocab,
            *grad.stride()[:2],
            *output.stride()[:2],
            BLOCK=block,
            num_warps=warps,
        )
    return grad_logits
