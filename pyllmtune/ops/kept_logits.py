"""kept_logits: logits of kept tokens alone, from hidden states. Users reach it by
``linear_token_logprobs(..., kept=)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyllmtune import _ops
from pyllmtune.kept import KeptTokens
from pyllmtune.ops import kept_logits_dense as dense
from pyllmtune.reference import kept_logits as reference


def kept_logits(
    hidden: Tensor, weight: Tensor, kept: KeptTokens, mask: Tensor | None, floor: str
) -> Tensor:
    """``[entries]`` float32 (float64 for float64): the dot product of each kept token's row of
    ``weight [V, D]`` with its row of ``hidden [rows, D]``, of arguments that were checked.
    """
    run = reference.kept_logits if floor == "reference" else _ops.handle("kept_logits", floor)
    operands = (hidden.contiguous(), weight.contiguous())
    sets = [part.contiguous() for part in kept]
    sizes = (sets[1].shape[0], hidden.shape[0], weight.shape[0])
    if floor == "reference" or torch.compiler.is_compiling() or not dense.is_faster(*sizes):
        return run(*operands, *sets, mask)
    if mask is not None:  # a matmul reads every row
        operands = (torch.where(mask[:, None], operands[0], 0), operands[1])
    with torch.autocast(hidden.device.type, enabled=False):  # operands have the dtype they keep
        return dense.DenseKeptLogits.apply(*operands, *sets)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_forward(
    hidden: Tensor, weight: Tensor, offsets: Tensor, token_ids: Tensor, *_: Any
) -> Tensor:
    return hidden.new_empty(token_ids.shape, dtype=_accumulator(hidden.dtype))


def _fake_backward_hidden(grad: Tensor, weight: Tensor, offsets: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(offsets.shape[0] - 1, weight.shape[1])


def _fake_backward_weight(*args: Tensor) -> Tensor:
    return torch.empty_like(args[-1], memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _register(floor: str) -> None:
    forward, backward_hidden, backward_weight = (
        f"{_ops.NAMESPACE}::{_ops.op_name(f'kept_logits{suffix}', floor)}"
        for suffix in ("", "_backward_hidden", "_backward_weight")
    )

    @once_differentiable
    def gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, *kept, mask = ctx.saved_tensors
        rows, by_hidden, by_weight = KeptTokens(*kept).rows, None, None
        # the kernels leave out what has no gradient, and with it the rows that the mask leaves out
        grad = grad.contiguous() if mask is None else torch.where(mask[rows], grad, 0)
        if ctx.needs_input_grad[0]:
            by_hidden = _ops.handle("kept_logits_backward_hidden", floor)(grad, weight, *kept)
        if ctx.needs_input_grad[1]:
            token_ids, order = kept[1].sort(stable=True)  # a token's entries in the order of rows
            entries = (grad[order], rows[order], token_ids)
            by_weight = _ops.handle("kept_logits_backward_weight", floor)(*entries, hidden, weight)
        return by_hidden, by_weight, None, None, None

    torch.library.register_fake(forward, _fake_forward, lib=_ops.LIBRARY)
    torch.library.register_fake(backward_hidden, _fake_backward_hidden, lib=_ops.LIBRARY)
    torch.library.register_fake(backward_weight, _fake_backward_weight, lib=_ops.LIBRARY)
    _ops.register_autograd(forward, gradient, _save)


_ops.for_every_floor(_register)
