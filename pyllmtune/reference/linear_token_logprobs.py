"""linear_token_logprobs, the specification: the logits as a tensor, then ``token_logprobs``.

Arguments are those of the operators (``pyllmtune/_ops.py``). Operands are widened before they are
multiplied: products of bfloat16 are exact in float32, so nothing but a sum is rounded. Holds
``[N, V]`` several times over, which is what every other floor is there to avoid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyllmtune.reference.token_logprobs import token_logprobs


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    temperature: float,
    row_temperature: Tensor | None,
    logit_scale: float,
    softcap: float,
    mask: Tensor | None,
    workspace_bytes: int = 0,
    keep_logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of ``tokens``, entropy and logsumexp of ``softmax(logits / T)``, each ``[N]``."""
    logits = _logits(hidden, weight, bias, logit_scale, softcap, mask)
    rows = (logits[None], tokens[None], temperature)
    lead = [None if value is None else value[None] for value in (row_temperature, mask)]
    return tuple(result[0] for result in token_logprobs(*rows, *lead))


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    mask: Tensor | None,
) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if mask is not None:  # a dead row's NaN reaches neither value nor gradient
        hidden = torch.where(mask[:, None], hidden, 0)
    with torch.autocast(hidden.device.type, enabled=False):  # which would round the product
        logits = hidden.to(dtype) @ weight.to(dtype).T  # [N, V]  2 N D V operations, write N V
    if bias is not None:
        logits = logits + bias  # [N, V]
    logits = logits * logit_scale  # [N, V]
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)  # [N, V]
    return logits


def linear_token_logprobs_stats(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    temperature: float,
    row_temperature: Tensor | None,
    logit_scale: float,
    softcap: float,
    mask: Tensor | None,
    workspace_bytes: int = 0,
) -> Tensor:
    """``[4, N]`` of part of a vocabulary: the maximum, S = sum e^d and W = sum e^d d with d = (z -
    max) / T, and the logit of the token, NaN if it is not in this part. 0 where masked.
    """
    z = _logits(hidden, weight, bias, logit_scale, softcap, mask)  # [N, V]
    z = torch.cat((z, z.new_full(tokens.shape, -math.inf)[:, None]), 1)  # V may be 0
    inverse = 1 / (temperature if row_temperature is None else row_temperature)
    top = z.amax(1)  # [N]
    shifted = ((z.T - torch.where(top == -math.inf, 0, top)) * inverse).T  # [N, V]
    masses = shifted.exp()
    weighted = torch.where(masses > 0, masses * shifted, 0).sum(1)
    inside = (tokens >= 0) & (tokens < weight.shape[0])
    target = z.gather(1, torch.where(inside, tokens, weight.shape[0])[:, None])[:, 0]
    target = torch.where(inside, target, math.nan)
    stats = torch.stack((top, masses.sum(1), weighted, target))
    return stats if mask is None else torch.where(mask, stats, 0)


def linear_token_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    temperature: float,
    row_temperature: Tensor | None,
    logit_scale: float,
    softcap: float,
    mask: Tensor | None,
    workspace_bytes: int,
    entropy: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    grad_logsumexp: Tensor,
    hidden_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
    wide_hidden: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the part of a vocabulary in ``weight``, from ``entropy`` and ``stats = (max,
    sum)`` of all of it. Those that are not wanted are empty.
    """
    idle = (grad_logprobs == 0) & (grad_entropy == 0) & (grad_logsumexp == 0)
    live = ~idle if mask is None else ~idle & mask  # [N]
    wide = hidden.dtype if hidden.dtype == torch.float64 or not wide_hidden else torch.float32
    leaves = [hidden.detach().to(wide), weight.detach(), None if bias is None else bias.detach()]
    leaves = [leaf if leaf is None else leaf.requires_grad_() for leaf in leaves]
    with torch.enable_grad():
        logits = _logits(*leaves, logit_scale, softcap, live)  # [N, V]
    inverse = 1 / (temperature if row_temperature is None else row_temperature)
    top, total = stats
    log_p = ((logits.detach().T - top) * inverse - total.log()).T  # [N, V]
    p = log_p.exp()
    constant = (grad_logsumexp - grad_logprobs - grad_entropy * entropy)[:, None]
    gradient = torch.where(p == 0, 0, p * (constant - grad_entropy[:, None] * log_p))  # [N, V]
    column = torch.arange(weight.shape[0], device=weight.device)
    gradient = gradient + torch.where(column == tokens[:, None], grad_logprobs[:, None], 0)
    nothing = (top == -math.inf) & (total == 0)
    gradient = torch.where((live & ~nothing)[:, None], (gradient.T * inverse).T, 0)
    wanted = (hidden_gradient, weight_gradient, bias_gradient)
    asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(logits, asked, gradient) if asked else ())
    empty = hidden.new_empty(0)
    return tuple(next(found) if want else empty for want in wanted)
