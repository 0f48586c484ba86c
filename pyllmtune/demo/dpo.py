"""DPO through pyllmtune: pairs of a group's answers, ranked by reward."""

from __future__ import annotations

import torch

import pyllmtune
from pyllmtune.demo import fused
from pyllmtune.demo.losses import Batch, Library, Loss, Objective, Sampled
from pyllmtune.demo.rollout import Outputs

BETA = 0.3


def credit(sampled: Sampled, objective: Objective) -> Batch:
    """All pairs of a group whose rewards differ."""
    groups = torch.arange(len(sampled.reward)) // sampled.group_size
    return Batch(*sampled[:5], pairs=pyllmtune.preference_pairs(-sampled.reward, groups))


def loss(outputs: Outputs, batch: Batch, objective: Objective) -> Loss:
    """Every answer is scored once, however many pairs it is in."""
    scored = pyllmtune.token_logprobs(outputs.logits, batch.tokens, mask=batch.mask)
    better, worse = batch.pairs
    answers, ref = scored.logprobs.sum(1), batch.ref_logprobs.sum(1)  # [B], padding is 0
    value = pyllmtune.dpo_loss(answers[better], answers[worse], ref[better], ref[worse], beta=BETA)
    logprobs = scored.logprobs.detach()
    ratio, count = logprobs - batch.ref_logprobs, batch.mask.sum()
    gain = (answers - ref).detach()
    metrics = {
        "kl": ((ratio.expm1() - ratio).sum() / count).item(),
        "entropy": (scored.entropy.detach().sum() / count).item(),
        "clipped": 0.0,
        "preferred": (gain[better] > gain[worse]).double().mean().item(),
    }
    return Loss(value, logprobs, metrics)


LIBRARY = Library("pyllmtune", fused.score, credit, loss)
