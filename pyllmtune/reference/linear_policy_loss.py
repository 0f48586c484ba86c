"""linear_policy_loss, the specification: the head's log-probs and entropy, then the loss of them.

Arguments are those of the operator (``pyllmtune/_ops.py``). Autograd makes the gradients, so those
that are wanted, and the memory for it, have no say here.
"""

from __future__ import annotations

from torch import Tensor

from pyllmtune.reference.linear_token_logprobs import linear_token_logprobs
from pyllmtune.reference.policy_loss import policy_loss


def linear_policy_loss(
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
    old_logprobs: Tensor,
    advantages: Tensor,
    token_advantages: bool,
    offsets: Tensor,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    normalizer: float,
    device_normalizer: Tensor | None,
    choices: list[int],
    constants: list[float],
    hidden_gradient: bool = True,
    weight_gradient: bool = True,
    bias_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """``(loss, metrics)`` as of ``policy_loss``."""
    logprobs, entropy, _ = linear_token_logprobs(  # [N]  2 N D V operations, write N V
        *(hidden, weight, tokens, bias, temperature, row_temperature, logit_scale, softcap, mask)
    )
    return policy_loss(  # [N] vectors
        *(logprobs, old_logprobs, advantages, token_advantages, offsets, mask, ref_logprobs),
        *(entropy, weights, normalizer, device_normalizer, choices, constants),
    )
