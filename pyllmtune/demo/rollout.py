"""Answers from the model: batched decoding with the key-value cache, by inverse CDF.

A token is a function of (seed, step, row, position) and of the probabilities alone. The cumulative
sum is float64, so two models that differ in their last bits draw the same token unless the uniform
number falls within that difference of a boundary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyllmtune.demo.model import Cache, Transformer
from pyllmtune.demo.vocabulary import NEWLINE, PAD, encode

ANSWER_LENGTH = 24  # tokens; the longest right answer has 21


def pad_left(prompts: list[str]) -> Tensor:
    """Token ids ``[B, T]`` of prompts, aligned at their ends."""
    rows = [encode(prompt) for prompt in prompts]
    length = max(map(len, rows))
    return torch.tensor([[PAD] * (length - len(row)) + row for row in rows])


def uniforms(seed: int, step: int, rows: int, length: int) -> Tensor:
    """``[rows, length]`` float64 in [0, 1): the random numbers of one rollout."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.rand(rows, length, dtype=torch.float64, generator=generator)


def draw(logits: Tensor, uniform: Tensor | None) -> Tensor:
    """``[B]``: the first token whose cumulative probability passes ``uniform``; None is greedy."""
    if uniform is None:
        return logits.argmax(-1)
    cumulative = logits.double().softmax(-1).cumsum(-1)  # [B, V]
    threshold = (uniform * cumulative[:, -1])[:, None]
    return (cumulative <= threshold).sum(-1).clamp_(max=logits.shape[-1] - 1)


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Tensor,
    length: int,
    *,
    copies: int = 1,
    uniform: Tensor | None = None,
) -> Tensor:
    """Answers ``[B * copies, T]``, each up to its newline, then padding; T is the longest's length.

    Args:
        prompts: ``[B, T]`` token ids, padded on the left.
        length: most tokens an answer may have.
        copies: answers per prompt, in neighbouring rows.
        uniform: ``[B * copies, length]`` float64 random numbers; None decodes greedily.
    """
    cache = Cache(model.config, len(prompts), prompts.shape[1] + length)
    logits = model(prompts, cache)[:, -1].repeat_interleave(copies, dim=0)
    cache.expand(copies)
    answers = torch.full((len(logits), length), PAD)
    open_rows = torch.ones(len(logits), dtype=torch.bool)
    for position in range(length):
        logits[:, PAD] = -torch.inf  # padding is not a token
        tokens = draw(logits, None if uniform is None else uniform[:, position])
        answers[:, position] = torch.where(open_rows, tokens, PAD)
        open_rows &= tokens != NEWLINE
        if position + 1 == length or not open_rows.any():
            break
        logits = model(tokens[:, None], cache)[:, -1]
    return answers[:, : position + 1]


def answer_logits(model: Transformer, prompts: Tensor, answers: Tensor) -> Tensor:
    """``[B, T, V]`` of a full forward: row t is what answer token t was drawn from."""
    tokens = torch.cat((prompts, answers), dim=1)[:, :-1]
    return model(tokens)[:, prompts.shape[1] - 1 :]
