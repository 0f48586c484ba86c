"""Answers from the model: batched decoding with the key-value cache, drawn by ``pyllmtune.sample``.

A token is a function of its answer's seed, its position and the logits alone, so a rollout does not
depend on the batch. Two models that differ in their last bits draw the same token unless the random
number falls within that difference of a boundary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyllmtune import KeptTokens, sample
from pyllmtune.demo.model import Cache, Transformer
from pyllmtune.demo.vocabulary import NEWLINE, PAD, encode

ANSWER_LENGTH = 24  # tokens; the longest right answer has 21


def pad_left(prompts: list[str]) -> Tensor:
    """Token ids ``[B, T]`` of prompts, aligned at their ends."""
    rows = [encode(prompt) for prompt in prompts]
    length = max(map(len, rows))
    return torch.tensor([[PAD] * (length - len(row)) + row for row in rows])


def answer_seeds(seed: int, step: int, rows: int) -> Tensor:
    """``[rows]`` int64: one for each answer of a rollout."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randint(2**62, (rows,), generator=generator)


class Rollout(NamedTuple):
    tokens: Tensor  # [B, T] int64, padded
    logprobs: Tensor  # [B, T] float32, of the distribution that was sampled; 0 at padding
    kept: KeptTokens | None  # what top-p left of it, a row for each of [B, T]; none at padding


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Tensor,
    length: int,
    *,
    copies: int = 1,
    seeds: Tensor | None = None,
    top_p: float = 1.0,
) -> Rollout:
    """``B * copies`` answers, each up to its newline, then padding; T is the longest's length.

    Args:
        prompts: ``[B, T]`` token ids, padded on the left.
        length: most tokens an answer may have.
        copies: answers per prompt, in neighbouring rows.
        seeds: ``[B * copies]``, one an answer; None decodes greedily.
        top_p: below 1, draw from the nucleus alone, and return it.
    """
    cache = Cache(model.config, len(prompts), prompts.shape[1] + length)
    logits = model(prompts, cache)[:, -1].repeat_interleave(copies, dim=0)
    cache.expand(copies)
    answers = torch.full((len(logits), length), PAD)
    logprobs = torch.zeros(len(logits), length)
    how = {"temperature": 0.0, "seed": 0} if seeds is None else {"seed": seeds, "top_p": top_p}
    nuclei = []
    open_rows = torch.ones(len(logits), dtype=torch.bool)
    for position in range(length):
        drawn = sample(
            without_padding(logits),
            position=position,
            logprobs="processed",
            return_kept=top_p < 1.0,
            **how,
        )
        tokens = drawn.tokens
        answers[:, position] = torch.where(open_rows, tokens, PAD)
        logprobs[:, position] = torch.where(open_rows, drawn.logprobs, 0.0)
        if drawn.kept is not None:
            nuclei.append(drawn.kept.to_mask(logits.shape[-1]) & open_rows[:, None])
        open_rows &= tokens != NEWLINE
        if position + 1 == length or not open_rows.any():
            break
        logits = model(tokens[:, None], cache)[:, -1]
    kept = KeptTokens.from_mask(torch.stack(nuclei, dim=1)) if nuclei else None
    return Rollout(answers[:, : position + 1], logprobs[:, : position + 1], kept)


def without_padding(logits: Tensor) -> Tensor:
    """Padding is not a token. Finite, so that 0 times its logit is 0 in an eager entropy."""
    return logits.index_fill(-1, torch.tensor([PAD]), -1e9)


class Outputs(NamedTuple):
    """A full forward over prompts and answers; row t is the state that answer token t follows."""

    logits: Tensor  # [B, T, V]
    values: Tensor | None  # [B, T], with a critic


def answer_outputs(model: Transformer, prompts: Tensor, answers: Tensor) -> Outputs:
    """Logits that the answers' tokens were drawn from, and the critic's values."""
    tokens = torch.cat((prompts, answers), dim=1)[:, :-1]
    features = model.features(tokens)[:, prompts.shape[1] - 1 :]
    values = None if model.critic is None else model.critic(features)[..., 0]
    return Outputs(without_padding(model.head(features)), values)
