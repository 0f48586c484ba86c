"""kl_divergence: exact Kullback-Leibler or Jensen-Shannon divergence of two rows of logits over the
vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyllmtune import _backend, _checks, _ops
from pyllmtune._backend import Backend
from pyllmtune.ops.token_logprobs import as_rows
from pyllmtune.reference import kl_divergence as reference


def kl_divergence(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reverse: bool = False,
    js_weight: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """``KL(p || q)`` over the whole vocabulary, with ``p = softmax(logits / T)`` and
    ``q = softmax(ref_logits / T)``; one read of each.

    Differentiable in both arguments; one that does not require grad costs nothing. Backward reads
    the logits once more and stores nothing of size V in between; rows whose upstream gradient is
    zero are not read. Nearly equal rows keep their digits: a divergence of 1e-6 has a relative
    error below 1e-4 in float32.

    Args:
        logits: ``[..., V]``, float16, bfloat16, float32 or float64, last axis contiguous. Up to two
            leading axes may have any stride.
        ref_logits: the same shape, dtype and device; strides of its own.
        temperature: positive scalar, or one per row ``[...]``; divides both.
        mask: ``[...]``, true selects. Masked rows give exactly 0, with gradient exactly 0, whatever
            they hold.
        reverse: ``KL(q || p)``, that is, the arguments exchanged.
        js_weight: W in (0, 1): the generalised Jensen-Shannon divergence ``(1 - W) KL(p || m) + W
            KL(q || m)`` with ``m = (1 - W) p + W q`` (beta in "On-Policy Distillation of Language
            Models", arXiv:2306.13649, with the teacher as ``ref_logits``); 0.5 is Jensen-Shannon's.
            It is finite always, and read twice, the second time from the cache.
        backend: ``"auto"`` takes the fastest present; a named one is used or refused, never
            replaced.

    Returns:
        ``[...]`` in nats, 0 or more, float32 (float64 for float64 logits). A token of probability 0
        in the first distribution (-inf) adds nothing. A row in which the second one forbids a token
        that the first allows: +inf, gradient 0. A row with nothing allowed in the first (in either,
        of Jensen-Shannon): 0, gradient 0. NaN or +inf in a row of either: NaN in that row's result
        and gradients, nowhere else.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, V is 0, the last axis is not contiguous, the
            temperature is not positive, js_weight is not in (0, 1) or is given with reverse.

    >>> import torch
    >>> logits, ref_logits = torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 2.0]])
    >>> kl_divergence(logits, ref_logits)  # log 2 - entropy, .6931 - .3653
    tensor([0.3278])
    >>> kl_divergence(logits, ref_logits, reverse=True)
    tensor([0.4338])
    >>> kl_divergence(logits, ref_logits, js_weight=0.5)
    tensor([0.0895])
    """
    _checks.check_logits("logits", logits)
    _checks.check_logits("ref_logits", ref_logits)
    shape, device = logits.shape[:-1], logits.device
    _checks.check_like("ref_logits", ref_logits, logits.shape, device, "that of logits")
    if ref_logits.dtype != logits.dtype:
        raise TypeError(
            f"ref_logits must have the dtype of logits, {logits.dtype}, got {ref_logits.dtype}; "
            "convert one with .to()"
        )
    if js_weight is not None:
        if reverse:
            raise ValueError(
                "reverse=True is for the two directions of KL; "
                "with js_weight=W exchange the roles by js_weight=1 - W"
            )
        if not 0.0 < js_weight < 1.0:
            raise ValueError(
                f"js_weight must be in (0, 1), got {js_weight}; "
                "at the ends it is 0: use reverse=False or True and no js_weight"
            )
    select = _checks.as_mask(mask, shape, device, "the leading shape of logits")
    scalar, per_row = _checks.split_temperature(temperature, shape, device)
    floor = _backend.resolve(backend, device, logits.dtype)

    first, second = as_rows(logits), as_rows(ref_logits)  # [outer, inner, V]
    lead = first.shape[:2]
    if per_row is not None:
        per_row = per_row.reshape(lead).contiguous().to(_accumulator(logits))
    run = reference.kl_divergence if floor == "reference" else _ops.handle("kl_divergence", floor)
    result = run(
        *((second, first) if reverse else (first, second)),
        scalar,
        per_row,
        None if select is None else select.reshape(lead).contiguous(),
        js_weight or 0.0,
    )[0]
    return result.reshape(shape)


def _accumulator(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _fake_forward(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype, rows = _accumulator(logits), logits.shape[:2]
    return logits.new_empty(rows, dtype=dtype), logits.new_empty((6, *rows), dtype=dtype)


def _fake_backward(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, logits_gradient, ref_gradient = rest
    shapes = (logits.shape if wanted else (0, 0, 0) for wanted in (logits_gradient, ref_gradient))
    first, second = (logits.new_empty(shape) for shape in shapes)
    return first, second


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, ref_logits, ctx.temperature, row_temperature, mask, ctx.js_weight = inputs
    _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(logits, ref_logits, row_temperature, mask, stats)


def _register(floor: str) -> None:
    forward, backward = (
        f"{_ops.NAMESPACE}::{_ops.op_name(word, floor)}"
        for word in ("kl_divergence", "kl_divergence_backward")
    )

    @once_differentiable
    def gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, ref_logits, row_temperature, mask, stats = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        grads = _ops.handle("kl_divergence_backward", floor)(
            *(logits, ref_logits, ctx.temperature, row_temperature, mask, ctx.js_weight),
            *(stats, grad.contiguous(), *wanted),  # a sum's gradient is an expanded scalar
        )
        first, second = (
            value if needed else None for value, needed in zip(grads, wanted, strict=True)
        )
        return first, second, None, None, None, None

    torch.library.register_fake(forward, _fake_forward, lib=_ops.LIBRARY)
    torch.library.register_fake(backward, _fake_backward, lib=_ops.LIBRARY)
    _ops.register_autograd(forward, gradient, _save)


_ops.for_every_floor(_register)
