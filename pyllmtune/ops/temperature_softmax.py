"""temperature_softmax: probabilities, or log-probabilities, of a row of logits at a temperature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyllmtune import _backend, _checks, _ops
from pyllmtune._backend import Backend
from pyllmtune.ops.token_logprobs import as_rows
from pyllmtune.reference import temperature_softmax as reference


def temperature_softmax(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    log: bool = False,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """``softmax(logits / temperature)`` over the last axis, or its logarithm.

    Differentiable in the logits and in a tensor of temperatures. Backward keeps the result and
    nothing else.

    Args:
        logits: ``[..., V]``, float16, bfloat16, float32 or float64, last axis contiguous. Up to two
            leading axes may have any stride: a shifted slice such as ``logits[:, :-1]`` is not
            copied. -inf means "not allowed": probability exactly 0, gradient exactly 0.
        temperature: scalar, 0-d tensor, or one per row ``[...]``; finite and at least 0. 0 is
            greedy: probability 1 for the highest logit, of equal ones the lowest id; gradient 0.
        log: log-probabilities instead of probabilities.
        dtype: of the result; that of ``out`` or of the logits if not given. float32 for half
            precision logits costs twice the bytes and keeps the gradient's digits.
        out: result is written there and returned: ``[..., V]``, last axis contiguous, other axes of
            any stride. May be ``logits`` itself. Not for a call that autograd records.
        backend: ``"auto"`` takes the fastest present; a named one is used or refused, never
            replaced.

    Returns:
        ``[..., V]``. Arithmetic in float32 (float64 if the logits or the result are), one rounding
        at the store. A row of -inf alone: probabilities 0, log-probabilities -inf, gradient 0. A
        row with NaN or +inf: NaN in that row and its gradient, nowhere else.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, V is 0, a last axis is not contiguous, the temperature
            is negative or not finite (tensors: on the CPU outside ``torch.compile``), ``out``
            overlaps the logits or itself, or autograd would record a call with ``out``.

    >>> import torch
    >>> temperature_softmax(torch.tensor([3.0, 1.0]))  # e^3 / (e^3 + e^1)
    tensor([0.8808, 0.1192])
    >>> temperature_softmax(torch.tensor([3.0, 1.0]), 0.0)
    tensor([1., 0.])
    """
    _checks.check_logits("logits", logits)
    if out is not None:
        _checks.check_tensor("out", out, _checks.FLOATS)
    if dtype is None:
        dtype = logits.dtype if out is None else out.dtype
    if dtype not in _checks.FLOATS:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    shape, device = logits.shape[:-1], logits.device
    scalar, per_row = _checks.split_temperature(
        temperature, shape, device, zero=True, gradient=True
    )
    if out is not None:
        _check_out(out, logits, temperature, dtype)
    source = logits.double() if torch.float64 in (dtype, logits.dtype) else logits
    floor = _backend.resolve(backend, device, source.dtype)

    rows = as_rows(source)  # [outer, inner, V]
    # what kernels store: the dtype they read, or float32, from which one rounding is left to do
    stored = dtype if dtype == source.dtype else _accumulator(source)
    if per_row is not None:
        per_row = per_row.reshape(rows.shape[:2]).contiguous().to(_accumulator(source))
    args = (rows, scalar, per_row, log)
    if out is not None and floor != "reference" and out.dtype == stored:
        _ops.handle("temperature_softmax_out", floor)(*args, _rows_of(out))
        if not torch.compiler.is_compiling():  # a graph that holds the old values must refuse
            torch.autograd.graph.increment_version(out)
        return out
    run = (
        reference.temperature_softmax
        if floor == "reference"
        else _ops.handle("temperature_softmax", floor)
    )
    result = run(*args, stored).reshape(logits.shape).to(dtype)
    return result if out is None else out.copy_(result)


def _accumulator(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _check_out(
    out: Tensor, logits: Tensor, temperature: float | Tensor, dtype: torch.dtype
) -> None:
    _checks.check_like("out", out, logits.shape, logits.device, "that of logits")
    if out.dtype != dtype:
        raise TypeError(f"out must have dtype={dtype}, got {out.dtype}")
    learnt = logits.requires_grad or (isinstance(temperature, Tensor) and temperature.requires_grad)
    if out.requires_grad or (learnt and torch.is_grad_enabled()):
        raise ValueError(
            "out= is not recorded by autograd, but "
            f"{'out' if out.requires_grad else 'logits or temperature'} requires grad; "
            "leave out= away, or call under torch.no_grad() with a plain tensor"
        )
    if out.shape[-1] > 1 and out.stride(-1) != 1:
        raise ValueError(
            f"out must be contiguous along its last axis, got strides {list(out.stride())}"
        )
    _rows_of(out)
    if torch.compiler.is_compiling() or out.numel() == 0:
        return
    if _extent(out) is None:
        raise ValueError(
            f"out must not overlap itself, got shape {list(out.shape)}, strides "
            f"{list(out.stride())}; use torch.empty"
        )
    same = (
        out.data_ptr() == logits.data_ptr()
        and out.stride() == logits.stride()
        and out.dtype == logits.dtype
    )
    first, last = _span(out)
    from_, to = _span(logits)
    if not same and first < to and from_ < last:
        raise ValueError(
            "out overlaps logits; pass logits itself to work in place, or memory of its own"
        )


def _extent(x: Tensor) -> int | None:
    """Elements from the first to the last of ``x``; None if two of its elements may be one."""
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return None
            extent += stride * (size - 1)
    return extent


def _span(x: Tensor) -> tuple[int, int]:
    """Addresses: the first byte of ``x`` and the one behind its last."""
    last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _rows_of(out: Tensor) -> Tensor:
    """``out`` as ``[outer, inner, V]``, never a copy."""
    if out.dim() <= 3:
        return as_rows(out)
    merged = out.shape[:-2]
    for axis in range(len(merged) - 1):
        if merged[axis] > 1 and out.stride(axis) != out.stride(axis + 1) * merged[axis + 1]:
            raise ValueError(
                f"out must have at most two leading axes of any stride, got {list(out.stride())}; "
                "use a contiguous out"
            )
    return out.view(-1, *out.shape[-2:])


def _fake_forward(
    logits: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    log: bool,
    dtype: torch.dtype,
) -> Tensor:
    return logits.new_empty(logits.shape, dtype=dtype)


def _fake_backward(
    grad: Tensor,
    output: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    log: bool,
    dtype: torch.dtype,
    temperature_gradient: bool,
) -> tuple[Tensor, Tensor]:
    rows = output.shape[:2] if temperature_gradient else (0, 0)
    return output.new_empty(output.shape, dtype=dtype), output.new_empty(
        rows, dtype=_accumulator(output)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, ctx.temperature, row_temperature, ctx.log, _ = inputs
    ctx.logits_dtype = logits.dtype
    ctx.save_for_backward(output, row_temperature)


def _register(floor: str) -> None:
    forward, into, backward = (
        f"{_ops.NAMESPACE}::{_ops.op_name(word, floor)}"
        for word in (
            "temperature_softmax",
            "temperature_softmax_out",
            "temperature_softmax_backward",
        )
    )

    @once_differentiable
    def gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output, row_temperature = ctx.saved_tensors
        wanted = row_temperature is not None and ctx.needs_input_grad[2]
        grad_logits, grad_temperature = _ops.handle("temperature_softmax_backward", floor)(
            grad.contiguous(),  # a sum's gradient is an expanded scalar
            output,
            ctx.temperature,
            row_temperature,
            ctx.log,
            ctx.logits_dtype,
            wanted,
        )
        return grad_logits, None, grad_temperature if wanted else None, None, None

    torch.library.register_fake(forward, _fake_forward, lib=_ops.LIBRARY)
    torch.library.register_fake(into, lambda *args: None, lib=_ops.LIBRARY)
    torch.library.register_fake(backward, _fake_backward, lib=_ops.LIBRARY)
    _ops.register_autograd(forward, gradient, _save)


_ops.for_every_floor(_register)
