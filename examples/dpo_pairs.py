"""DPO on preference pairs: a tiny model learns to prefer sorted answers, from pairs alone.

    python examples/dpo_pairs.py            # about a minute on one core
    python examples/dpo_pairs.py --smoke    # seconds

A prompt is six digits, an answer six more. Of each pair the better answer is the sorted prompt, the
worse one the same with two digits exchanged. No reward is computed and nothing is sampled: the loss
needs the log-probs of both answers under the policy and under the frozen start. At the end the
policy's choice among unseen pairs is counted, and TRL's names of other losses can be tried with
--loss-type.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyllmtune

DIGITS, LENGTH, WIDTH = 10, 6, 64
SEPARATOR = DIGITS


class TinyModel(nn.Module):
    """Tokens ``[B, T]`` to logits ``[B, T, V]``: two causal attention layers."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(DIGITS + 1, WIDTH)
        self.positions = nn.Embedding(2 * LENGTH + 1, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, DIGITS + 1)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.tokens(tokens) + self.positions(torch.arange(length))
        return self.head(self.layers(x, mask=mask, is_causal=True))


def pairs(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``(chosen, rejected)``, ``[number, 2 LENGTH + 1]`` each: prompt, separator, answer."""
    digits = torch.rand(number, DIGITS, generator=generator).argsort(1)  # different digits
    prompt = digits[:, :LENGTH]
    answer = prompt.sort(1).values
    swapped = answer.clone()
    first = torch.randint(LENGTH - 1, (number,), generator=generator)
    rows = torch.arange(number)
    swapped[rows, first], swapped[rows, first + 1] = answer[rows, first + 1], answer[rows, first]
    separator = torch.full((number, 1), SEPARATOR)
    return tuple(torch.cat((prompt, separator, side), dim=1) for side in (answer, swapped))


def answer_logprobs(model: nn.Module, tokens: Tensor) -> Tensor:
    """Log-prob of each answer, ``[B]``: the shifted logits are read in place, prompts masked."""
    logits = model(tokens[:, :-1])
    mask = torch.arange(tokens.shape[1] - 1) >= LENGTH  # the token after the separator, and on
    scored = pyllmtune.token_logprobs(logits, tokens[:, 1:], mask=mask.expand(logits.shape[:2]))
    return scored.logprobs.sum(-1)


def supervise(model: nn.Module, steps: int, generator: torch.Generator) -> None:
    """The start: it answers with the prompt's digits, in any order."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        tokens, _ = pairs(64, generator)
        order = torch.rand(64, LENGTH, generator=generator).argsort(1)
        tokens[:, LENGTH + 1 :] = tokens[:, :LENGTH].gather(1, order)
        logits = model(tokens[:, :-1])[:, LENGTH:]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, LENGTH + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def preferred(model: nn.Module, unseen: tuple[Tensor, Tensor]) -> float:
    """Share of pairs whose better answer is the more probable one."""
    better, worse = (answer_logprobs(model, side) for side in unseen)
    return (better > worse).double().mean().item()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="fewer steps, seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beta", type=float, default=0.3)
    parser.add_argument("--loss-type", default="sigmoid", help="of pyllmtune.dpo_loss")
    options = parser.parse_args(argv)
    supervised, steps = (20, 30) if options.smoke else (150, 150)

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    policy = TinyModel()
    unseen = pairs(512, generator)
    supervise(policy, supervised, generator)
    reference = copy.deepcopy(policy).eval()
    before = preferred(policy, unseen)

    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    began = time.perf_counter()
    for step in range(1, steps + 1):
        both = torch.cat(pairs(64, generator))  # chosen rows, then rejected rows: one forward
        chosen, rejected = answer_logprobs(policy, both).chunk(2)
        with torch.no_grad():
            ref_chosen, ref_rejected = answer_logprobs(reference, both).chunk(2)
        loss = pyllmtune.dpo_loss(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            beta=options.beta,
            loss_type=options.loss_type,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % (steps // 3) == 0:
            margin = options.beta * ((chosen - ref_chosen) - (rejected - ref_rejected)).mean()
            print(f"step {step:4}  loss {loss.item():.4f}  reward margin {margin.item():+.3f}")
    after = preferred(policy, unseen)
    print(f"{steps} steps in {time.perf_counter() - began:.1f} s")
    print(
        f"the better answer of an unseen pair is preferred: {before:.1%} before, {after:.1%} after"
    )
    return 0 if after > before else 1


if __name__ == "__main__":
    raise SystemExit(main())
