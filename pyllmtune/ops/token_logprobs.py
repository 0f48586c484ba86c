"""token_logprobs: log-prob of given tokens, entropy and logsumexp of a row of logits, in one
read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyllmtune import _backend, _checks, _ops
from pyllmtune._backend import Backend
from pyllmtune.kept import KeptTokens
from pyllmtune.ops.kept_token_logprobs import check_kept, kept_token_logprobs
from pyllmtune.reference import token_logprobs as reference


class TokenLogprobs(NamedTuple):
    """Per-token results, each of the leading shape of the logits, float32 (float64 for float64
    logits).
    """

    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    kept: KeptTokens | None = None,
    inplace_backward: bool = False,
    backend: Backend = "auto",
) -> TokenLogprobs:
    """Log-prob of ``tokens``, entropy and logsumexp of ``softmax(logits / temperature)``, in one
    read.

    All three results are differentiable in ``logits``, in any combination; the gradient of a row
    needs four scalars and one more read, so nothing of size V is stored. Rows whose upstream
    gradients are all zero (masked, clipped, zero advantage) are not read again.

    Args:
        logits: ``[..., V]``, float16, bfloat16, float32 or float64, last axis contiguous. Up to two
            leading axes may have any stride: a shifted slice such as ``logits[:, :-1]`` is not
            copied.
        tokens: ``[...]``, int64 or int32, in ``[0, V)`` wherever the mask selects.
        temperature: positive scalar, or one per token ``[...]``.
        mask: ``[...]``, true selects. Masked rows give exactly 0, with gradient exactly 0, whatever
            they hold.
        kept: the tokens that a sampler kept, ``sample(..., return_kept=True).kept``, a row for each
            token. The distribution is then that of these tokens alone, renormalised: what was
            sampled from. Only their logits are read, and the gradient is 0 elsewhere. A token that
            its row did not keep has log-prob -inf; ``kept.contains(tokens)`` counts them.
        inplace_backward: backward writes the gradient over the logits and allocates nothing. The
            logits must not be used again after backward, and must not be a leaf.
        backend: ``"auto"`` takes the fastest present; a named one is used or refused, never
            replaced.

    Returns:
        ``TokenLogprobs(logprobs, entropy, logsumexp)`` in nats, each ``[...]``; arithmetic and
        results in float32 (float64 for float64 logits). A row of -inf alone: log-prob -inf, entropy
        0, gradient 0. A row with NaN or +inf: NaN in that row's results and gradient, nowhere else.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, V is 0, the last axis is not contiguous, the
            temperature is not positive, or (on the CPU, outside ``torch.compile``) an unmasked
            token is not in ``[0, V)``; on a GPU such a token turns its own row into NaN, and
            ``PYLLMTUNE_DEBUG=1`` makes it an error. ``kept`` does not fit the rows or the
            vocabulary, or is given together with ``inplace_backward``.

    >>> import torch
    >>> out = token_logprobs(torch.tensor([[3.0, 1.0]]), torch.tensor([0]))
    >>> out.logprobs.exp()  # e^3 / (e^3 + e^1)
    tensor([0.8808])
    >>> out.entropy
    tensor([0.3653])
    >>> logits = torch.tensor([[3.0, 1.0, 3.0]])
    >>> kept = KeptTokens.from_mask(torch.tensor([[True, False, True]]))
    >>> token_logprobs(logits, torch.tensor([0]), kept=kept).logprobs.exp()
    tensor([0.5000])
    """
    _checks.check_logits("logits", logits)
    shape, device = logits.shape[:-1], logits.device
    select = _checks.as_mask(mask, shape, device, "the leading shape of logits")
    _checks.check_tokens(tokens, logits, select)
    scalar, per_row = _checks.split_temperature(temperature, shape, device)
    if inplace_backward and logits.is_leaf and logits.requires_grad:
        raise ValueError(
            "inplace_backward=True would write the gradient over a leaf; use it on computed logits"
        )
    floor = _backend.resolve(backend, device, logits.dtype)

    rows = as_rows(logits)  # [outer, inner, V]
    if kept is not None:
        if inplace_backward:
            raise ValueError("inplace_backward=True is for whole rows; leave it out with kept=")
        check_kept(kept, tokens.numel(), logits.shape[-1], device)
        per_token = (None if x is None else x.reshape(-1).contiguous() for x in (per_row, select))
        flat_tokens = tokens.reshape(-1).contiguous().long()
        results = kept_token_logprobs(rows, flat_tokens, kept, scalar, *per_token, floor)
        return TokenLogprobs(*(result.reshape(shape) for result in results))
    lead = rows.shape[:2]
    run = reference.token_logprobs if floor == "reference" else _ops.handle("token_logprobs", floor)
    results = run(
        rows,
        tokens.reshape(lead).contiguous().long(),
        scalar,
        None if per_row is None else per_row.reshape(lead).contiguous(),
        None if select is None else select.reshape(lead).contiguous(),
        inplace_backward,
    )
    return TokenLogprobs(*(result.reshape(shape) for result in results[:3]))


def as_rows(logits: Tensor) -> Tensor:
    """View of ``[..., V]`` as ``[outer, inner, V]``; a copy only if more than two leading axes
    cannot be merged.
    """
    if logits.dim() == 3:
        return logits
    if logits.dim() < 3:
        return logits.reshape(1, -1, logits.shape[-1])
    return logits.flatten(0, -3)


def _fake_forward(logits: Tensor, tokens: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[:2]
    one = [logits.new_empty(rows, dtype=dtype) for _ in range(3)]
    return (*one, logits.new_empty((2, *rows), dtype=dtype))


def _fake_backward(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, tokens, temperature, row_temperature, mask, inplace = inputs
    _, entropy, _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(logits, tokens, row_temperature, mask, entropy, stats)
    ctx.temperature, ctx.inplace = temperature, inplace


def _register(floor: str) -> None:
    forward, backward, inplace = (
        f"{_ops.NAMESPACE}::{_ops.op_name(word, floor)}"
        for word in ("token_logprobs", "token_logprobs_backward", "token_logprobs_backward_inplace")
    )

    @once_differentiable
    def gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, tokens, row_temperature, mask, entropy, stats = ctx.saved_tensors
        upstream = (
            grad.contiguous() for grad in grads[:3]
        )  # a sum's gradient is an expanded scalar
        args = (tokens, ctx.temperature, row_temperature, mask, entropy, stats, *upstream)
        if not ctx.inplace:
            grad = _ops.handle("token_logprobs_backward", floor)(logits, *args)
        else:
            grad = logits.detach()
            _ops.handle("token_logprobs_backward_inplace", floor)(grad, *args)
            torch.autograd.graph.increment_version(
                grad
            )  # a later use of the logits is an error, not nonsense
        return grad, None, None, None, None, None

    torch.library.register_fake(forward, _fake_forward, lib=_ops.LIBRARY)
    torch.library.register_fake(backward, _fake_backward, lib=_ops.LIBRARY)
    torch.library.register_fake(inplace, lambda *args: None, lib=_ops.LIBRARY)
    _ops.register_autograd(forward, gradient, _save)


_ops.for_every_floor(_register)
