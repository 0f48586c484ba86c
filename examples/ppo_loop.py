"""PPO in plain PyTorch: a small transformer and its critic learn to sort digits.

    python examples/ppo_loop.py            # sorts four digits; half a minute
    python examples/ppo_loop.py --smoke    # two digits, seconds

One loop, four parts: answers drawn by `sample`, advantages by `gae`, the losses `ppo_clip_loss` and
`value_loss` on what `token_logprobs` scores, and an optimiser. Nothing is shown to the model but
rewards: a token earns 1 where it is right, and an answer is right with the END token behind it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import pyllmtune

DIGITS, SORT, END = 10, 10, 11  # token ids 0 to 9 are digits
TOKENS = 12


@dataclass(frozen=True)
class Settings:
    digits: int = 4
    batch: int = 128
    iterations: int = 60
    epochs: int = 4
    lr: float = 1e-3
    gamma: float = 0.5  # a token has little to do with the rewards of those after it
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 1.0
    value_coef: float = 0.5
    entropy_coef: float = 0.01
    width: int = 64

    @property
    def prompt(self) -> int:
        return self.digits + 1

    @property
    def longest(self) -> int:  # one token more than it takes: answers can be cut off
        return self.digits + 2


class Reader(nn.Module):
    """A causal transformer: ``tokens [B, T] -> [B, T, outputs]``."""

    def __init__(self, settings: Settings, outputs: int) -> None:
        super().__init__()
        width, length = settings.width, settings.prompt + settings.longest
        self.tokens = nn.Embedding(TOKENS, width)
        self.places = nn.Parameter(0.5 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        x = self.tokens(tokens) + self.places[:length]
        return self.head(self.body(x, mask=causal, is_causal=True))


class ActorCritic(nn.Module):
    """Two readers: in a common body, the critic's larger gradients drown those of the policy."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.actor, self.critic = Reader(settings, TOKENS), Reader(settings, 1)

    def logits(self, tokens: Tensor) -> Tensor:  # [B, T, V]
        return self.actor(tokens)

    def values(self, tokens: Tensor) -> Tensor:  # [B, T]: of having read so far
        return self.critic(tokens)[..., 0]


@dataclass(frozen=True)
class Rollout:
    """A batch of answers; every tensor ``[B, T]`` over their tokens unless said otherwise."""

    tokens: Tensor  # [B, prompt + T]
    answers: Tensor
    mask: Tensor  # up to and with END
    rewards: Tensor
    logprobs: Tensor
    values: Tensor  # [B, T + 1]: before each token, and after the last
    finished: Tensor  # [B]: the answer came to its END, and was not cut off


def draw_prompts(settings: Settings) -> Tensor:
    digits = torch.randint(DIGITS, (settings.batch, settings.digits))
    return torch.cat((digits, torch.full((settings.batch, 1), SORT)), dim=1)


def right_answers(prompts: Tensor) -> Tensor:
    """``[B, digits + 1]``: the digits in order, and END."""
    return torch.cat((prompts[:, :-1].sort(dim=1).values, torch.full_like(prompts[:, :1], END)), 1)


@torch.no_grad()
def roll_out(model: ActorCritic, settings: Settings, greedy: bool = False) -> Rollout:
    prompts = draw_prompts(settings)
    tokens, seeds = prompts, torch.randint(2**62, (settings.batch,))
    for position in range(settings.longest):
        out = pyllmtune.sample(
            model.logits(tokens)[:, -1],
            temperature=0.0 if greedy else 1.0,
            seed=seeds,
            position=position,
        )
        tokens = torch.cat((tokens, out.tokens[:, None]), dim=1)
    answers = tokens[:, settings.prompt :]
    ended = (answers == END).cumsum(1)
    mask = (ended == 0) | ((ended == 1) & (answers == END))

    logits, values = model.logits(tokens), model.values(tokens)
    before = slice(settings.prompt - 1, -1)  # the position that predicts each token of the answer
    right = right_answers(prompts)
    earned = torch.zeros_like(answers, dtype=torch.float32)
    earned[:, : right.shape[1]] = (answers[:, : right.shape[1]] == right).float()
    return Rollout(
        tokens,
        answers,
        mask,
        torch.where(mask, earned, 0.0),
        pyllmtune.token_logprobs(logits[:, before], answers, mask=mask).logprobs,
        values[:, settings.prompt - 1 :],
        ended[:, -1] > 0,
    )


def update(
    model: ActorCritic, optimizer: torch.optim.Optimizer, batch: Rollout, settings: Settings
) -> dict[str, float]:
    """A few epochs on one batch; what the last of them measured."""
    advantages, returns = pyllmtune.gae(
        batch.rewards,
        batch.values,
        batch.mask,
        gamma=settings.gamma,
        lam=settings.lam,
        terminated=batch.finished,  # the others were cut off: the critic says what was to come
    )
    advantages = pyllmtune.whiten(advantages, batch.mask)
    before = slice(settings.prompt - 1, -1)
    for _ in range(settings.epochs):
        logits, values = model.logits(batch.tokens), model.values(batch.tokens)
        scores = pyllmtune.token_logprobs(logits[:, before], batch.answers, mask=batch.mask)
        policy = pyllmtune.ppo_clip_loss(
            scores.logprobs,
            batch.logprobs,
            advantages,
            batch.mask,
            eps=settings.clip,
            entropy=scores.entropy,
            entropy_coef=settings.entropy_coef,
        )
        critic = pyllmtune.value_loss(
            values[:, before],
            returns,
            batch.mask,
            old_values=batch.values[:, :-1],
            clip=settings.value_clip,
        )
        optimizer.zero_grad()
        (policy.loss + settings.value_coef * critic.loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    metrics = policy.metrics.to_dict()
    return {
        "kl": metrics["approx_kl"],
        "clipped": metrics["clip_low_fraction"] + metrics["clip_high_fraction"],
        "entropy": metrics["entropy"],
        "critic": float(critic.loss.detach()),
    }


def accuracy(model: ActorCritic, settings: Settings) -> float:
    """Share of fresh prompts that greedy decoding sorts without a mistake."""
    batch = roll_out(model, settings, greedy=True)
    return float((batch.rewards.sum(1) == settings.digits + 1).float().mean())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="two digits, seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--digits", type=int, default=4, help="how many to sort")
    parser.add_argument("--iterations", type=int, default=60)
    words = parser.parse_args(argv)
    settings = Settings(digits=words.digits, iterations=words.iterations)
    if words.smoke:
        settings = Settings(digits=2, batch=64, iterations=20, width=32, lr=3e-3)

    torch.set_num_threads(1)  # tensors this small lose more to the hand-over than a thread gains
    torch.manual_seed(words.seed)
    model = ActorCritic(settings)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    rewards = []
    for iteration in range(1, settings.iterations + 1):
        batch = roll_out(model, settings)
        rewards.append(float(batch.rewards.sum(1).mean()) / (settings.digits + 1))
        metrics = update(model, optimizer, batch, settings)
        if iteration == 1 or iteration % max(settings.iterations // 10, 1) == 0:
            shown = "  ".join(f"{name} {value:7.4f}" for name, value in metrics.items())
            print(f"{iteration:5d}  reward {rewards[-1]:.3f}  {shown}", flush=True)
    few = max(len(rewards) // 10, 1)
    first, last = sum(rewards[:few]) / few, sum(rewards[-few:]) / few
    sorted_right = accuracy(model, settings)
    print(f"reward {first:.3f} -> {last:.3f} of 1; sorted without a mistake: {sorted_right:.0%}")
    return 0 if last > first else 1


if __name__ == "__main__":
    raise SystemExit(main())
