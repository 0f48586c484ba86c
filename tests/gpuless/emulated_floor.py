"""A floor named "emulated": the CUDA kernels on CPU tensors, one fiber for each CUDA thread.

    emulated_floor.install()      # once in a process; again does nothing
    token_logprobs(logits, tokens, backend="emulated")

It has the schemas, the fakes and the gradients of every floor, so the tests of the ops run on it as
they are. What it runs is what the .cu files launch; only their checks are not executed.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pyllmtune import _backend, _ops
from pyllmtune.losses.metrics import SIZE
from tests import on_gpu

from .emulator import EmulatedLibrary, load

FLOOR = "emulated"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def library(word: str) -> EmulatedLibrary:
    """The driver of one op, in the flavour of this process."""
    return load([f"tests/gpuless/drivers/{word}.cpp"])


def _flat(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def _dtype_code(logits: Tensor) -> int:
    if logits.dtype not in _DTYPES:
        raise ValueError(f"backend='emulated' has no kernel for {logits.dtype}")
    return _DTYPES[logits.dtype]


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    mask: Tensor | None,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outer, inner, vocab = logits.shape
    logprobs, entropy, logsumexp = (torch.empty(outer, inner) for _ in range(3))
    stats = torch.empty(2, outer, inner)
    library("token_logprobs").call(
        "token_logprobs",
        _dtype_code(logits),
        logits,
        outer * inner,
        inner,
        vocab,
        *logits.stride()[:2],
        _flat(tokens),
        float(temperature),
        _flat(row_temperature),
        _flat(mask),
        logprobs,
        entropy,
        logsumexp,
        stats,
    )
    return logprobs, entropy, logsumexp, stats


def _gradient_into(
    grad: Tensor,
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    mask: Tensor | None,
    *per_row: Tensor,
) -> None:
    outer, inner, vocab = logits.shape
    library("token_logprobs").call(
        "token_logprobs_backward",
        _dtype_code(logits),
        logits,
        *logits.stride()[:2],
        grad,
        *grad.stride()[:2],
        outer * inner,
        inner,
        vocab,
        _flat(tokens),
        float(temperature),
        _flat(row_temperature),
        _flat(mask),
        *map(_flat, per_row),
    )


def token_logprobs_backward(logits: Tensor, *rest: Tensor) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _gradient_into(grad, logits, *rest)
    return grad


def token_logprobs_backward_inplace(logits: Tensor, *rest: Tensor) -> None:
    _gradient_into(logits, logits, *rest)


def temperature_softmax(
    logits: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    log: bool,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(logits.shape, dtype=dtype)
    temperature_softmax_out(logits, temperature, row_temperature, log, out)
    return out


def temperature_softmax_out(
    logits: Tensor, temperature: float, row_temperature: Tensor | None, log: bool, out: Tensor
) -> None:
    outer, inner, vocab = logits.shape
    library("temperature_softmax").call(
        "temperature_softmax",
        *map(_dtype_code, (logits, out)),
        logits,
        *logits.stride()[:2],
        out,
        *out.stride()[:2],
        outer * inner,
        inner,
        vocab,
        float(temperature),
        _flat(row_temperature),
        int(log),
    )


def temperature_softmax_backward(
    grad: Tensor,
    output: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    log: bool,
    dtype: torch.dtype,
    temperature_gradient: bool,
) -> tuple[Tensor, Tensor]:
    outer, inner, vocab = output.shape
    grad_logits = torch.empty(output.shape, dtype=dtype)
    grad_temperature = torch.empty((outer, inner) if temperature_gradient else (0, 0))
    library("temperature_softmax").call(
        "temperature_softmax_backward",
        *map(_dtype_code, (grad_logits, output)),
        grad,
        *grad.stride()[:2],
        output,
        *output.stride()[:2],
        grad_logits,
        *grad_logits.stride()[:2],
        grad_temperature if temperature_gradient else None,
        outer * inner,
        inner,
        vocab,
        float(temperature),
        _flat(row_temperature),
        int(log),
    )
    return grad_logits, grad_temperature


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    token_advantages: bool,
    offsets: Tensor,
    mask: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    weights: Tensor | None,
    normalizer: float,
    device_normalizer: Tensor | None,
    choices: list[int],
    constants: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    total, sequences = logprobs.shape[0], offsets.shape[0] - 1
    loss, scale = torch.empty(()), torch.empty(())
    metrics, rows = (torch.empty(size, dtype=torch.float64) for size in (SIZE, sequences * SIZE))
    grad_logprobs = torch.empty(total)
    grad_entropy = torch.empty(0 if entropy is None else total)
    library("policy_loss").call(
        "policy_loss",
        total,
        sequences,
        *map(_flat, (logprobs, old_logprobs, advantages)),
        token_advantages,
        *map(_flat, (offsets, mask, ref_logprobs, entropy, weights)),
        float(normalizer),
        device_normalizer,
        torch.tensor(choices),
        torch.tensor(constants, dtype=torch.float64),
        loss,
        metrics,
        grad_logprobs,
        None if entropy is None else grad_entropy,
        scale,
        rows,
    )
    return loss, metrics, grad_logprobs, grad_entropy, scale


def gae(
    rewards: Tensor, values: Tensor, offsets: Tensor, *rest: float | Tensor | None
) -> tuple[Tensor, Tensor]:
    mask, terminated, bootstrap, gamma, lam, sequence_gamma, sequence_lam, carry_masked = rest
    total, sequences = rewards.shape[0], offsets.shape[0] - 1
    advantages, returns = torch.empty(total), torch.empty(total)
    library("gae").call(
        "gae",
        total,
        sequences,
        *map(_flat, (rewards, values, offsets, mask, terminated, bootstrap)),
        float(gamma),
        float(lam),
        *map(_flat, (sequence_gamma, sequence_lam)),
        carry_masked,
        advantages,
        returns,
    )
    return advantages, returns


@functools.cache
def install() -> None:
    """Adds the floor to the ones that a call can name."""
    if on_gpu.WANTED:  # the same kernels, on the device
        return on_gpu.install()
    from . import emulated_decoding as decoding  # they use what is above
    from . import emulated_divergence as divergence
    from . import emulated_kept as kept
    from . import emulated_linear as linear

    _ops.add_floor(FLOOR)
    kernels = (
        token_logprobs,
        token_logprobs_backward,
        token_logprobs_backward_inplace,
        kept.kept_logits,
        kept.kept_logits_backward_hidden,
        kept.kept_logits_backward_weight,
        kept.kept_token_logprobs,
        kept.kept_token_logprobs_backward,
        temperature_softmax,
        temperature_softmax_out,
        temperature_softmax_backward,
        decoding.filter_logits,
        decoding.filter_logits_out,
        decoding.filter_logits_backward,
        decoding.sample,
        divergence.kl_divergence,
        divergence.kl_divergence_backward,
        decoding.beam_step,
        policy_loss,
        gae,
        linear.linear_token_logprobs_tile,
        linear.linear_token_logprobs_tile_backward,
    )
    for kernel in kernels:
        _ops.LIBRARY.impl(_ops.op_name(kernel.__name__, FLOOR), kernel, "CPU")
    _backend.extra_floors.append(FLOOR)
