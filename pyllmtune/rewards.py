"""Automatic rewards of generated texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    for name, value in (("texts", texts), ("keywords", keywords)):
        if isinstance(value, str):
            raise TypeError(f"{name} must be a sequence of strings, got one string; pass [{name}]")
    if not all(keywords):
        raise ValueError("keywords must not be empty strings: every text would contain them")
    folded = [keyword.casefold() for keyword in keywords]
    counts = [sum(keyword in text.casefold() for keyword in folded) for text in texts]
    return torch.tensor(counts, dtype=torch.float32)
