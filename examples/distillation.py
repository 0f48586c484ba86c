"""Distillation: a small student learns the next-character distribution of a larger teacher.

    python examples/distillation.py --plot distillation.png     # half a minute
    python examples/distillation.py --divergence reverse        # mode seeking; or jsd
    python examples/distillation.py --smoke                     # seconds

The teacher first learns lines of a small grammar. The student then sees no data but the teacher's
logits: the loss is `kl_divergence`, exact over the vocabulary, one read of both. Beside it stands
what is usual, log-softmax and sums: values and gradients are compared at the first step, and at the
end the milliseconds of both on a vocabulary of real size.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import pyllmtune

WORDS = (
    ("the cat", "a dog", "the old man", "one bird", "nobody"),
    ("sees", "likes", "follows", "forgets"),
    ("the moon", "a river", "it", "the other one", "you"),
    ("today", "at night", "again and again", "once"),
)
ALPHABET = sorted({letter for words in WORDS for word in words for letter in word} | {"\n"})
LENGTH = 48

Divergence = Callable[[Tensor, Tensor], Tensor]  # student, teacher [..., V] -> [...]


def text(count: int) -> Tensor:
    """``[count, LENGTH]``: lines of the grammar, one after another, cut anywhere."""
    picks = [torch.randint(len(words), (4 * count,)).tolist() for words in WORDS]
    parts = [[words[i] for i in pick] for words, pick in zip(WORDS, picks, strict=True)]
    codes = torch.tensor(
        [ALPHABET.index(letter) for letter in "\n".join(map(" ".join, zip(*parts, strict=True)))]
    )
    return codes[torch.randint(len(codes) - LENGTH, (count, 1)) + torch.arange(LENGTH)]


class Reader(nn.Module):
    """Characters ``[B, T]`` -> logits of the next ``[B, T, V]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), width)
        self.body = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens))[0])


def fused(kind: str) -> Divergence:
    """``forward`` is KL(teacher || student), the student covering all that the teacher does."""
    options = {"forward": {"reverse": True}, "reverse": {}, "jsd": {"js_weight": 0.5}}[kind]
    return lambda student, teacher: pyllmtune.kl_divergence(student, teacher, **options)


def eager(kind: str) -> Divergence:
    def kl(p: Tensor, q: Tensor) -> Tensor:  # of log-probs
        return (p.exp() * (p - q)).sum(-1)

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        p, q = student.log_softmax(-1), teacher.log_softmax(-1)
        if kind == "jsd":
            middle = ((p.exp() + q.exp()) / 2).log()
            return (kl(p, middle) + kl(q, middle)) / 2
        return kl(q, p) if kind == "forward" else kl(p, q)

    return divergence


def train_teacher(teacher: Reader, steps: int) -> float:
    """By its own log-probs of the text; the loss at the end, in nats a character."""
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for _ in tqdm(range(steps), desc="teacher", unit="step", leave=False, disable=None):
        tokens = text(32)
        out = pyllmtune.token_logprobs(teacher(tokens)[:, :-1], tokens[:, 1:])
        loss = -out.logprobs.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def differences(student: Reader, teacher: Reader, kind: str) -> tuple[float, float]:
    """Of fused and eager: of the loss, and of its gradients over the largest of them."""
    tokens, found = text(8), []
    target = teacher(tokens).detach()
    for divergence in (fused(kind), eager(kind)):
        loss = divergence(student(tokens), target).mean()
        grads = torch.autograd.grad(loss, list(student.parameters()))
        found.append((loss.detach(), torch.cat([grad.flatten() for grad in grads])))
    (loss, grad), (wanted, wanted_grad) = found
    return float((loss - wanted).abs()), float(
        (grad - wanted_grad).abs().max() / wanted_grad.abs().max()
    )


def distil(student: Reader, teacher: Reader, kind: str, steps: int) -> list[float]:
    """The divergence on held-out text, before, during and after."""
    divergence, held_out = fused(kind), text(64)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)

    def measure() -> float:
        with torch.no_grad():
            return float(divergence(student(held_out), teacher(held_out)).mean())

    curve = [measure()]
    print(f"{0:5d}  {curve[0]:.4f} nats a character on held-out text")
    for step in tqdm(range(1, steps + 1), desc="student", unit="step", leave=False, disable=None):
        tokens = text(32)
        with torch.no_grad():
            target = teacher(tokens)
        loss = divergence(student(tokens), target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(steps // 8, 1) == 0:
            curve.append(measure())
            tqdm.write(f"{step:5d}  {curve[-1]:.4f}")
    return curve


def milliseconds(divergence: Divergence, rows: int, vocab: int) -> float:
    """Forward and backward of the loss alone, the best of five."""
    student, teacher = torch.randn(rows, vocab, requires_grad=True), torch.randn(rows, vocab)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        divergence(student, teacher).mean().backward()
        best = min(best, time.perf_counter() - begin)
        student.grad = None
    return best * 1e3


def plot(curve: list[float], kind: str, steps: int, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.semilogy([i * max(steps // 8, 1) for i in range(len(curve))], curve, marker="o")
    axes.set(xlabel="step", ylabel=f"{kind} divergence, nats a character", title="held-out text")
    figure.savefig(path, dpi=120)
    print(f"saved {path}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a small run, seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--divergence", choices=("forward", "reverse", "jsd"), default="forward")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="save the curve")
    words = parser.parse_args(argv)
    steps, width, vocab = words.steps, 128, 32_000
    if words.smoke:
        steps, width, vocab = 40, 32, 4_000

    torch.manual_seed(words.seed)
    teacher, student = Reader(width), Reader(width // 4)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (teacher, student)]
    print(f"teacher: {sizes[0]} parameters, {train_teacher(teacher, steps):.3f} nats a character")
    print(f"student: {sizes[1]} parameters")
    off, grad_off = differences(student, teacher, words.divergence)
    print(f"fused and eager loss differ by {off:.1e}, their gradients by {grad_off:.1e}")
    curve = distil(student, teacher, words.divergence, steps)
    times = [milliseconds(f(words.divergence), 256, vocab) for f in (fused, eager)]
    print(
        f"the loss alone, 256 x {vocab} logits, forward and backward: "
        f"{times[0]:.1f} ms, eager {times[1]:.1f} ms"
    )
    if words.plot is not None:
        plot(curve, words.divergence, steps, words.plot)
    return 0 if off < 1e-6 and grad_off < 1e-5 and curve[-1] < 0.8 * curve[0] else 1


if __name__ == "__main__":
    raise SystemExit(main())
