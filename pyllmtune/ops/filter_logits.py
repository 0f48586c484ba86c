"""filter_logits: temperature, top-k, top-p and min-p in one read and one write, without a sort."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyllmtune import _backend, _checks, _ops
from pyllmtune._backend import Backend
from pyllmtune._filters import Order, check_filters
from pyllmtune.ops.token_logprobs import as_rows
from pyllmtune.reference import filter_logits as reference


def filter_logits(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    order: Order = "hf",
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """``logits / temperature`` for the tokens that the filters keep, -inf for the others.

    Tokens are ordered by value, highest first, then by id, and every filter keeps a prefix of that
    order: top-k exactly ``min(k, allowed)`` tokens, top-p each token with less than ``p`` of the
    mass strictly ahead of it, min-p each token with at least ``min_p`` times the probability of the
    best. Probabilities are integers of 44 bits (docs/sample.md), so the kept set is the same on
    every backend. The gradient is that of a gate: ``1 / temperature`` where kept, 0 elsewhere.

    Args:
        logits: ``[..., V]``, float16, bfloat16, float32 or float64, last axis contiguous. -inf
            means "not allowed". float64 logits are compared as float32.
        temperature: 0 or more, scalar or one per row ``[...]``; at 0 the best token alone is kept,
            with logit 0.
        top_k: scalar or per row; 0 or None is off.
        top_p: scalar or per row; 1 or more, or None, is off; 0 or less keeps one token.
        min_p: in [0, 1], scalar or per row; 0 or None is off.
        order: ``"hf"`` temperature, k, p, min_p, each on what is left; ``"vllm"`` temperature,
            min_p, k, p; ``"llama.cpp"`` k, p, min_p, then temperature; ``"joint"`` k, p and min_p
            each on the whole distribution.
        out: receives the result; shape, dtype and device of ``logits``. It may be ``logits``.
        backend: ``"auto"`` takes the fastest present; a named one is used or refused, never
            replaced.

    Returns:
        Shape and dtype of ``logits``; a float16 logit over a tiny temperature may overflow to
        infinity, which ``sample`` does not. A row with NaN or +inf is NaN throughout, no other is.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; ``out`` is
            given where a gradient is recorded.

    >>> import torch
    >>> z = torch.tensor([0.36, 0.25, 0.15, 0.09, 0.06, 0.05, 0.04]).log()
    >>> filter_logits(z, top_p=0.9).isfinite().sum()  # five tokens sum to 0.91
    tensor(5)
    """
    _checks.check_logits("logits", logits)
    shape, device = logits.shape[:-1], logits.device
    filters = check_filters(temperature, top_k, top_p, min_p, order, shape, device)
    floor = _backend.resolve(backend, device, logits.dtype)
    if out is None:
        rows = as_rows(logits)
        if floor == "reference":
            return reference.filter_logits(rows, *filters).reshape(logits.shape)
        return _ops.handle("filter_logits", floor)(rows, *filters).reshape(logits.shape)

    _checks.check_logits("out", out)
    _checks.check_like("out", out, logits.shape, device, "the shape of logits")
    if out.dtype != logits.dtype:
        raise ValueError(f"out must have the dtype of logits, {logits.dtype}; got {out.dtype}")
    if torch.is_grad_enabled() and (logits.requires_grad or out.requires_grad):
        raise ValueError("out= records no gradient; leave it out, or call under torch.no_grad()")
    rows, out_rows = as_rows(logits), as_rows(out)
    if out.numel() and out_rows.data_ptr() != out.data_ptr():
        raise ValueError("out must be viewable as [outer, inner, V]; pass a contiguous tensor")
    if floor == "reference":
        out_rows.copy_(reference.filter_logits(rows, *filters))
    else:
        _ops.handle("filter_logits_out", floor)(rows, *filters, out_rows)
    return out


def _fake_forward(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.temperature = inputs[1]
    ctx.save_for_backward(output, inputs[2])


def _register(floor: str) -> None:
    forward, write, backward = (
        f"{_ops.NAMESPACE}::{_ops.op_name(word, floor)}"
        for word in ("filter_logits", "filter_logits_out", "filter_logits_backward")
    )

    @once_differentiable
    def gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output, row_temperature = ctx.saved_tensors
        args = (grad.contiguous(), output, ctx.temperature, row_temperature)
        return (_ops.handle("filter_logits_backward", floor)(*args), *[None] * 9)

    torch.library.register_fake(forward, _fake_forward, lib=_ops.LIBRARY)
    torch.library.register_fake(write, lambda *_: None, lib=_ops.LIBRARY)
    torch.library.register_fake(backward, _fake_forward, lib=_ops.LIBRARY)
    _ops.register_autograd(forward, gradient, _save)


_ops.for_every_floor(_register)
