"""Automatic rewards of generated texts: words, format, answer, length. Add them with your weights.

Each takes the whole batch and returns a float32 vector, one number per text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pyllmtune import _checks


def keyword_reward(texts: Sequence[str], keywords: Sequence[str]) -> Tensor:
    """How many of the keywords occur in each text, upper and lower case alike: a reward for shown
    reasoning.

    Args:
        texts: the answers.
        keywords: non-empty; each counts once per text, however often it occurs.

    Returns:
        ``[len(texts)]`` float32.

    Raises:
        TypeError: ``texts`` or ``keywords`` is a single string.
        ValueError: a keyword is empty.

    >>> keyword_reward(["step 1: 2 + 2, therefore 4", "4"], ["step 1", "therefore", "because"])
    tensor([2., 0.])
    """
    _check_strings(texts=texts, keywords=keywords)
    if not all(keywords):
        raise ValueError("keywords must not be empty strings: every text would contain them")
    folded = [keyword.casefold() for keyword in keywords]
    return _rewards(sum(keyword in text.casefold() for keyword in folded) for text in texts)


def regex_reward(texts: Sequence[str], pattern: str | re.Pattern[str]) -> Tensor:
    """1 where the pattern matches the whole text, else 0. In a string pattern ``.`` also matches
    the end of a line.

    Args:
        texts: the answers.
        pattern: a regular expression of ``re``, or a compiled one with its own flags.

    Returns:
        ``[len(texts)]`` float32.

    Raises:
        TypeError: ``texts`` is a single string.
        re.error: the pattern is malformed.

    >>> regex_reward(["42", "about 42"], r"-?[0-9]+")
    tensor([1., 0.])
    """
    _check_strings(texts=texts)
    compiled = re.compile(pattern, re.DOTALL) if isinstance(pattern, str) else pattern
    return _rewards(compiled.fullmatch(text) is not None for text in texts)


def tag_format_reward(texts: Sequence[str], tags: Sequence[str] = ("think", "answer")) -> Tensor:
    """1 where the text is ``<think>...</think> <answer>...</answer>`` and nothing else, each tag
    once and in this order, white space aside (DeepSeek-AI 2025).

    Args:
        texts: the answers.
        tags: names of the sections.

    Returns:
        ``[len(texts)]`` float32.

    Raises:
        TypeError: ``texts`` or ``tags`` is a single string.
        ValueError: no tag is given, or one is empty.

    >>> tag_format_reward(["<think>2 + 2</think> <answer>4</answer>", "<answer>4</answer>"])
    tensor([1., 0.])
    """
    _check_strings(texts=texts, tags=tags)
    if not tags or not all(tags):
        raise ValueError(f"tags must be names of sections, got {tags!r}")
    names = [re.escape(tag) for tag in tags]
    inside = rf"(?:(?!</?(?:{'|'.join(names)})>).)*"  # no tag within a section
    sections = r"\s*".join(f"<{name}>{inside}</{name}>" for name in names)
    return regex_reward(texts, rf"\s*{sections}\s*")


def exact_answer_reward(
    texts: Sequence[str], answers: Sequence[str], pattern: str | re.Pattern[str] | None = None
) -> Tensor:
    """1 where the text's final answer is the expected one, letter for letter, white space around
    it aside.

    Args:
        texts: what the model wrote.
        answers: the expected answer to each.
        pattern: finds the answer: the first group of the last match, or the whole match without a
            group; a text without a match gets 0. None takes the whole text.

    Returns:
        ``[len(texts)]`` float32.

    Raises:
        TypeError: ``texts`` or ``answers`` is a single string.
        ValueError: they differ in number.

    >>> texts = ["so <answer> 4 </answer>", "4", "<answer>5</answer>"]
    >>> exact_answer_reward(texts, ["4"] * 3, r"<answer>(.*?)</answer>")
    tensor([1., 0., 0.])
    """
    _check_strings(texts=texts, answers=answers)
    if len(texts) != len(answers):
        raise ValueError(f"answers must be one per text, got {len(answers)} for {len(texts)}")
    compiled = re.compile(pattern, re.DOTALL) if isinstance(pattern, str) else pattern

    def found(text: str) -> str | None:
        if compiled is None:
            return text
        matches = list(compiled.finditer(text))
        return matches[-1][1 if compiled.groups else 0] if matches else None

    pairs = zip(map(found, texts), answers, strict=True)
    return _rewards(own is not None and own.strip() == answer.strip() for own, answer in pairs)


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int = 0) -> Tensor:
    """DAPO's soft punishment (Yu et al. 2025): 0 up to ``max_length - buffer`` tokens, falling
    linearly to -1 at ``max_length``, -1 beyond.

    Args:
        lengths: ``[B]`` numbers of tokens, integer.
        max_length: the longest answer that is not punished in full, positive.
        buffer: over how many tokens the punishment grows; 0 punishes only what is longer.

    Returns:
        ``[B]`` float32, on the device of ``lengths``.

    Raises:
        TypeError: ``lengths`` is not an integer tensor.
        ValueError: ``max_length`` or ``buffer`` is out of its range.

    >>> overlong_penalty(torch.tensor([80, 90, 100, 101]), max_length=100, buffer=20)
    tensor([ 0.0000, -0.5000, -1.0000, -1.0000])
    """
    _checks.check_tensor("lengths", lengths, (torch.int64, torch.int32))
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    if not 0 <= buffer <= max_length:
        raise ValueError(f"buffer must be in [0, max_length={max_length}], got {buffer}")
    if buffer == 0:
        return -(lengths > max_length).float()
    return ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0)


def _check_strings(**named: Sequence[str]) -> None:
    for name, value in named.items():
        if isinstance(value, str):
            raise TypeError(f"{name} must be a sequence of strings, got one string; pass [{name}]")


def _rewards(values: Iterable[float]) -> Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float32)
