"""Arithmetic as questions and answers: asked alone (zero-shot) or after solved lines (few-shot).

An answer may be direct, ``47+38=85``, or worked out first:
``47+38= step 1: 7+8=15, step 2: 4+3+1=8, therefore 85``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from pyllmtune.demo.vocabulary import STEP_1, STEP_2, THEREFORE

LOW, HIGH = 10, 99  # operands: every question has the same length


@dataclass(frozen=True)
class Question:
    """``left + right`` or ``left - right``; a difference is never negative."""

    left: int
    sign: str
    right: int

    @property
    def text(self) -> str:
        return f"{self.left}{self.sign}{self.right}="

    @property
    def value(self) -> int:
        return self.left + self.right if self.sign == "+" else self.left - self.right

    def worked(self) -> str:
        """The answer with its steps: units, then tens; carrying or borrowing shows as a 1."""
        (tens, units), (tens_right, units_right) = divmod(self.left, 10), divmod(self.right, 10)
        if self.sign == "+":
            first, carry = units + units_right, units + units_right >= 10
            second = tens + tens_right + carry
        else:
            carry = units < units_right
            units += 10 * carry
            first, second = units - units_right, tens - tens_right - carry
        carried = f"{self.sign}1" if carry else ""
        return (
            f"{STEP_1}{units}{self.sign}{units_right}={first}"
            f"{STEP_2}{tens}{self.sign}{tens_right}{carried}={second}{THEREFORE}{self.value}"
        )

    def solved(self, worked: bool) -> str:
        """The question with its answer, one line."""
        return f"{self.text}{self.worked() if worked else self.value}\n"


@dataclass(frozen=True)
class Split:
    """Disjoint questions: to train on, to decide when supervision stops, and to measure with."""

    train: list[Question]
    validation: list[Question]
    held_out: list[Question]


def make_split(validation: int, held_out: int, seed: int = 0) -> Split:
    """Split every question; ``a+b`` and ``b+a`` always fall on the same side."""
    numbers = range(LOW, HIGH + 1)
    groups = [
        [Question(a, "+", b), Question(b, "+", a)][: 1 + (a != b)]
        for a in numbers
        for b in numbers
        if a <= b
    ]
    groups += [[Question(a, "-", b)] for a in numbers for b in numbers if a >= b]
    random.Random(seed).shuffle(groups)
    parts: list[list[Question]] = [[], [], []]
    sizes = (held_out, validation)
    for group in groups:
        part = next((i for i, size in enumerate(sizes) if len(parts[i]) + len(group) <= size), 2)
        parts[part] += group
    return Split(train=parts[2], validation=parts[1], held_out=parts[0])


def zero_shot(question: Question) -> str:
    """The question alone."""
    return "\n" + question.text


def few_shot(question: Question, examples: list[Question]) -> str:
    """The question after solved examples, worked out step by step."""
    return "\n" + "".join(example.solved(worked=True) for example in examples) + question.text


def is_right(question: Question, answer: str) -> bool:
    """The line is finished and what it says last is the value; the steps are not looked at."""
    return answer.endswith("\n") and answer[:-1].rsplit(THEREFORE, 1)[-1] == str(question.value)
