"""The training loop of every algorithm: sample answers, reward them, update towards the better.

Every random choice is a function of (seed, step), so two runs that differ only in their library see
the same questions and the same random numbers.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import pyllmtune
from pyllmtune.demo.evaluate import Accuracy
from pyllmtune.demo.losses import Batch, Library, Loss, Objective, Sampled
from pyllmtune.demo.model import Transformer
from pyllmtune.demo.rollout import (
    ANSWER_LENGTH,
    Rollout,
    answer_outputs,
    answer_seeds,
    generate,
    pad_left,
)
from pyllmtune.demo.task import Question, is_right, zero_shot
from pyllmtune.demo.vocabulary import KEYWORDS, PAD, decode_rows

Watch = Callable[[Transformer, Tensor, Batch], None]

WARMUP, LAST_RATE = 10, 0.1  # the learning rate rises for 10 steps and falls to a tenth
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class RunSettings:
    """What both runs share."""

    objective: Objective
    seed: int
    steps: int
    questions: int = 64  # per step
    group_size: int = 8  # answers per question
    learning_rate: float = 1e-3
    keyword_weight: float = 0.1  # against 1 for the right answer
    top_p: float = 1.0  # of the sampler

    def learning_rate_at(self, step: int) -> float:
        """Warm-up times linear decay; ``step`` counts from 1."""
        done = (step - 1) / self.steps
        return self.learning_rate * min(1.0, step / WARMUP) * (1 - (1 - LAST_RATE) * done)


class Record(NamedTuple):
    """One step in numbers; of the losses, the last update's."""

    step: int
    reward: float
    right: float  # share of right answers
    keywords: float  # share of the keywords that occur
    loss: float
    grad_norm: float
    kl: float
    entropy: float
    clipped: float
    preferred: float = math.nan  # share of pairs in which the policy prefers the better answer


class Run:
    """One policy trained with one library, from a copy of ``start``, the reference of the KL."""

    def __init__(
        self, start: Transformer, library: Library, settings: RunSettings, pool: list[Question]
    ) -> None:
        self.library, self.settings, self.pool = library, settings, pool
        self.reference, self.policy = start, copy.deepcopy(start)
        if settings.objective.critic:
            self.policy.add_critic()
        # eps 1e-5: the last bits of an almost absent gradient must not become a full step
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0
        )
        self.records: list[Record] = []
        self.accuracies: dict[int, Accuracy] = {}
        self.answers = torch.empty(0)  # of the last step, [B, T]
        self.sampling_seconds = self.update_seconds = 0.0

    def step(self, step: int, watch: Watch | None = None) -> Record:
        """Sample, reward, update. ``watch`` is called before each update, off the clock."""
        settings = self.settings
        began = time.perf_counter()
        questions = random.Random(f"{settings.seed}/{step}").sample(self.pool, settings.questions)
        asked = pad_left([zero_shot(question) for question in questions])  # [questions, prompt]
        rows = settings.questions * settings.group_size
        seeds = answer_seeds(settings.seed, step, rows)
        offline = settings.objective.offline  # pairs are of whole answers, whoever has sampled them
        rollout = generate(
            self.reference if offline else self.policy,
            asked,
            ANSWER_LENGTH,
            copies=settings.group_size,
            seeds=seeds,
            top_p=1.0 if offline else settings.top_p,
        )
        self.answers = rollout.tokens
        right, keywords = rewards(questions, decode_rows(self.answers.tolist()))
        reward = right + settings.keyword_weight * keywords  # [B]
        prompts = asked.repeat_interleave(settings.group_size, dim=0)  # [B, prompt]
        self.sampling_seconds += time.perf_counter() - began

        batch = self._batch(prompts, rollout, reward.to(self.policy.config.dtype))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        for _ in range(settings.objective.updates):
            if watch is not None:
                watch(self.policy, prompts, batch)
            loss, grad_norm = self._update(prompts, batch)
        means = (values.mean().item() for values in (reward, right, keywords))
        self.records.append(Record(step, *means, loss.value.item(), grad_norm, **loss.metrics))
        return self.records[-1]

    def _batch(self, prompts: Tensor, rollout: Rollout, reward: Tensor) -> Batch:
        """What the updates hold fixed: log-probs of sampler and reference, and who gets credit."""
        began = time.perf_counter()
        answers, settings = self.answers, self.settings
        mask = answers != PAD
        with torch.no_grad():
            logits = answer_outputs(self.reference, prompts, answers).logits
            ref = self.library.score(logits, answers, mask, rollout.kept)
            critic = settings.objective.critic
            values = answer_outputs(self.policy, prompts, answers).values if critic else None
        old = rollout.logprobs.to(ref.dtype)
        scores = (answers, mask, old, ref, rollout.kept)
        sampled = Sampled(*scores, reward, settings.group_size, values)
        batch = self.library.credit(sampled, settings.objective)
        self.update_seconds += time.perf_counter() - began
        return batch

    def _update(self, prompts: Tensor, batch: Batch) -> tuple[Loss, float]:
        """One optimiser step: its loss, and the norm of the gradient before it was clipped."""
        began = time.perf_counter()
        outputs = answer_outputs(self.policy, prompts, batch.tokens)
        loss = self.library.loss(outputs, batch, self.settings.objective)
        self.optimizer.zero_grad(set_to_none=True)
        loss.value.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.update_seconds += time.perf_counter() - began
        return loss, grad_norm.item()


def rewards(questions: list[Question], answers: list[str]) -> tuple[Tensor, Tensor]:
    """Per answer: 1 if it is right, and the share of the keywords of reasoning that occur in it.

    The second looks at words alone and cannot tell good steps from bad: it must weigh little.
    """
    copies = len(answers) // len(questions)
    right = [is_right(questions[row // copies], answer) for row, answer in enumerate(answers)]
    keywords = pyllmtune.keyword_reward(answers, KEYWORDS) / len(KEYWORDS)
    return torch.tensor(right, dtype=torch.float32), keywords
