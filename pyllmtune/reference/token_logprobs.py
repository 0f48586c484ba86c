"""token_logprobs, the specification: what every kernel must return, in eager torch.

Arguments are those of the operator (``pyllmtune/_ops.py``): logits ``[outer, inner, V]``, the rest
``[outer, inner]``. Eager torch moves about 14 V elements a row for what a fused kernel does with
one read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    mask: Tensor | None,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of ``tokens``, entropy and logsumexp of ``softmax(logits / T)``, each ``[outer,
    inner]``.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    vocab = logits.shape[-1]
    live = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask  # [rows]
    inside = (tokens >= 0) & (tokens < vocab)  # [rows]

    # masks select: a dead row is replaced before any arithmetic, so its NaN reaches neither value
    # nor gradient
    z = torch.where(live[..., None], logits, 0).to(dtype)  # [rows, V]  read V, write V
    invalid = z.isnan().any(-1) | (z == math.inf).any(-1) | ~inside  # [rows]  read 2V
    nothing = (z == -math.inf).all(-1)  # [rows]  read V
    spoiled = torch.where(invalid & live, math.nan, 1).to(
        dtype
    )  # NaN for the whole row, in value and gradient
    z = torch.where(nothing[..., None], 0, z) * spoiled[..., None]  # [rows, V]  read V, write V

    top = z.detach().amax(-1, keepdim=True)  # [rows, 1]  read V
    inverse = 1 / (temperature if row_temperature is None else row_temperature[..., None])
    shifted = (z - top) * inverse  # [rows, V]  read V, write V
    log_sum = shifted.exp().sum(-1, keepdim=True).log()  # [rows, 1]  read 2V, write V
    log_p = shifted - log_sum  # [rows, V]  read V, write V
    p = log_p.exp()  # [rows, V]  read V, write V

    index = torch.where(live & inside, tokens, 0).long()  # [rows]
    logprobs = log_p.gather(-1, index[..., None])[..., 0]  # [rows]
    finite_log_p = torch.where(log_p == -math.inf, 0, log_p)  # 0 log 0 = 0
    entropy = -(p * finite_log_p).sum(-1)  # [rows]  read 2V
    logsumexp = (top * inverse + log_sum)[..., 0]  # [rows]

    zero = torch.zeros((), dtype=dtype, device=logits.device)
    nothing = nothing & live & ~invalid
    logprobs = torch.where(nothing, -math.inf, logprobs)
    entropy = torch.where(nothing, zero, entropy)
    logsumexp = torch.where(nothing, -math.inf, logsumexp)
    return tuple(torch.where(live, value, zero) for value in (logprobs, entropy, logsumexp))
