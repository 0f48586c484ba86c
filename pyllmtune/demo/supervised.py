"""The supervised phase: training on solved questions, stopped while the model is often wrong."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import pyllmtune
from pyllmtune.demo.evaluate import Accuracy, accuracy
from pyllmtune.demo.model import ModelConfig, Transformer
from pyllmtune.demo.task import Question, Split
from pyllmtune.demo.vocabulary import NEWLINE, PAD, encode

LINES = 3  # questions per document, all in one style: so solved lines in a prompt set the style
# documents of a batch with and without steps: asked alone, the model is unsure whether to show them
WORKED, DIRECT = 24, 40
LEARNING_RATE = 4e-3
WARMUP = 30


@dataclass(frozen=True)
class Stop:
    """When supervision ends: at this few-shot accuracy on validation questions, or at ``steps``."""

    accuracy: float = 0.8
    steps: int = 600
    every: int = 25
    first: int = 200


def document(questions: list[Question], worked: bool) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them belong to an answer: only those are learned."""
    tokens, answer = [NEWLINE], [False]
    for question in questions:
        asked, line = encode(question.text), encode(question.solved(worked))
        tokens += line
        answer += [False] * len(asked) + [True] * (len(line) - len(asked))
    return tokens, answer


def batch(
    questions: list[Question], generator: random.Random, documents: int, worked: bool
) -> tuple[Tensor, Tensor]:
    """``(tokens, answer)`` of documents in one style, ``[documents, T]``, padded on the right."""
    rows = [document(generator.sample(questions, LINES), worked) for _ in range(documents)]
    length = max(len(tokens) for tokens, _ in rows)
    tokens = torch.full((documents, length), PAD)
    answer = torch.zeros(documents, length, dtype=torch.bool)
    for row, (ids, learned) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        answer[row, : len(ids)] = torch.tensor(learned)
    return tokens, answer


def negative_log_likelihood(model: Transformer, tokens: Tensor, answer: Tensor) -> Tensor:
    """Sum over the answers' tokens."""
    scored = pyllmtune.token_logprobs(model(tokens)[:, :-1], tokens[:, 1:], mask=answer[:, 1:])
    return -scored.logprobs.sum()


def supervise(
    config: ModelConfig,
    split: Split,
    seed: int,
    stop: Stop,
    on_step: Callable[[int, float, Accuracy | None], None],
) -> Transformer:
    """A model trained until ``stop``; ``on_step(step, loss, accuracy)`` reports."""
    torch.manual_seed(seed)
    model = Transformer(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    generator = random.Random(seed)
    for step in range(1, stop.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP)
        # the styles differ in length: apart, little is spent on padding
        styles = ((WORKED, True), (DIRECT, False))
        parts = [batch(split.train, generator, *style) for style in styles]
        total = sum(answer.sum() for _, answer in parts)
        loss = sum(negative_log_likelihood(model, *part) for part in parts) / total
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        measured = None
        if step >= stop.first and step % stop.every == 0:
            measured = accuracy(model, split.validation, split.train)
        on_step(step, loss.item(), measured)
        if measured is not None and measured.few_shot >= stop.accuracy:
            break
    return model
