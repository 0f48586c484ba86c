"""The tile kernels of linear_token_logprobs on the emulated floor; the matmuls between them are
those of the CPU.
"""

from __future__ import annotations

from torch import Tensor

from .emulated_floor import _dtype_code, _flat, library


def _tile(
    logits: Tensor,
    first: int,
    scale: float,
    softcap: float,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
) -> tuple:
    _dtype_code(logits)  # refuses float64
    rows, columns = logits.shape
    return (
        *(logits, rows, logits.stride(0), columns, first, float(scale), float(softcap)),
        *(_flat(bias), _flat(tokens), float(temperature), _flat(row_temperature)),
    )


def linear_token_logprobs_tile(*args) -> None:
    word = "linear_token_logprobs_tile"
    library("linear_token_logprobs").call(word, *_tile(*args[:8]), *args[8:])


def linear_token_logprobs_tile_backward(*args) -> None:
    word, grad = "linear_token_logprobs_tile_backward", args[-1]
    rest = (*args[8:10], _dtype_code(grad), grad, grad.stride(0))
    library("linear_token_logprobs").call(word, *_tile(*args[:8]), *rest)
