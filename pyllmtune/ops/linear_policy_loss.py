"""linear_policy_loss: the lm_head and the policy loss in one node, in three matmuls, not four."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyllmtune import _ops
from pyllmtune._backend import Backend
from pyllmtune.losses.config import PolicyLossConfig
from pyllmtune.losses.metrics import SIZE, PolicyLossMetrics
from pyllmtune.ops import linear_policy_blocks as blocks
from pyllmtune.ops import linear_tiles as tiles
from pyllmtune.ops.linear_token_logprobs import (
    check_workspace,
    head_arguments,
    keeps_logits,
    linear_token_logprobs,
)
from pyllmtune.ops.policy_loss import PolicyLossOutput, loss_inputs, policy_loss, run_policy_loss
from pyllmtune.reference import linear_policy_loss as reference

_DEFAULT = PolicyLossConfig()


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    config: PolicyLossConfig = _DEFAULT,
    workspace_bytes: int | None = None,
    backend: Backend = "auto",
) -> PolicyLossOutput:
    """``policy_loss`` of ``linear_token_logprobs``, with its entropy, as one node whose gradients
    are formed in forward, from the logits that it has just made.

    Differentiable in ``hidden``, ``weight`` and ``bias``. Logits are made a chunk of rows at a
    time, and once: three matmuls for forward and backward, where the two functions one after the
    other take four. A loss that needs whole sequences (every level but ``"token"``, the
    aggregations ``"seq-mean-token-mean"`` and ``"length-weighted"``) can do so only if all rows fit
    in the workspace together; otherwise, and where no gradient is wanted, the two functions run.

    Masked rows are left out of every matmul, rows without a gradient (clipped, advantage 0) out of
    two. The gradients wait for backward in the dtype of the operands (float16: in float32), which
    multiplies them by the upstream gradient.

    Args:
        hidden: ``[B, T, D]`` padded, or ``[total, D]`` packed with ``cu_seqlens``; float16,
            bfloat16, float32 or float64. The state that predicts ``tokens`` at the same place.
        weight: ``[V, D]``, the lm_head, in the dtype of ``hidden``.
        tokens: ``[B, T]`` or ``[total]``, the sampled tokens, int64 or int32.
        old_logprobs: of the shape of ``tokens``, as every argument per token.
        advantages: ``[B]``, one per sequence, or one per token.
        mask: true selects. Masked tokens and their hidden states may hold anything.
        bias: as of ``linear_token_logprobs``, as ``temperature``, ``logit_scale`` and ``softcap``.
        temperature: positive scalar, or one per token.
        logit_scale: multiplies the logits.
        softcap: bound of the logits.
        cu_seqlens: as of ``policy_loss``, as ``ref_logprobs``, ``weights``, ``normalizer`` and
            ``config``.
        ref_logprobs: log-probs under the reference, where ``config.kl`` needs them.
        weights: detached factors on the policy term.
        normalizer: what the sum is divided by; None counts.
        config: the loss; ``entropy_coef`` takes the head's entropy.
        workspace_bytes: bound of the memory for logits and tiles. The default holds the logits of
            512 rows (of 4,096 on a GPU). With more rows than fit, the gradient of ``weight`` is
            also held once in float32.
        backend: ``"auto"`` takes the fastest present; a named one is used or refused, never
            replaced.

    Returns:
        ``PolicyLossOutput(loss, metrics)``. A batch without a valid token has loss 0 and gradient
        0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: as of ``linear_token_logprobs`` and ``policy_loss``.

    >>> import torch
    >>> hidden, weight = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    >>> old = torch.tensor([[-0.6931]])
    >>> out = linear_policy_loss(hidden, weight, torch.tensor([[1]]), old, torch.tensor([1.0]))
    >>> out.loss  # logits 3 and 1: the probability went from 1/2 to 0.1192
    tensor(-0.2384)
    """
    if hasattr(weight, "placements"):  # a DTensor
        scores = linear_token_logprobs(
            hidden,
            weight,
            tokens,
            bias=bias,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            mask=mask,
            workspace_bytes=workspace_bytes,
            backend=backend,
        )
        return policy_loss(
            scores.logprobs,
            old_logprobs,
            advantages,
            mask,
            cu_seqlens=cu_seqlens,
            ref_logprobs=ref_logprobs,
            entropy=scores.entropy,
            weights=weights,
            normalizer=normalizer,
            config=config,
            backend=backend,
        )
    given = (bias, temperature, logit_scale, softcap, mask, backend)
    floor, head = head_arguments(hidden, weight, tokens, *given)
    rows, device = head[0], hidden.device
    inputs = loss_inputs(
        *("tokens", tokens, tiles.accumulator(rows.dtype), old_logprobs, advantages, cu_seqlens),
        *(ref_logprobs, weights, normalizer, config),
    )
    two_space = check_workspace(workspace_bytes, device, rows.dtype)
    shape = (weight.shape[0], device, rows.dtype)
    space = blocks.default_workspace(*shape) if workspace_bytes is None else workspace_bytes
    numbers = (config.choices, config.constants)
    wanted = [
        torch.is_grad_enabled() and value is not None and value.requires_grad
        for value in (rows, head[1], head[3])
    ]
    size = blocks.chunk_rows(rows.shape[0], *shape, space, config.choices)
    if floor == "reference":
        loss, metrics = reference.linear_policy_loss(*head, space, *inputs, *numbers)
    elif size > 0 and any(wanted):
        run = _ops.handle("linear_policy_loss", floor)
        loss, metrics = run(*head, space, *inputs, *numbers, *wanted)[:2]
    else:
        run, keeps = _ops.handle("linear_token_logprobs", floor), keeps_logits(*head[:2])
        logprobs, entropy = run(*head, two_space, keeps)[:2]
        loss, metrics = run_policy_loss(floor, logprobs, head[-1], entropy, inputs, numbers)[:2]
    return PolicyLossOutput(loss, PolicyLossMetrics(metrics))


def _fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wide = tiles.accumulator(hidden.dtype)
    dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    of_hidden, of_weight, of_bias = rest[-3:]
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(SIZE, dtype=torch.float64),
        hidden.new_empty((hidden.shape[0] if of_hidden else 0, hidden.shape[1]), dtype=dtype),
        weight.new_empty(weight.shape if of_weight else (0,), dtype=dtype),
        weight.new_empty(weight.shape[:1] if of_bias else (0,), dtype=wide),
    )


def _fake_times(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(grad, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, metrics, *grads = output
    ctx.mark_non_differentiable(metrics, *grads)
    ctx.save_for_backward(*grads)
    ctx.count, ctx.dtype, ctx.wanted = len(inputs), inputs[0].dtype, inputs[-3:]


def _register(floor: str) -> None:
    @once_differentiable
    def gradient(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        times = _ops.handle("linear_policy_loss_backward", floor)
        grads: list[Tensor | None] = [None] * ctx.count
        wide = tiles.accumulator(ctx.dtype)
        for place, grad, wanted, dtype in zip(
            (0, 1, 3), ctx.saved_tensors, ctx.wanted, (ctx.dtype, ctx.dtype, wide), strict=True
        ):
            if wanted:
                grads[place] = times(grad, grad_loss, dtype)
        return tuple(grads)

    name, backward = (
        f"{_ops.NAMESPACE}::{_ops.op_name(word, floor)}"
        for word in ("linear_policy_loss", "linear_policy_loss_backward")
    )
    torch.library.register_fake(name, _fake, lib=_ops.LIBRARY)
    torch.library.register_fake(backward, _fake_times, lib=_ops.LIBRARY)
    _ops.register_autograd(name, gradient, _save)


_ops.for_every_floor(_register)
