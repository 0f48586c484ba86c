"""Transformers' warpers and ``filter_logits``: one in place of the other."""

from __future__ import annotations

import math

from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pyllmtune.ops.filter_logits import filter_logits

# in the order in which generate applies them, with the argument of filter_logits
WARPERS = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}


class FilterLogits(LogitsProcessor):
    """``filter_logits`` as a logits processor: temperature, top-k, top-p, min-p in one pass, in
    place of transformers' four warpers.

    Of logits that tie at rank k exactly ``top_k`` stay; transformers keeps all of them.

    >>> import torch
    >>> FilterLogits(top_k=1)(None, torch.tensor([[1.0, 3.0]]))
    tensor([[-inf, 3.]])
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
    ) -> None:
        self.filters = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
        }

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        return filter_logits(scores, **self.filters)


def split_warpers(
    processors: LogitsProcessorList,
) -> tuple[LogitsProcessorList, dict[str, float | int]]:
    """What must run before, and the filters at the end as arguments of ``sample``."""
    rest, filters, place = list(processors), {}, len(WARPERS)
    while rest and type(rest[-1]) in WARPERS:
        warper, at = rest[-1], list(WARPERS).index(type(rest[-1]))
        plain = getattr(warper, "min_tokens_to_keep", 1) == 1
        if at >= place or not plain or getattr(warper, "filter_value", -math.inf) != -math.inf:
            break
        filters[WARPERS[type(warper)]] = getattr(warper, WARPERS[type(warper)])
        place = at
        rest.pop()
    return LogitsProcessorList(rest), filters
