"""Every threaded operator on two threads, and from two Python threads. Run under TSan."""

from concurrent.futures import ThreadPoolExecutor

import torch

from pyllmtune import PolicyLossConfig, policy_loss, token_logprobs


def work(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 70_000, generator=generator).requires_grad_()
    out = token_logprobs(logits, torch.tensor([0, 1, 2, 3, 69_999]), backend="cpp")
    (out.logprobs.sum() + out.entropy.sum()).backward()
    old = torch.randn(6, 3000, generator=generator)
    logprobs = old.clone().requires_grad_()
    config = PolicyLossConfig(level="sequence", aggregation="seq-mean-token-mean")
    policy_loss(logprobs, old, torch.ones(6), config=config, backend="cpp").loss.backward()


if __name__ == "__main__":
    torch.set_num_threads(2)
    work(0)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(4)))
    print("finished")
