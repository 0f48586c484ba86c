"""DPO in eager PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pyllmtune.demo import eager
from pyllmtune.demo.dpo import BETA
from pyllmtune.demo.losses import Batch, Library, Loss, Objective, Sampled
from pyllmtune.demo.rollout import Outputs


def credit(sampled: Sampled, objective: Objective) -> Batch:
    """All pairs of a group whose rewards differ."""
    rewards, size = sampled.reward.tolist(), sampled.group_size
    rows = range(len(rewards))
    pairs = [
        (i, j)
        for i in rows
        for j in range(i // size * size, i // size * size + size)
        if rewards[i] > rewards[j]
    ]
    better, worse = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    return Batch(*sampled[:5], pairs=(better, worse))


def loss(outputs: Outputs, batch: Batch, objective: Objective) -> Loss:
    """``-log sigmoid`` of beta times the difference of two log-ratios, mean over the pairs."""
    logprobs_all = F.log_softmax(outputs.logits, dim=-1)  # [B, T, V]
    logprobs = logprobs_all.gather(-1, batch.tokens[..., None])[..., 0] * batch.mask
    entropy = -(logprobs_all.exp() * logprobs_all).sum(-1) * batch.mask
    better, worse = batch.pairs
    gain = (logprobs - batch.ref_logprobs).sum(1)  # [B]
    margin = gain[better] - gain[worse]
    value = -F.logsigmoid(BETA * margin).sum() / max(len(better), 1)
    ratio, total = (logprobs - batch.ref_logprobs).detach(), batch.mask.sum()
    metrics = {
        "kl": ((ratio.exp() - 1 - ratio).sum() / total).item(),
        "entropy": (entropy.sum() / total).item(),
        "clipped": 0.0,
        "preferred": (margin > 0).double().mean().item(),
    }
    return Loss(value, logprobs.detach(), metrics)


LIBRARY = Library("eager PyTorch", eager.score, credit, loss)
