"""beam_step, the specification: log-softmax, add the beams' scores, sort, keep the best.

Arguments and results are those of the operator (``pyllmtune/_ops.py``). Eager torch moves about
16 V elements a beam and sorts the vocabulary; a fused kernel reads V once and sorts nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyllmtune.reference.sample import unpack_bits


def _best(key: Tensor, z: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, beams and ids of the ``count`` best of each item: key, then lower beam, then higher
    logit, then lower id; key, z ``[batch, beams, V]``.
    """
    vocab = key.shape[-1]
    ids = z.argsort(dim=-1, descending=True, stable=True)  # [batch, beams, V]
    ordered = key.gather(-1, ids).flatten(1)  # [batch, beams * V]
    place = ordered.argsort(dim=-1, descending=True, stable=True)[:, :count]
    missing = count - place.shape[1]  # a vocabulary shorter than asked for
    keys = torch.nn.functional.pad(ordered.gather(-1, place), (0, missing), value=-math.inf)
    ids = torch.nn.functional.pad(ids.flatten(1).gather(-1, place), (0, missing))
    return keys, torch.nn.functional.pad(place // vocab, (0, missing)), ids


def beam_step(
    logits: Tensor,
    beam_scores: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    allowed: Tensor | None,
    renormalize: bool,
    widths: Tensor | None,
    eos_token_ids: Tensor | None,
    num_candidates: int,
    num_groups: int,
    diversity_penalty: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The best ``num_candidates`` continuations of each item's beams."""
    batch, beams, vocab = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    device = logits.device
    live = beam_scores != -math.inf  # [batch, beams]
    if widths is not None:
        live = live & (torch.arange(beams, device=device) < widths[:, None])

    whole = torch.where(live[..., None], logits, 0).to(dtype)  # [batch, beams, V]  read V, write V
    z = whole
    if allowed is not None:
        mask = allowed if allowed.dtype == torch.bool else unpack_bits(allowed, vocab)
        z = torch.where(mask.reshape(-1, beams if len(mask) > 1 else 1, vocab), whole, -math.inf)
    if renormalize:
        whole = z
    inverse = 1 / (temperature if row_temperature is None else row_temperature[..., None].to(dtype))
    top = whole.amax(-1, keepdim=True)  # [batch, beams, 1]  read V
    log_sum = ((whole - top) * inverse).exp().sum(-1, keepdim=True).log()  # read 3V, write 3V
    log_p = (z - top) * inverse - log_sum  # [batch, beams, V]  read 2V, write 3V
    score = beam_scores[..., None] + log_p  # [batch, beams, V]  read V, write V

    # a NaN or +inf among the logits makes the logarithm NaN; nothing allowed leaves no maximum
    sound = ~log_sum[..., 0].isnan() & (beam_scores < math.inf) & (z > -math.inf).any(-1)
    valid = ~live | sound  # [batch, beams]
    score = torch.where((live & sound)[..., None], score, -math.inf)

    size, count = beams // num_groups, num_candidates // num_groups
    chosen = score.new_zeros(batch, vocab)  # how often earlier groups took each token
    found = []
    for group in range(num_groups):
        own = slice(group * size, (group + 1) * size)
        key = score[:, own] - diversity_penalty * chosen[:, None]  # [batch, size, V]
        keys, parents, tokens = _best(key, z[:, own], count)
        empty = keys == -math.inf  # [batch, count]
        if widths is not None:
            limit = num_candidates * widths[:, None] // beams
            empty = empty | (torch.arange(count, device=device) >= limit)
        parents = torch.where(empty, 0, parents + own.start)
        at = parents * vocab + tokens
        scores = torch.where(empty, -math.inf, score.flatten(1).gather(-1, at))
        is_eos = torch.zeros_like(empty)
        if eos_token_ids is not None:
            is_eos = (tokens[..., None] == eos_token_ids).any(-1) & ~empty
        goes_on = ~empty & ~is_eos
        goes_on &= goes_on.cumsum(-1) <= size
        chosen.scatter_add_(-1, tokens, goes_on.to(dtype))
        found.append((scores, torch.where(empty, -1, tokens), parents, is_eos))
    return *(torch.cat(parts, -1) for parts in zip(*found, strict=True)), valid
