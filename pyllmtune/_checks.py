"""Argument checks shared by the ops. Each error names the argument, the value and the remedy."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

DEBUG_VARIABLE = "PYLLMTUNE_DEBUG"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError unless ``value`` is a tensor of one of ``dtypes``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be one of {names}, got {value.dtype}; convert it with .to()")


def check_like(name: str, value: Tensor, shape: torch.Size, device: torch.device, of: str) -> None:
    """Raise ValueError unless ``value`` has this shape and device; ``of`` says what they belong
    to.
    """
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, {of}; got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, {of} are on {device}; move it with .to()")


def check_logits(name: str, logits: Tensor) -> None:
    """Logits are ``[..., V]``: floating, at least one axis, V > 0, last axis contiguous."""
    check_tensor(name, logits, FLOATS)
    if logits.dim() == 0:
        raise ValueError(f"{name} must be [..., V], got a 0-d tensor")
    if logits.shape[-1] == 0:
        raise ValueError(
            f"{name} must have a vocabulary axis of at least 1, got {list(logits.shape)}"
        )
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous along its last axis, got strides {list(logits.stride())}; "
            "call .contiguous() first"
        )


def check_tokens(tokens: Tensor, logits: Tensor, mask: Tensor | None) -> None:
    """Token ids: integers of the leading shape of ``logits``; on the CPU also within the vocabulary
    where unmasked.
    """
    check_tensor("tokens", tokens, (torch.int64, torch.int32))
    check_like("tokens", tokens, logits.shape[:-1], logits.device, "the leading shape of logits")
    if torch.compiler.is_compiling() or tokens.numel() == 0:
        return
    if tokens.device.type != "cpu" and os.environ.get(DEBUG_VARIABLE) != "1":
        return  # no host sync on a GPU: the kernel turns such a row into NaN
    vocab = logits.shape[-1]
    low, high = (int(bound) for bound in tokens.aminmax())
    if low >= 0 and high < vocab:
        return
    outside = (tokens < 0) | (tokens >= vocab)
    if mask is not None:
        outside &= mask
    if outside.any():
        first = int(tokens[outside][0])
        raise ValueError(
            f"tokens must be in [0, {vocab}), got {first}; "
            "mask positions without a token with mask=, padding ids such as -100 are allowed there"
        )


def as_mask(mask: Tensor | None, shape: torch.Size, device: torch.device, of: str) -> Tensor | None:
    """``mask`` as bool: True or non-zero selects."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    check_like("mask", mask, shape, device, of)
    return mask if mask.dtype == torch.bool else mask != 0


def split_temperature(
    temperature: float | Tensor,
    shape: torch.Size,
    device: torch.device,
    *,
    zero: bool = False,
    gradient: bool = False,
) -> tuple[float, Tensor | None]:
    """A temperature as (scalar, None) or (1.0, one per row of ``shape``, float): positive, or with
    ``zero`` at least 0; it may require grad with ``gradient``.
    """
    bound = "at least 0" if zero else "positive"

    def good(low: float, high: float) -> bool:
        return (low >= 0.0 if zero else low > 0.0) and high < math.inf

    if not isinstance(temperature, Tensor):
        value = float(temperature)
        if not good(value, value):
            raise ValueError(f"temperature must be {bound} and finite, got {value}")
        return value, None
    check_tensor("temperature", temperature, FLOATS)
    if temperature.requires_grad and not gradient:
        raise ValueError(
            "temperature requires grad, but this op has no gradient in it; "
            "pass temperature.detach()"
        )
    if temperature.dim() == 0:
        temperature = temperature.to(device).expand(shape)
    check_like("temperature", temperature, shape, device, "the leading shape of logits")
    if device.type == "cpu" and not torch.compiler.is_compiling() and temperature.numel():
        low, high = (float(value) for value in temperature.detach().aminmax())
        if not good(low, high):
            raise ValueError(
                f"temperature must be {bound} and finite in every row, got {low} to {high}"
            )
    dtype = torch.float64 if temperature.dtype == torch.float64 else torch.float32
    return 1.0, temperature.to(dtype)
