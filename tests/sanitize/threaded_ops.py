"""Every threaded operator on two threads, and from two Python threads. Run under TSan."""

from concurrent.futures import ThreadPoolExecutor

import torch

from pyllmtune import (
    KeptTokens,
    PolicyLossConfig,
    beam_step,
    filter_logits,
    gae,
    kl_divergence,
    linear_token_logprobs,
    policy_loss,
    sample,
    temperature_softmax,
    token_logprobs,
)


def work(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 70_000, generator=generator).requires_grad_()
    out = token_logprobs(logits, torch.tensor([0, 1, 2, 3, 69_999]), backend="cpp")
    (out.logprobs.sum() + out.entropy.sum()).backward()
    for rows in (2, 16):  # cut into stripes; done whole
        part = torch.randn(rows, 40_000, generator=generator).requires_grad_()
        temperature = torch.ones(rows, requires_grad=True)
        temperature_softmax(part, temperature, log=True, backend="cpp").sum().backward()
        rows = part.detach().requires_grad_(), torch.randn(rows, 40_000, generator=generator)
        (kl_divergence(*rows) + kl_divergence(*rows, js_weight=0.5)).sum().backward()
    z = logits.detach()
    for filters in ({"top_k": 20}, {"top_p": 0.9}, {"top_k": 5000}, {}):
        sample(z, **filters, return_stats=True, return_kept=True, backend="cpp")
        sample(z[:1], **filters, logprobs="raw", backend="cpp")  # one row on all threads
    for beams in (5, 1):
        beam_step(z, z[:, 0], num_beams=beams, backend="cpp")
    filter_logits(z, top_p=0.9, backend="cpp")
    kept = sample(z, top_k=9000, return_kept=True, backend="cpp").kept
    out = token_logprobs(logits, kept.token_ids[kept.offsets[:-1]].long(), kept=kept, backend="cpp")
    out.logprobs.sum().backward()
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = (torch.randn(n, 70, generator=generator).to(dtype) for n in (900, 2500))
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        tokens = torch.arange(900)
        linear_token_logprobs(hidden, weight, tokens, backend="cpp").entropy.sum().backward()
        kept = KeptTokens.from_mask(torch.rand(900, 2500, generator=generator) < 0.01)
        out = linear_token_logprobs(hidden, weight, tokens, kept=kept, backend="cpp")
        out.entropy.sum().backward()
    old = torch.randn(6, 3000, generator=generator)
    logprobs = old.clone().requires_grad_()
    config = PolicyLossConfig(level="sequence", aggregation="seq-mean-token-mean")
    policy_loss(logprobs, old, torch.ones(6), config=config, backend="cpp").loss.backward()
    gae(old, old, gamma=0.99, backend="cpp")


if __name__ == "__main__":
    torch.set_num_threads(2)
    work(0)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(4)))
    print("finished")
