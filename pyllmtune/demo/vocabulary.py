"""The token alphabet: characters, and each phrase of reasoning as one token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

PAD = 0
NEWLINE = 1  # ends an answer, and begins a prompt
STEP_1, STEP_2, THEREFORE = " step 1: ", ", step 2: ", ", therefore "
KEYWORDS = ("step 1", "step 2", "therefore")  # what the second reward counts

TOKENS = ("", "\n", *"0123456789+-=", STEP_1, STEP_2, THEREFORE)
_IDS = {text: token for token, text in enumerate(TOKENS) if text}
_PATTERN = re.compile("|".join(re.escape(text) for text in sorted(_IDS, key=len, reverse=True)))


def encode(text: str) -> list[int]:
    """Token ids of ``text``, longest token first.

    >>> encode("2+2=4")
    [4, 12, 4, 14, 6]
    """
    pieces = _PATTERN.findall(text)
    if "".join(pieces) != text:
        raise ValueError(f"text must be made of {TOKENS[1:]}, got {text!r}")
    return [_IDS[piece] for piece in pieces]


def decode(tokens: Iterable[int]) -> str:
    """Text of token ids; padding is the empty string."""
    return "".join(TOKENS[token] for token in tokens)


def decode_rows(rows: Sequence[Sequence[int]]) -> list[str]:
    """Text of each row, up to and including its first newline."""
    return [text[: text.find("\n") + 1] or text for text in map(decode, rows)]
