"""Accuracy on held-out questions, by greedy decoding: asked alone, and after solved lines."""

from __future__ import annotations

import random
from typing import NamedTuple

from pyllmtune.demo.model import Transformer
from pyllmtune.demo.rollout import ANSWER_LENGTH, generate, pad_left
from pyllmtune.demo.task import Question, few_shot, is_right, zero_shot
from pyllmtune.demo.vocabulary import STEP_1, decode_rows

EXAMPLES = 2  # solved lines before a few-shot question


class Accuracy(NamedTuple):
    """Shares of right answers, and of zero-shot answers with steps, and with the right steps."""

    zero_shot: float
    few_shot: float
    worked: float
    worked_right: float

    @property
    def mean(self) -> float:
        return (self.zero_shot + self.few_shot) / 2


def few_shot_prompts(questions: list[Question], pool: list[Question], seed: int = 0) -> list[str]:
    """Each question after ``EXAMPLES`` worked lines from ``pool``, the same on every call."""
    generator = random.Random(seed)
    return [few_shot(question, generator.sample(pool, EXAMPLES)) for question in questions]


def answers(model: Transformer, prompts: list[str]) -> list[str]:
    """The greedy answer to each prompt, as text."""
    return decode_rows(generate(model, pad_left(prompts), ANSWER_LENGTH).tokens.tolist())


def accuracy(model: Transformer, questions: list[Question], pool: list[Question]) -> Accuracy:
    """Greedy accuracy on ``questions`` in both forms; ``pool`` supplies the solved examples."""
    alone = answers(model, [zero_shot(question) for question in questions])
    shown = answers(model, few_shot_prompts(questions, pool))

    def right(texts: list[str]) -> float:
        return sum(map(is_right, questions, texts)) / len(questions)

    worked = sum(STEP_1 in text for text in alone)
    worked_right = sum(
        text == f"{question.worked()}\n" for question, text in zip(questions, alone, strict=True)
    )
    return Accuracy(right(alone), right(shown), worked / len(alone), worked_right / len(alone))
