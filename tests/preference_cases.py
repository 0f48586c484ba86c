"""Pairs of answers for the preference tests, and the two functions that all formulas use."""

from __future__ import annotations

import torch
from torch import Tensor

PAIRS = 7
BETA = 0.3


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def log_sigmoid(x: Tensor) -> Tensor:
    return torch.log(sigmoid(x))


def batch(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Log-probs of answers of 3 to 9 tokens, and what belongs to them."""
    lengths = [torch.randint(3, 10, (PAIRS,)) for _ in range(2)]
    logprobs = [-n * (0.1 + torch.rand(PAIRS, dtype=torch.float64)) for n in (*lengths, *lengths)]
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    values = {name: value.to(dtype) for name, value in zip(names, logprobs, strict=True)}
    return values | {"chosen_n": lengths[0], "rejected_n": lengths[1]}
