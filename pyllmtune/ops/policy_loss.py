"""policy_loss: the clipped policy objective, its closed-form gradient and its metrics, in one pass
over the tokens.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyllmtune import _backend, _checks, _ops
from pyllmtune._backend import Backend
from pyllmtune._sequences import sequence_offsets
from pyllmtune.losses.config import PolicyLossConfig
from pyllmtune.losses.metrics import SIZE, PolicyLossMetrics
from pyllmtune.reference import policy_loss as reference

_DEFAULT = PolicyLossConfig()


class PolicyLossOutput(NamedTuple):
    """The loss, a 0-d tensor to call ``backward`` on, and the metrics, still on the device."""

    loss: Tensor
    metrics: PolicyLossMetrics


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    config: PolicyLossConfig = _DEFAULT,
    backend: Backend = "auto",
) -> PolicyLossOutput:
    """Policy loss of a batch of answers: padded ``[B, T]``, or packed ``[total]`` with
    ``cu_seqlens``.

    Differentiable in ``logprobs`` and ``entropy``; everything else is a constant of the update. The
    gradient is formed in the same pass as the loss. Padding, packing and permuting sequences change
    nothing. A selected token with anything that is not finite, in whichever input, is dropped from
    the loss and from every count, has gradient 0, and is counted in ``metrics``.

    Args:
        logprobs: log-probs of the sampled tokens under the policy, ``[B, T]`` or ``[total]``, any
            float dtype.
        old_logprobs: the same under the policy that is the base of the ratio.
        advantages: ``[B]``, one per sequence, or one per token.
        mask: true selects; of the shape of ``logprobs``. Masked tokens may hold anything.
        cu_seqlens: ``[B + 1]`` int, cumulative lengths starting at 0, for packed tensors.
        ref_logprobs: log-probs under the reference, needed when ``config.kl`` is not ``"none"``;
            also measured, when given, without it.
        entropy: per token, for the bonus and the metrics.
        weights: detached per-token factors on the policy term (truncated importance sampling and
            the like), of the shape of ``logprobs`` or broadcasting to it. A weight of 0 switches
            the policy term of a token off. The rule ``"vespo"`` makes them part of its ratio.
        normalizer: what the aggregated sum is divided by: a number, or a 0-d tensor on the device.
            None counts the valid tokens (``"token-mean"``) or the sequences that have one;
            ``"constant"`` and ``"length-weighted"`` need it. Micro-batches that share the
            normalizer of the large batch add up to its loss and gradient.
        config: level, rule, KL, entropy bonus, aggregation.
        backend: ``"auto"`` takes the fastest present; a named one is used or refused, never
            replaced.

    Returns:
        ``PolicyLossOutput(loss, metrics)``. A batch without a valid token has loss 0 and gradient
        0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, ``cu_seqlens`` does not partition the tokens, a term
            of the config lacks its input, or the normalizer is not positive.

    >>> import torch
    >>> old = torch.tensor([[-2.0, -1.0]])
    >>> out = policy_loss(old + torch.tensor([[0.0, 1.0]]), old, torch.tensor([1.0]))
    >>> out.loss  # -(1 + 1.2) / 2: the second ratio, e, is clipped
    tensor(-1.1000)
    >>> out.metrics.to_dict()["clip_high_fraction"]
    0.5
    """
    _checks.check_tensor("logprobs", logprobs, _checks.FLOATS)
    shape, device = logprobs.shape, logprobs.device
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    given = (old_logprobs, advantages, cu_seqlens, ref_logprobs, weights, normalizer)
    inputs = loss_inputs("logprobs", logprobs, dtype, *given, config)
    select = _checks.as_mask(mask, shape, device, "the shape of logprobs")
    if config.entropy_coef != 0.0 and entropy is None:
        raise ValueError(
            f"entropy_coef={config.entropy_coef} needs entropy=, the entropy of each token"
        )
    if entropy is not None:
        _checks.check_tensor("entropy", entropy, _checks.FLOATS)
        _checks.check_like("entropy", entropy, shape, device, "the shape of logprobs")
        entropy = entropy.to(dtype).reshape(-1).contiguous()
    loss, metrics = run_policy_loss(
        _backend.resolve(backend, device, dtype),
        logprobs.to(dtype).reshape(-1).contiguous(),
        None if select is None else select.reshape(-1).contiguous(),
        entropy,
        inputs,
        (config.choices, config.constants),
    )[:2]
    return PolicyLossOutput(loss, PolicyLossMetrics(metrics))


def run_policy_loss(
    floor: str,
    logprobs: Tensor,
    mask: Tensor | None,
    entropy: Tensor | None,
    inputs: LossInputs,
    numbers: tuple[list[int], list[float]],
) -> tuple[Tensor, ...]:
    """The operator, or the reference, on what was checked: loss, metrics, then what it saves."""
    run = reference.policy_loss if floor == "reference" else _ops.handle("policy_loss", floor)
    old, advantages, token_advantages, offsets, ref, weights, *normalizer = inputs
    return run(
        *(logprobs, old, advantages, token_advantages, offsets, mask),
        *(ref, entropy, weights, *normalizer, *numbers),
    )


class LossInputs(NamedTuple):
    """The constants of an update, checked and flat, as the operator takes them."""

    old_logprobs: Tensor
    advantages: Tensor
    token_advantages: bool
    offsets: Tensor
    ref_logprobs: Tensor | None
    weights: Tensor | None
    normalizer: float
    device_normalizer: Tensor | None


def loss_inputs(
    name: str,
    tokens: Tensor,
    dtype: torch.dtype,
    old_logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor | None,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    normalizer: float | Tensor | None,
    config: PolicyLossConfig,
) -> LossInputs:
    """``tokens``, called ``name`` in errors, has the shape of everything per token."""
    shape, device = tokens.shape, tokens.device
    offsets = sequence_offsets(name, tokens, cu_seqlens)
    sequences = offsets.shape[0] - 1

    def flat(word: str, value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        _checks.check_tensor(word, value, _checks.FLOATS)
        _checks.check_like(word, value, shape, device, f"the shape of {name}")
        return value.to(dtype).reshape(-1).contiguous()

    if isinstance(weights, Tensor) and weights.shape != shape:
        weights = _broadcast_weights(weights, shape, name)
    _checks.check_tensor("advantages", advantages, _checks.FLOATS)
    token_advantages = advantages.shape == shape
    if not token_advantages:
        of = f"one per sequence, or {list(shape)}, one per token"
        _checks.check_like("advantages", advantages, torch.Size((sequences,)), device, of)
    number, device_normalizer = _split_normalizer(normalizer, config, device, dtype)
    if config.kl != "none" and ref_logprobs is None:
        raise ValueError(f"kl={config.kl!r} needs ref_logprobs=, the log-probs under the reference")
    _checks.check_tensor("old_logprobs", old_logprobs, _checks.FLOATS)
    return LossInputs(
        flat("old_logprobs", old_logprobs),
        advantages.to(dtype).reshape(-1).contiguous(),
        token_advantages,
        offsets,
        flat("ref_logprobs", ref_logprobs),
        flat("weights", weights),
        number,
        device_normalizer,
    )


def _broadcast_weights(weights: Tensor, shape: torch.Size, name: str) -> Tensor:
    try:
        return weights.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"weights must have shape {list(shape)}, the shape of {name}, or broadcast to it; "
            f"got {list(weights.shape)}"
        ) from None


def _split_normalizer(
    normalizer: float | Tensor | None,
    config: PolicyLossConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[float, Tensor | None]:
    """The divisor as (number, None) or (0.0, 0-d tensor); (0.0, None) means: count."""
    if normalizer is None:
        if config.aggregation in ("constant", "length-weighted"):
            raise ValueError(
                f"aggregation={config.aggregation!r} needs normalizer=, the number to divide by"
            )
        return 0.0, None
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(
                f"normalizer must be a number or a 0-d tensor, got shape {list(normalizer.shape)}"
            )
        return 0.0, normalizer.detach().to(device, dtype).reshape(())
    if not 0 < normalizer < math.inf:
        raise ValueError(f"normalizer must be positive and finite, got {normalizer}")
    return float(normalizer), None


def _fake(logprobs: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    entropy = rest[6]
    grad_entropy = logprobs.new_empty(0) if entropy is None else torch.empty_like(entropy)
    return (
        logprobs.new_empty(()),
        logprobs.new_empty(SIZE, dtype=torch.float64),
        torch.empty_like(logprobs),
        grad_entropy,
        logprobs.new_empty(()),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, metrics, grad_logprobs, grad_entropy, scale = output
    ctx.mark_non_differentiable(metrics, grad_logprobs, grad_entropy, scale)
    ctx.save_for_backward(grad_logprobs, grad_entropy, scale)
    ctx.has_entropy = inputs[7] is not None
    ctx.inputs = len(inputs)


@once_differentiable
def _gradient(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad_logprobs, grad_entropy, scale = ctx.saved_tensors
    factor = grad_loss * scale
    grads: list[Tensor | None] = [None] * ctx.inputs
    grads[0] = grad_logprobs * factor
    if ctx.has_entropy:
        grads[7] = grad_entropy * factor
    return tuple(grads)


def _register(floor: str) -> None:
    name = f"{_ops.NAMESPACE}::{_ops.op_name('policy_loss', floor)}"
    torch.library.register_fake(name, _fake, lib=_ops.LIBRARY)
    _ops.register_autograd(name, _gradient, _save)


_ops.for_every_floor(_register)
