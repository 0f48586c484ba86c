"""Each trainer's policy loss in eager torch, as that trainer writes it: what the presets are tested
against. Written from the published formulas, apart from the library; nothing is shared with it.

A function takes log-probs, old log-probs, advantages ``[B]``, a float mask and the reference
log-probs, all ``[B, T]`` float64, and returns the loss of one process without accumulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Formula = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def mean_of_means(loss: Tensor, m: Tensor) -> Tensor:
    return ((loss * m).sum(-1) / m.sum(-1).clamp(min=1)).mean()


def token_mean(loss: Tensor, m: Tensor) -> Tensor:
    return (loss * m).sum() / m.sum()


def verl_mean_of_means(loss: Tensor, m: Tensor) -> Tensor:
    n = m.sum(-1)
    some = n > 0
    return (((loss * m).sum(-1) / (n + 1e-8)) * some).sum() / some.sum()


def clipped(w: Tensor, A: Tensor, low: float, high: float) -> Tensor:
    return -torch.min(w * A, w.clamp(1 - low, 1 + high) * A)


def k3(lp: Tensor, ref: Tensor) -> Tensor:
    return (ref - lp).exp() - (ref - lp) - 1


def lecture(lp, old, A, m, ref):
    ratio = ((lp - old) * m).sum(-1).exp()
    return -(ratio * A).mean()


def trl_ppo(reduce, eps=(0.2, 0.2), level="token"):
    def loss(lp, old, A, m, ref):
        s = lp - old
        if level == "sequence":
            s = ((s * m).sum(-1) / m.sum(-1).clamp(min=1))[:, None]
        return reduce(clipped(s.exp(), A[:, None], *eps) * torch.ones_like(m), m)

    return loss


def trl_cispo(lp, old, A, m, ref):
    return token_mean(-(lp - old).exp().clamp(max=5.0).detach() * A[:, None] * lp, m)


def sapo(reduce, clamp):
    def loss(lp, old, A, m, ref):
        w = (lp - old).clamp(-clamp, clamp).exp()
        tau = torch.full_like(A, 1.05).masked_fill(A > 0, 1.0)[:, None]
        return reduce(-(4 / tau) * torch.sigmoid(tau * (w - 1)) * A[:, None], m)

    return loss


def trl_vespo(lp, old, A, m, ref):
    log_w = ((lp - old).clamp(-20, 20) * m).sum(-1).clamp(math.log(1e-8), 20)
    k, rate = torch.where(A >= 0, 2.0, 3.0).double(), torch.where(A >= 0, 3.0, 2.0).double()
    phi = (rate + k * log_w - rate * log_w.exp()).exp().detach()
    return token_mean(-(phi * A)[:, None] * lp, m)


def trl_rloo(lp, old, A, m, ref):
    return clipped(((lp - old) * m).sum(-1).exp(), A, 0.2, 0.2).mean()


def verl_vanilla(lp, old, A, m, ref):
    A = A[:, None]
    w = (lp - old).clamp(-20, 20).exp()
    bounded = torch.max(-A * w, -A * w.clamp(0.8, 1.2))
    return token_mean(torch.where(A < 0, torch.min(-3 * A, bounded), bounded), m)


def verl_gspo(lp, old, A, m, ref):
    mean = (((lp - old) * m).sum(-1) / m.sum(-1).clamp(min=1))[:, None]
    w = (lp - lp.detach() + mean.detach()).clamp(max=10.0).exp()
    return verl_mean_of_means(clipped(w, A[:, None], 3e-4, 4e-4), m)


def both_bounds_cispo(reduce, clamp=math.inf):
    def loss(lp, old, A, m, ref):
        w = (lp - old).clamp(-clamp, clamp).exp().clamp(0.8, 1.2).detach()
        return reduce(-w * A[:, None] * lp, m)

    return loss


def verl_gmpo(lp, old, A, m, ref):
    sign, r = A.sign()[:, None], lp - old
    bounded = sign * torch.min(sign * r, sign * r.clamp(-0.4, 0.4))
    n = m.sum(-1) + 1e-8
    return (-(A[:, None] * m).sum(-1) / n * ((bounded * m).sum(-1) / n).exp()).mean()


def verl_dppo(kind):
    def loss(lp, old, A, m, ref):
        A = A[:, None]
        w = (lp - old).clamp(-20, 20).exp().clamp(max=20.0).detach()
        p, q = lp.detach().exp(), old.exp()
        if kind == "tv":
            keep = torch.where(A > 0, p - q <= 0.2, p - q >= -0.2)
        else:
            kl = q * (old - lp.detach()) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
            keep = torch.where(A > 0, (kl <= 0.2) | (p <= q), (kl <= 0.2) | (p >= q))
        return token_mean(-A * w * lp * keep, m)

    return loss


def verl_gpg(lp, old, A, m, ref):
    return token_mean(-A[:, None] * lp, m)


def nemo(policy):
    def loss(lp, old, A, m, ref):
        d = (ref - lp).clamp(-20, 20)
        score = (lp - lp.detach()).exp()
        kl = score * (d.exp() - d - 1).clamp(-10, 10)
        return policy(lp, old, A, m, ref) + 0.01 * token_mean(kl, m)

    return loss


def openrlhf_ppo(lp, old, A, m, ref):
    return token_mean(clipped((lp - old).clamp(-20, 20).exp(), A[:, None], 0.2, 0.2), m)


def open_instruct_cispo(lp, old, A, m, ref):
    return token_mean(-(lp - old).exp().clamp(max=1.2).detach() * A[:, None] * lp, m)


def torchrl_cispo(lp, old, A, m, ref):
    return token_mean(-(lp - old).exp().clamp(0.8, 1.2) * A[:, None], m)


def luspo(lp, old, A, m, ref):
    n = m.sum(-1)
    w = (((lp - old) * m).sum(-1) / n.clamp(min=1)).exp()
    return (clipped(w, A, 0.2, 0.2) * n).mean()


def liger_luspo(lp, old, A, m, ref):
    n = m.sum(-1)
    w = (((lp - old) * m).sum(-1) / n.clamp(min=1)).exp()
    return (n**2 * clipped(w, A, 0.2, 0.2)).sum() / m.numel()


def prime_rl(lp, old, A, m, ref):
    """Old and reference are the rollout; the loss scale is 1."""
    A, r = A[:, None], lp - old
    moved = lp.detach().exp() - old.exp()
    keep = torch.where(A > 0, moved <= 0.2, moved >= -0.2)
    return ((-(r.exp() * A) * keep + 1e-3 * r**2) * m).sum()


def roll_topr(lp, old, A, m, ref):
    A = A[:, None]
    w = torch.where(A > 0, 1.0, (lp - old).exp().clamp(0, 1).detach())
    return token_mean(-w * A * lp, m)


def sum_over(size):
    return lambda loss, m: (loss * m).sum() / size(m)


ROWS, TOKENS, CELLS = (lambda m: len(m)), (lambda m: m.sum()), (lambda m: m.numel())
FILLED = lambda m: (m.sum(-1) > 0).sum()  # noqa: E731

# name: (formula, what it divides by)
FORMULAS: dict[str, tuple[Formula, Callable[[Tensor], float]]] = {
    "lecture": (lecture, ROWS),
    "trl.grpo": (trl_ppo(mean_of_means), ROWS),
    "trl.bnpo": (trl_ppo(token_mean), TOKENS),
    "trl.dr_grpo": (trl_ppo(sum_over(CELLS)), CELLS),
    "trl.dapo": (trl_ppo(token_mean), TOKENS),
    "trl.cispo": (trl_cispo, TOKENS),
    "trl.sapo": (sapo(mean_of_means, math.inf), ROWS),
    "trl.luspo": (luspo, ROWS),
    "trl.vespo": (trl_vespo, TOKENS),
    "trl.gspo": (trl_ppo(mean_of_means, (3e-4, 4e-4), "sequence"), ROWS),
    "trl.rloo": (trl_rloo, ROWS),
    "verl.vanilla": (verl_vanilla, TOKENS),
    "verl.gspo": (verl_gspo, FILLED),
    "verl.cispo": (both_bounds_cispo(token_mean, 20.0), TOKENS),
    "verl.gmpo": (verl_gmpo, ROWS),
    "verl.sapo": (sapo(verl_mean_of_means, 20.0), FILLED),
    "verl.dppo_tv": (verl_dppo("tv"), TOKENS),
    "verl.dppo_kl": (verl_dppo("kl"), TOKENS),
    "verl.gpg": (verl_gpg, TOKENS),
    "nemo.grpo": (nemo(trl_ppo(token_mean)), TOKENS),
    "nemo.cispo": (nemo(both_bounds_cispo(token_mean)), TOKENS),
    "openrlhf.ppo": (openrlhf_ppo, TOKENS),
    "openrlhf.gspo": (trl_ppo(mean_of_means, level="sequence"), ROWS),
    "slime.cispo": (both_bounds_cispo(mean_of_means), ROWS),
    "open_instruct.cispo": (open_instruct_cispo, TOKENS),
    "torchrl.cispo": (torchrl_cispo, TOKENS),
    "liger.luspo": (liger_luspo, CELLS),
    "prime_rl.default": (prime_rl, lambda m: 1.0),
    "roll.topr": (roll_topr, TOKENS),
}


def verl_clip_cov(lp, old, A, m, drawn: Tensor):
    """``drawn``: the tokens that were picked at random among the candidates."""
    A, w = A[:, None], (lp - old).exp()
    return token_mean(torch.max(-A * w, -A * w.clamp(0.8, 1.2)) * (~drawn), m)


def covariance(lp, A, m):
    """Over the selected tokens, in their order: ``[n]``."""
    select = m > 0
    values, advantages = lp.detach()[select], A[:, None].expand_as(lp)[select]
    return (advantages - advantages.mean()) * (values - values.mean())


def verl_kl_cov(lp, old, A, m, fraction: float):
    select, r = m > 0, lp - old
    loss = -A[:, None] * r.exp()
    cov = covariance(lp, A, m)
    largest = torch.topk(cov, max(1, int(len(cov) * fraction))).indices
    penalised = torch.zeros(len(cov), dtype=torch.bool)
    penalised[largest] = True
    where = torch.zeros_like(select)
    where[select] = penalised
    return token_mean(loss + torch.where(where, r.abs(), 0), m)
