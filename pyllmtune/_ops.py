"""The operators: every schema in one place, and the floors that implement them.

Schemas are declared here, in Python, so that the operators exist even when nothing was compiled.
C++ and CUDA implement ``pyllmtune::<word>`` for their device; the Triton kernels implement
``pyllmtune::<word>_triton``. The fake kernel and the gradient are the same for every floor and live
in ``pyllmtune/ops/<word>.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "pyllmtune"

# logits [outer, inner, V] with unit last stride; tokens, mask and all results [outer, inner];
# stats [2, outer, inner]: the row's maximum and log sum e^((z - max)/T), for backward
_SCORE_INPUTS = "Tensor tokens, float temperature, Tensor? row_temperature, Tensor? mask"
_SCORE_GRADIENT = (
    _SCORE_INPUTS + ", Tensor entropy, Tensor stats,"
    " Tensor grad_logprobs, Tensor grad_entropy, Tensor grad_logsumexp"
)

SCHEMAS = {
    "token_logprobs": f"(Tensor logits, {_SCORE_INPUTS}, bool inplace_backward)"
    " -> (Tensor logprobs, Tensor entropy, Tensor logsumexp, Tensor stats)",
    "token_logprobs_backward": f"(Tensor logits, {_SCORE_GRADIENT}) -> Tensor",
    "token_logprobs_backward_inplace": f"(Tensor(a!) logits, {_SCORE_GRADIENT}) -> ()",
    # per-token tensors are flat [total], sequence i is offsets[i]:offsets[i + 1]; advantages are
    # [total] or [sequences]; normalizer 0 means: count tokens or sequences; the gradients returned
    # are still to be multiplied by `scale`
    "policy_loss": "(Tensor logprobs, Tensor old_logprobs,"
    " Tensor advantages, bool token_advantages, Tensor offsets, Tensor? mask,"
    " Tensor? ref_logprobs, Tensor? entropy, Tensor? weights,"
    " float normalizer, Tensor? device_normalizer, int level, int rule, int kl, int aggregation,"
    " float low, float high, float cap, float kl_coef, float entropy_coef)"
    " -> (Tensor loss, Tensor metrics, Tensor grad_logprobs, Tensor grad_entropy, Tensor scale)",
}

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_registrars: list[Callable[[str], None]] = []
_floors: list[str] = []


def op_name(word: str, floor: str) -> str:
    """Name of an operator on a floor: C++ and CUDA share one, each other floor has its own."""
    return word if floor in ("cpp", "cuda") else f"{word}_{floor}"


def handle(word: str, floor: str) -> Any:
    """The callable operator of one floor."""
    return getattr(getattr(torch.ops, NAMESPACE), op_name(word, floor)).default


def add_floor(floor: str) -> None:
    """Declare every operator for a floor and attach the fakes and gradients registered so far and
    later.
    """
    for word, schema in SCHEMAS.items():
        # strides are part of the contract: the last axis is contiguous, rows may be strided
        LIBRARY.define(op_name(word, floor) + schema, tags=(torch.Tag.needs_fixed_stride_order,))
    _floors.append(floor)
    for registrar in _registrars:
        registrar(floor)


def for_every_floor(registrar: Callable[[str], None]) -> None:
    """Run ``registrar(floor)``, which attaches a fake or a gradient, for each floor, present and
    future.
    """
    _registrars.append(registrar)
    for floor in _floors:
        registrar(floor)


add_floor("cpp")
add_floor("triton")
