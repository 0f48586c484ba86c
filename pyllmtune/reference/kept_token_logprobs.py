"""kept_token_logprobs, the specification: token_logprobs of the kept tokens, side by side.

Arguments are those of the operator (``pyllmtune/_ops.py``). K is the largest number of kept tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyllmtune.reference.token_logprobs import token_logprobs


def kept_token_logprobs(
    logits: Tensor,
    offsets: Tensor,
    token_ids: Tensor,
    tokens: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of ``tokens``, entropy and logsumexp over the kept tokens of a row, ``[rows]``."""
    rows, entries = tokens.shape[0], token_ids.shape[0]
    counts = offsets.diff()  # [rows]
    row = torch.arange(rows, device=logits.device).repeat_interleave(counts)  # [entries]
    place = torch.arange(entries, device=logits.device) - offsets[row]  # [entries]
    if logits.dim() == 3:
        inner = max(logits.shape[1], 1)
        logits = logits[row // inner, row % inner, token_ids.long()]  # [entries]  read, write

    most = int(counts.max()) if rows else 0
    # one column more than K, always -inf: the target of a row whose token is not in its set
    z = logits.new_full((rows, most + 1), -math.inf)  # [rows, K + 1]  write K
    z = z.index_put((row, place), logits)  # [rows, K + 1]  read 2K, write K
    ids = token_ids.new_full((rows, most + 1), -1)
    ids[row, place] = token_ids
    hit = ids == tokens[:, None]  # [rows, K + 1]
    target = torch.where(hit.any(-1), hit.int().argmax(-1), most)  # [rows]
    scores = token_logprobs(
        z[None],
        target[None],
        temperature,
        None if row_temperature is None else row_temperature[None],
        None if mask is None else mask[None],
    )
    return tuple(score[0] for score in scores)
