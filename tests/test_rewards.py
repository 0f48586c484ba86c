"""Rewards of texts: what counts and what is refused."""

import re

import pytest
import torch

from pyllmtune import keyword_reward
from pyllmtune.rewards import exact_answer_reward, overlong_penalty, regex_reward, tag_format_reward

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


def test_a_pattern_must_match_the_whole_text():
    texts = ["a\nb", "xa\nb", "a\nbx", "A\nB"]
    assert regex_reward(texts, r"a.b").tolist() == [1, 0, 0, 0]
    assert regex_reward(texts, re.compile(r"a\sb", re.IGNORECASE)).tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("\n<think>\na\n</think>\n\n<answer> b </answer>\n", 1),
        ("<think></think><answer></answer>", 1),
        ("<think>1 < 2 </b></think><answer>b</answer>", 1),  # other tags are text
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a</think>", 0),
        ("<think>a<answer>b</answer>", 0),
        ("<think>a</think>so<answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer>.", 0),
        ("<think>a<think>b</think></think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("", 0),
    ],
)
def test_tag_format(text, reward):
    assert tag_format_reward([text]).tolist() == [reward]


def test_tags_are_names_and_not_patterns():
    assert tag_format_reward(["<a.b>x</a.b>", "<acb>x</acb>"], tags=["a.b"]).tolist() == [1, 0]


def test_long_unfinished_texts_take_linear_time():
    text = "<think>" + "a<" * 200_000
    assert tag_format_reward([text, text + "</think><answer>4</answer>"]).tolist() == [0, 1]


def test_exact_answers():
    texts = ["4", " 4\n", "44", "so 4", ""]
    assert exact_answer_reward(texts, ["4"] * 5).tolist() == [1, 1, 0, 0, 0]
    texts = ["is 3, is 4", "is 4, is 3", "4"]
    assert exact_answer_reward(texts, ["4"] * 3, r"is (\d)").tolist() == [1, 0, 0]  # the last
    assert exact_answer_reward(texts, ["4", "4", " 4"], r"\d").tolist() == [1, 0, 1]
    compiled = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
    assert exact_answer_reward(["<answer>\n4</answer>"], ["4"], compiled).tolist() == [1]


def test_overlong_penalty():
    lengths = torch.tensor([0, 60, 61, 80, 100, 101], dtype=torch.int32)
    got = overlong_penalty(lengths, 100, 40)
    torch.testing.assert_close(got, torch.tensor([0, 0, -0.025, -0.5, -1, -1]))
    assert overlong_penalty(lengths, 100).tolist() == [0, 0, 0, 0, 0, -1]


def test_bad_input_is_refused_by_name():
    with pytest.raises(TypeError, match="texts must be a sequence of strings"):
        keyword_reward("one text", KEYWORDS)
    with pytest.raises(TypeError, match="keywords must be a sequence"):
        keyword_reward(["a"], "шаг 1")
    with pytest.raises(ValueError, match="must not be empty strings"):
        keyword_reward(["a"], ["", "b"])
    with pytest.raises(TypeError, match="texts must be a sequence"):
        regex_reward("a", "a")
    with pytest.raises(re.error):
        regex_reward(["a"], "(")
    with pytest.raises(ValueError, match="tags must be names"):
        tag_format_reward(["a"], tags=[])
    with pytest.raises(ValueError, match="one per text, got 2 for 1"):
        exact_answer_reward(["a"], ["a", "b"])
    with pytest.raises(TypeError, match="lengths must be one of int64"):
        overlong_penalty(torch.ones(2), 10)
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        overlong_penalty(torch.tensor([1]), 0)
    with pytest.raises(ValueError, match=r"buffer must be in \[0, max_length=10\], got 11"):
        overlong_penalty(torch.tensor([1]), 10, 11)
