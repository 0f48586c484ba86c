"""sample, the specification: filter, then invert the cumulative integer masses at one uniform a
draw.

Arguments and results are those of the operator (``pyllmtune/_ops.py``). Eager torch sorts the
vocabulary; the fused kernels do not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyllmtune.reference import masses
from pyllmtune.reference.row_filter import filter_rows, of_rows


def unpack_bits(words: Tensor, vocab: int) -> Tensor:
    """int32 words ``[..., ceil(V / 32)]``, lowest bit first, as bool ``[..., V]``."""
    bits = (words[..., None] >> torch.arange(32, device=words.device)) & 1  # [..., words, 32]
    return bits.flatten(-2)[..., :vocab].bool()


def _log_total(mass: Tensor, bits: int) -> Tensor:
    """Log of sums of masses, relative to the largest: float64 ``[rows, 1]``."""
    return mass.sum(-1, keepdim=True).double().log() - bits * math.log(2)


def sample(
    logits: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    top_k: int,
    row_top_k: Tensor | None,
    top_p: float,
    row_top_p: Tensor | None,
    min_p: float,
    row_min_p: Tensor | None,
    order: int,
    allowed: Tensor | None,
    row_indices: Tensor | None,
    num_samples: int,
    seed: int,
    row_seed: Tensor | None,
    position: int,
    row_position: Tensor | None,
    logprobs: bool,
    return_stats: bool,
    totals: bool,
    return_kept: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw ``num_samples`` tokens from each row ``[R]``."""
    rows = logits.reshape(-1, logits.shape[-1])  # [rows, V]
    if row_indices is not None:
        rows = rows[row_indices]  # [R, V]
    vocab = rows.shape[-1]
    bits = masses.mass_bits(vocab)
    if allowed is not None:
        mask = allowed if allowed.dtype == torch.bool else unpack_bits(allowed, vocab)
        rows = torch.where(mask, rows, -math.inf)  # [R, V]
    filters = (temperature, row_temperature, top_k, row_top_k, top_p, row_top_p)
    found = filter_rows(rows, *filters, min_p, row_min_p, order)
    valid, one = found.valid[:, None], found.kept & found.greedy[:, None]

    mass = torch.where(one, 1, torch.where(found.kept, found.mass, 0))  # [R, V]
    cumulative = mass.cumsum(-1)  # [R, V] in id order
    seeds = of_rows(seed, row_seed, rows, torch.int64)[:, None].expand(-1, num_samples)
    positions = of_rows(position, row_position, rows, torch.int64)[:, None].expand_as(seeds)
    sample_index = torch.arange(num_samples, device=rows.device).expand_as(seeds)
    target = masses.multiply_high(
        masses.uniform(seeds, positions, sample_index), cumulative[:, -1:]
    )  # [R, S] in [0, kept mass)
    tokens = torch.searchsorted(cumulative, target, right=True)  # [R, S]
    tokens = torch.where(valid, tokens.clamp(max=vocab - 1), 0)

    empty = rows.new_empty(0, dtype=torch.float32)
    scores = rank = kept_mass = entropy = empty
    z = found.z.double()
    z = z - z.amax(-1, keepdim=True)  # [R, V]
    scaled_z = torch.where(found.greedy[:, None], 0.0, z / found.temperature[:, None])
    at = scaled_z.gather(-1, tokens)  # [R, S] of the tokens drawn
    total = torch.where(found.greedy[:, None], found.kept.long(), found.mass)  # [R, V]
    relative = torch.where(found.greedy, 0, bits)[:, None] * math.log(2)  # greedy: one mass of 1
    log_total = total.sum(-1, keepdim=True).double().log() - relative  # [R, 1]
    log_kept = mass.sum(-1, keepdim=True).double().log() - relative
    if logprobs:
        plain = masses.masses(masses.exponents(found.z, torch.ones_like(found.temperature)), bits)
        raw = z.gather(-1, tokens) - _log_total(plain, bits)
        scores = torch.stack([raw, at - log_total, at - log_kept])  # [3, R, S]
        scores = torch.where(valid, scores, math.nan).float()
    if return_stats:
        rank = torch.where(valid, found.ahead.gather(-1, tokens) + 1, 0)
        kept_mass = torch.where(found.valid, (log_kept - log_total).exp()[:, 0], math.nan).float()
        share = mass / mass.sum(-1, keepdim=True).clamp(min=1)  # [R, V]
        surprise = torch.where(mass > 0, log_kept - scaled_z, 0.0)
        entropy = torch.where(found.valid, (share * surprise).sum(-1), math.nan).float()
    kept_ids = found.kept.nonzero()[:, 1].int() if return_kept else rows.new_empty(0, dtype=int)
    num_kept = found.kept.sum(-1)
    return (
        torch.where(valid, tokens, -1),
        found.valid,
        scores,
        rank.long(),
        num_kept,
        kept_mass,
        entropy,
        kept_ids.int(),
    )
