"""What the Triton kernels share: block sizes, and the device they are launched on.

A block size follows from the length of a row and the dtype alone, never from the number of rows, so
a row has the same bits in any batch. (Whether rows are 16-byte aligned decides, through Triton's
layouts, the order of a sum: the same for all rows of a tensor.)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTOR_BYTES = 16  # the widest load of a thread
WARP = 32
MAX_WARPS = 8

INF = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# 2^-200 is 0 in float32: a finite stand-in for exponents of -inf, since 0 * -inf would be NaN
LOWEST_EXPONENT = tl.constexpr(-200.0)

# read once, as Triton reads it when a kernel is decorated
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def device_function(function: Callable) -> Any:
    """``triton.jit`` of a function that kernels call.

    Interpreted it is left as it is: the interpreter's wrapper patches all of triton.language again
    at each call, which takes longer than most of these functions.
    """
    return function if INTERPRETED.value else triton.jit(function)


def vector_size(dtype: torch.dtype) -> int:
    """Elements of one 16-byte load."""
    return VECTOR_BYTES // dtype.itemsize


def block_and_warps(length: int, dtype: torch.dtype, vectors: int) -> tuple[int, int]:
    """Elements of a block of at most ``vectors`` loads a thread, and its warps, for such a row."""
    warp_elements = WARP * vectors * vector_size(dtype)
    block = max(WARP, min(triton.next_power_of_2(length), MAX_WARPS * warp_elements))
    return block, max(1, block // warp_elements)


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool tensor as uint8, which kernels load without a conversion of pointer types."""
    return None if mask is None else mask.view(torch.uint8)
