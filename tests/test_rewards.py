"""keyword_reward: what counts and what is refused."""

import pytest
import torch

from pyllmtune import keyword_reward

KEYWORDS = ["потому что", "следовательно", "шаг 1"]


def test_counts_each_keyword_once_in_any_case():
    texts = [
        "Шаг 1: два плюс два; следовательно, четыре. Шаг 1.",
        "четыре",
        "ПОТОМУ ЧТО шаг 1 следовательно",
        "",
    ]
    assert torch.equal(keyword_reward(texts, KEYWORDS), torch.tensor([2.0, 0.0, 3.0, 0.0]))
    assert torch.equal(keyword_reward(texts, []), torch.zeros(4))
    assert keyword_reward([], KEYWORDS).shape == (0,)


def test_bad_input_is_refused_by_name():
    with pytest.raises(TypeError, match="texts must be a sequence of strings"):
        keyword_reward("one text", KEYWORDS)
    with pytest.raises(TypeError, match="keywords must be a sequence"):
        keyword_reward(["a"], "шаг 1")
    with pytest.raises(ValueError, match="must not be empty strings"):
        keyword_reward(["a"], ["", "b"])
