"""kept_logits, the specification: hidden states and rows of the weight side by side, by entry.

Arguments are those of the operator (``pyllmtune/_ops.py``). Operands are widened before they are
multiplied: products of bfloat16 are exact in float32, so nothing but a sum is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kept_logits(
    hidden: Tensor, weight: Tensor, offsets: Tensor, token_ids: Tensor, mask: Tensor | None
) -> Tensor:
    """Logit of each kept token, ``[entries]``; 0 in a masked row."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if mask is not None:  # a dead row's NaN reaches neither value nor gradient
        hidden = torch.where(mask[:, None], hidden, 0)
    rows = torch.arange(hidden.shape[0], device=hidden.device).repeat_interleave(offsets.diff())
    left = hidden.to(dtype)[rows]  # [entries, D]  read D, write D
    # widened first, so that the gradient of a row that occurs twice is added in float32
    right = weight.to(dtype)[token_ids.long()]  # [entries, D]  read D, write D
    return (left * right).sum(-1)  # [entries]  read 3D, write D
