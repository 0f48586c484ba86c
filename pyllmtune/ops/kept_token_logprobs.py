"""kept_token_logprobs: token_logprobs over the tokens that a sampler kept. Users reach it by
``token_logprobs(..., kept=)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyllmtune import _ops
from pyllmtune.kept import KeptTokens
from pyllmtune.reference import kept_token_logprobs as reference


def kept_token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    kept: KeptTokens,
    temperature: float,
    row_temperature: Tensor | None,
    mask: Tensor | None,
    floor: str,
) -> tuple[Tensor, ...]:
    """Log-prob, entropy and logsumexp ``[rows]`` of arguments that were checked.

    Args:
        logits: ``[outer, inner, V]``, or ``[entries]``: one for each of ``kept.token_ids``.
        tokens, row_temperature, mask: ``[rows]``.
    """
    word = "kept_token_logprobs"
    run = reference.kept_token_logprobs if floor == "reference" else _ops.handle(word, floor)
    offsets, token_ids = (part.contiguous() for part in kept)
    return run(logits, offsets, token_ids, tokens, temperature, row_temperature, mask)[:3]


def check_kept(kept: object, rows: int, vocab: int, device: torch.device) -> None:
    """``kept`` is a KeptTokens of ``rows`` rows; on the CPU its values are looked at too."""
    if not isinstance(kept, KeptTokens):
        raise TypeError(f"kept must be a KeptTokens, got {type(kept).__name__}")
    for name, value, dtype in zip(kept._fields, kept, (torch.int64, torch.int32), strict=True):
        if value.dtype != dtype or value.dim() != 1 or value.device != device:
            raise ValueError(
                f"kept.{name} must be 1-d, {dtype} and on {device}; got {value.dim()}-d, "
                f"{value.dtype} on {value.device}"
            )
    offsets, ids = kept
    if offsets.shape[0] != rows + 1:
        raise ValueError(
            f"kept must have a row for each of the {rows} tokens, leading axes flattened; "
            f"got {kept.num_rows}"
        )
    if device.type != "cpu" or torch.compiler.is_compiling():
        return  # no host sync on a GPU: the kernel turns such a row into NaN
    entries = ids.shape[0]
    ends = (int(offsets[0]), int(offsets[-1]))
    if ends != (0, entries) or (rows and int(offsets.diff().min()) < 0):
        raise ValueError(f"kept.offsets must rise from 0 to {entries}, the number of token ids")
    low, high = (int(bound) for bound in ids.aminmax()) if entries else (0, 0)
    if low < 0 or high >= vocab:
        raise ValueError(f"kept.token_ids must be in [0, {vocab}), got {low} to {high}")


def _fake_forward(
    logits: Tensor, offsets: Tensor, token_ids: Tensor, tokens: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = tokens.shape[0]
    one = [logits.new_empty(rows, dtype=dtype) for _ in range(3)]
    return (*one, logits.new_empty((2, rows), dtype=dtype))


def _fake_backward(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, offsets, token_ids, tokens, temperature, row_temperature, mask = inputs
    _, entropy, _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(logits, offsets, token_ids, tokens, row_temperature, mask, entropy, stats)
    ctx.temperature = temperature


def _register(floor: str) -> None:
    forward, backward = (
        f"{_ops.NAMESPACE}::{_ops.op_name(word, floor)}"
        for word in ("kept_token_logprobs", "kept_token_logprobs_backward")
    )

    @once_differentiable
    def gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, offsets, token_ids, tokens, row_temperature, mask, *rest = ctx.saved_tensors
        upstream = (grad.contiguous() for grad in grads[:3])  # a sum's gradient is expanded
        grad = _ops.handle("kept_token_logprobs_backward", floor)(
            *(logits, offsets, token_ids, tokens, ctx.temperature, row_temperature, mask),
            *(*rest, *upstream),
        )
        return grad, *[None] * 6

    torch.library.register_fake(forward, _fake_forward, lib=_ops.LIBRARY)
    torch.library.register_fake(backward, _fake_backward, lib=_ops.LIBRARY)
    _ops.register_autograd(forward, gradient, _save)


_ops.for_every_floor(_register)
