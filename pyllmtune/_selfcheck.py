"""``python -m pyllmtune check``: every op on every backend present, values and gradients against
float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyllmtune import (
    KeptTokens,
    _backend,
    beam_step,
    filter_logits,
    gae,
    kl_divergence,
    linear_policy_loss,
    linear_token_logprobs,
    policy_loss,
    sample,
    temperature_softmax,
    token_logprobs,
)
from pyllmtune.losses.config import PolicyLossConfig

TOLERANCE = 2e-5  # of the largest value; float32 arithmetic over a few thousand terms


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _error(got: list[Tensor], want: list[Tensor]) -> float:
    return max(
        float((a.cpu().double() - b).abs().max() / b.abs().max().clamp(min=1e-3))
        for a, b in zip(got, want, strict=True)
    )


def _softmax(backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 3001, generator=generator) * 3).to(device, dtype).requires_grad_()
    temperature = torch.linspace(0, 2, 7).to(device, dtype).requires_grad_()
    out = temperature_softmax(logits, temperature, backend=backend)
    log = temperature_softmax(logits, 0.8, log=True, backend=backend)
    (out.square().sum() + log.square().mean()).backward()
    return [out.detach(), log.detach(), logits.grad, temperature.grad]


def _score(backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 3001, generator=generator) * 3).to(device, dtype).requires_grad_()
    tokens = torch.randint(0, 3001, (7,), generator=generator).to(device)
    out = token_logprobs(logits, tokens, temperature=0.8, backend=backend)
    sum(value.square().sum() for value in out).backward()
    return [*(value.detach() for value in out), logits.grad]


def _divergence(backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, noise = (torch.randn(7, 3001, generator=generator) for _ in range(2))
    rows = [x.to(device, dtype).requires_grad_() for x in (3 * logits, 3 * logits + noise)]
    out = kl_divergence(*rows, temperature=0.8, backend=backend)
    js = kl_divergence(*rows, js_weight=0.3, backend=backend)
    (out.sum() + js.square().sum()).backward()
    return [out.detach(), js.detach(), *(x.grad for x in rows)]


def _kept(backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 3001, generator=generator) * 3).to(device, dtype).requires_grad_()
    kept = KeptTokens.from_mask(torch.rand(7, 3001, generator=generator).to(device) < 0.1)
    tokens = kept.token_ids[kept.offsets[:-1]].long()
    out = token_logprobs(logits, tokens, temperature=0.8, kept=kept, backend=backend)
    sum(value.square().sum() for value in out).backward()
    return [*(value.detach() for value in out), logits.grad]


def _head(backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 65, generator=generator) for rows in (7, 3001))
    hidden = hidden.to(device, dtype).requires_grad_()
    weight = (weight / 3).to(device, dtype).requires_grad_()
    tokens = torch.randint(0, 3001, (7,), generator=generator).to(device)
    options = {"temperature": 0.8, "softcap": 20.0, "mask": tokens % 4 > 0}
    out = linear_token_logprobs(hidden, weight, tokens, backend=backend, **options)
    sum(value.square().sum() for value in out).backward()
    return [*(value.detach() for value in out), hidden.grad, weight.grad]


def _head_and_loss(backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*size, 65, generator=generator) for size in ((3, 5), (3001,)))
    hidden = hidden.to(device, dtype).requires_grad_()
    weight = (weight / 3).to(device, dtype).requires_grad_()
    tokens = torch.randint(0, 3001, (3, 5), generator=generator).to(device)
    old, advantages = -9 + torch.randn(3, 5, generator=generator), torch.tensor([1.0, -1.0, 0.5])
    out = linear_policy_loss(
        *(hidden, weight, tokens, old.to(device), advantages.to(device)),
        config=PolicyLossConfig(rule="unclipped", log_ratio_limit=3.0, entropy_coef=0.1),
        backend=backend,
    )
    out.loss.backward()
    return [out.loss.detach(), hidden.grad, weight.grad]


def _kept_head(backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 65, generator=generator) for rows in (7, 3001))
    hidden = hidden.to(device, dtype).requires_grad_()
    weight = (weight / 3).to(device, dtype).requires_grad_()
    kept = KeptTokens.from_mask(torch.rand(7, 3001, generator=generator).to(device) < 0.01)
    tokens = kept.token_ids[kept.offsets[:-1]].long()
    out = linear_token_logprobs(hidden, weight, tokens, kept=kept, backend=backend)
    sum(value.square().sum() for value in out).backward()
    return [*(value.detach() for value in out), hidden.grad, weight.grad]


def _decode(backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Kept logits, tokens, log-probs and ranks; tokens are the same on every floor or it fails."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 3001, generator=generator) * 3).to(device)  # float32 on every floor
    seeds = torch.arange(7, device=device)
    filters = {"temperature": 0.8, "top_k": 300, "top_p": 0.95, "min_p": 1e-3}
    kept = filter_logits(logits, **filters, backend=backend)
    out = sample(
        *(logits,), **filters, seed=seeds, logprobs="processed", return_stats=True, backend=backend
    )
    kept = torch.where(kept == -torch.inf, 0.0, kept)
    return [kept, out.tokens, out.logprobs, out.rank, out.num_kept, out.entropy]


def _beam(backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Beams agree, so that groups take from one another; tokens are the same or it fails."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 9001, generator=generator) * 3
    logits = logits + 0.1 * torch.randn(2, 4, 9001, generator=generator)
    scores = torch.randn(2, 4, generator=generator)
    options = {"num_beams": 4, "eos_token_id": 7, "temperature": 0.8, "backend": backend}
    logits, scores = logits.to(device, dtype), scores.to(device)
    plain = beam_step(logits, scores, **options)
    groups = beam_step(logits, scores, num_groups=2, diversity_penalty=0.7, **options)
    return [*plain[:3], *groups[:3]]


def _policy(backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    logprobs, noise, ref = (torch.randn(5, 301, generator=generator) for _ in range(3))
    logprobs = logprobs.to(device, dtype).requires_grad_()
    config = PolicyLossConfig(
        level="sequence", kl="k3", kl_coef=0.1, aggregation="seq-mean-token-mean"
    )
    out = policy_loss(
        logprobs,
        logprobs.detach() + 0.3 * noise.to(device, dtype),
        torch.randn(5, generator=generator).to(device, dtype),
        ref_logprobs=logprobs.detach() + 0.2 * ref.to(device, dtype),
        config=config,
        backend=backend,
    )
    out.loss.backward()
    return [out.loss.detach(), out.metrics.vector, logprobs.grad]


def _gae(backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(5, 301, generator=generator) for _ in range(2))
    mask, ends = (torch.rand(5, 301, generator=generator) > bar for bar in (0.2, 0.99))
    out = gae(
        rewards.to(device, dtype),
        values.to(device, dtype),
        mask.to(device),
        gamma=0.99,
        bootstrap=values[:, 0].to(device, dtype),
        terminated=ends.to(device),
        backend=backend,
    )
    return list(out)


CHECKS = {
    "temperature_softmax": _softmax,
    "token_logprobs": _score,
    "kl_divergence": _divergence,
    "kept_token_logprobs": _kept,
    "linear_token_logprobs": _head,
    "linear_policy_loss": _head_and_loss,
    "kept_logits": _kept_head,
    "sample": _decode,
    "beam_step": _beam,
    "policy_loss": _policy,
    "gae": _gae,
}


def run() -> bool:
    """Print one line per op, backend and device; True if every present one agrees with the
    reference.
    """
    good = True
    for word, check in CHECKS.items():
        want = [value.double() for value in check("reference", "cpu", torch.float64)]
        for device in _devices():
            for backend in _backend.BACKENDS[1:]:
                reason = _backend.why_not(backend, device)
                if reason is not None:
                    print(f"{word:<22}{backend:<11}{device:<6}skipped: {reason}")
                    continue
                error = _error(check(backend, device, torch.float32), want)
                passed = error <= TOLERANCE
                good &= passed
                verdict = "ok" if passed else "WRONG"
                print(f"{word:<22}{backend:<11}{device:<6}{verdict}  error {error:.1e}")
    return good
