"""What a Hugging Face user runs: the warpers' arithmetic in eager torch, then torch.multinomial.

Written from the documented behaviour of transformers' TemperatureLogitsWarper, TopKLogitsWarper and
TopPLogitsWarper: a full sort for top-p, a topk for top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor


def warp(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits of the kept tokens, -inf elsewhere."""
    if top_k is not None:
        worst = torch.topk(logits, top_k).values[..., -1, None]
        logits = logits.masked_fill(logits < worst, -torch.inf)
    if top_p is not None:
        ascending, ids = torch.sort(logits, descending=False)
        cumulative = ascending.softmax(dim=-1).cumsum(dim=-1)
        removed = cumulative <= 1 - top_p
        removed[..., -1:] = False
        removed = removed.scatter(1, ids, removed)
        logits = logits.masked_fill(removed, -torch.inf)
    return logits


def sample(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """One token a row."""
    probabilities = warp(logits, top_k, top_p).softmax(dim=-1)
    return torch.multinomial(probabilities, num_samples=1)[:, 0]
