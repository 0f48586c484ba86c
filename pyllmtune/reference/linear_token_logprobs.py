"""linear_token_logprobs, the specification: the logits as a tensor, then ``token_logprobs``.

Arguments are those of the operator (``pyllmtune/_ops.py``). Operands are widened before they are
multiplied: products of bfloat16 are exact in float32, so nothing but a sum is rounded. Holds
``[N, V]`` several times over, which is what every other floor is there to avoid.
"""

from __future__ import annotations

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
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of ``tokens``, entropy and logsumexp of ``softmax(logits / T)``, each ``[N]``."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if mask is not None:  # a dead row's NaN reaches neither value nor gradient
        hidden = torch.where(mask[:, None], hidden, 0)
    logits = hidden.to(dtype) @ weight.to(dtype).T  # [N, V]  2 N D V operations, write N V
    if bias is not None:
        logits = logits + bias  # [N, V]
    logits = logits * logit_scale  # [N, V]
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)  # [N, V]
    rows = (logits[None], tokens[None], temperature)
    lead = [None if value is None else value[None] for value in (row_temperature, mask)]
    return tuple(result[0] for result in token_logprobs(*rows, *lead))
