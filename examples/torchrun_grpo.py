"""GRPO on several processes: DDP, one loss for the whole batch, metrics reduced once a step.

    python examples/torchrun_grpo.py                                  # starts two processes itself
    torchrun --nproc-per-node 4 examples/torchrun_grpo.py --groups 32
    python examples/torchrun_grpo.py --smoke                          # seconds

A small recurrent network learns to count on from a digit: 7 -> 8 9 0 END. Every process draws and
scores its share of the questions. DDP averages gradients, and answers have different lengths, so a
mean over local tokens would weigh the processes wrongly: the loss is divided by the tokens of all,
over the number of processes. Beside them process 0 trains a copy on the whole batch, alone; at the
end the two must be equal to 1e-6. Seeds belong to answers, so these do not depend on who draws.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time

import torch
from torch import Tensor, distributed, nn
from torch.distributed.run import main as torchrun
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import pyllmtune
from pyllmtune.nn import LogprobHead

END, TOKENS, LONGEST = 10, 11, 5
ANSWERS = 8  # of a question: a group


class Policy(nn.Module):
    """Reads the question and its answer so far; ``forward`` scores, as DDP wants it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, width)
        self.body = nn.GRU(width, width, batch_first=True)
        self.head = LogprobHead(nn.Linear(width, TOKENS))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Log-probs of the answers, ``[B, LONGEST]``; ``tokens`` is ``[B, 1 + LONGEST]``."""
        hidden, _ = self.body(self.embedding(tokens[:, :-1]))
        return self.head(hidden, tokens[:, 1:], mask=mask).logprobs

    @torch.no_grad()
    def answer(self, questions: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens with the question before them, and the mask of the answers up to END."""
        tokens, state = questions[:, None], None
        for position in range(LONGEST):
            hidden, state = self.body(self.embedding(tokens[:, -1:]), state)
            logits = nn.functional.linear(hidden[:, 0], self.head.weight, self.head.bias)
            drawn = pyllmtune.sample(logits, seed=seeds, position=position).tokens
            tokens = torch.cat((tokens, drawn[:, None]), dim=1)
        ended = (tokens[:, 1:] == END).cumsum(1)
        return tokens, (ended == 0) | ((ended == 1) & (tokens[:, 1:] == END))


def rewards_of(tokens: Tensor, mask: Tensor) -> Tensor:
    """Share of right tokens: from a digit d, count on by 2 + d % 3 and END."""
    digit, place = tokens[:, :1], torch.arange(1, LONGEST + 1)
    count = 2 + digit % 3
    right = torch.where(place <= count, (digit + place) % 10, END)
    earned = (tokens[:, 1:] == right) & mask & (place <= count + 1)
    return earned.sum(1) / (count[:, 0] + 1)


def step(
    policy: nn.Module, plain: Policy, optimizer: torch.optim.Optimizer, rows: Tensor, share: int
) -> tuple[Tensor, pyllmtune.PolicyLossMetrics]:
    """One update on ``rows`` ``[B, 2]`` = (question, seed), which are one of ``share`` parts of the
    batch; the rewards, and the metrics of the whole batch.
    """
    tokens, mask = plain.answer(rows[:, 0], rows[:, 1])
    rewards = rewards_of(tokens, mask)
    advantages = pyllmtune.group_advantages(rewards, group_size=ANSWERS)
    logprobs = policy(tokens, mask)
    valid = mask.sum().double()
    if share > 1:
        distributed.all_reduce(valid)
    loss, metrics = pyllmtune.grpo_loss(
        logprobs, logprobs.detach(), advantages, mask, normalizer=valid / share
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return rewards, metrics.all_reduce() if share > 1 else metrics


def train(words: argparse.Namespace) -> int:
    """What every process does; 1 if several processes learn something else than one."""
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(words.seed)
    model = Policy(words.width).double()  # of 1e-6 nothing is left to rounding
    alone = copy.deepcopy(model)
    policy = DistributedDataParallel(model)
    optimizer, optimizer_alone = (
        torch.optim.Adam(x.parameters(), lr=words.lr) for x in (model, alone)
    )
    generator = torch.Generator().manual_seed(words.seed)  # the same batches everywhere
    bar = tqdm(
        range(1, words.steps + 1), unit="step", leave=False, disable=None if not rank else True
    )
    seconds, first = 0.0, None
    for number in bar:
        questions = torch.randint(10, (words.groups,), generator=generator)
        seeds = torch.randint(2**62, (words.groups * ANSWERS,), generator=generator)
        batch = torch.stack((questions.repeat_interleave(ANSWERS), seeds), dim=1)
        begin = time.perf_counter()
        mine = batch.chunk(processes)[rank]
        rewards, metrics = step(policy, model, optimizer, mine, processes)
        seconds += time.perf_counter() - begin
        total = rewards.sum()
        distributed.all_reduce(total)
        if rank != 0:
            continue
        _, expected = step(alone, alone, optimizer_alone, batch, 1)
        first = float(total) / len(batch) if first is None else first
        if number == 1 or number % max(words.steps // 8, 1) == 0:
            got, want = metrics.to_dict(), expected.to_dict()
            line = (
                f"{number:5d}  reward {float(total) / len(batch):.3f}  tokens {got['tokens']:.0f}"
            )
            tqdm.write(f"{line} ({want['tokens']:.0f} alone)  loss {got['loss_sum']: .5f}")
    worst = max(
        float((a - b).detach().abs().max())
        for a, b in zip(model.parameters(), alone.parameters(), strict=True)
    )
    if rank != 0:
        return 0
    last = float(total) / len(batch)
    print(f"reward {first:.3f} -> {last:.3f} of 1, {seconds / words.steps * 1e3:.1f} ms a step")
    print(f"{processes} processes and one alone: parameters differ by {worst:.1e} at most")
    return 0 if worst < 1e-6 and last > first else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="40 steps, seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--groups", type=int, default=16, help="questions of a step, of 8 answers")
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--processes", type=int, default=2, help="if torchrun does not start it")
    words = parser.parse_args(argv)
    if words.smoke:
        words.steps, words.groups, words.lr = 40, 8, 1e-2
    if "RANK" not in os.environ:
        given = sys.argv[1:] if argv is None else argv
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun would, and say so at length
        torchrun(["--standalone", f"--nproc-per-node={words.processes}", __file__, *given])
        return 0  # it raises if a process fails
    if words.groups % int(os.environ["WORLD_SIZE"]):
        parser.error(f"--groups must be a multiple of the {os.environ['WORLD_SIZE']} processes")
    # DDP imports dynamo; imported after the group exists, it would hold the group past its end, and
    # a thread of Gloo that outlives the interpreter aborts the process
    import torch._dynamo

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    try:
        return train(words)
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
