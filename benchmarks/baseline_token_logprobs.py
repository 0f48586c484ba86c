"""What people run today instead of token_logprobs: eager PyTorch, and TRL."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import outside_the_source_tree

Score = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # logits [rows, V], tokens [rows]


def eager(logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    logprobs = F.log_softmax(logits.float(), dim=-1)
    return (logprobs.gather(-1, tokens[:, None])[:, 0],)


def eager_with_entropy(logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    logprobs = F.log_softmax(logits.float(), dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, tokens[:, None])[:, 0], entropy


def trl(entropy: bool) -> Score:
    """TRL's functions."""
    with outside_the_source_tree():
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def score(logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        logprobs = selective_log_softmax(logits, tokens)
        return (logprobs, entropy_from_logits(logits)) if entropy else (logprobs,)

    return score
