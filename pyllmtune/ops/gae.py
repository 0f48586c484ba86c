"""gae: generalised advantage estimation and returns of padded or packed sequences."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyllmtune import _backend, _checks, _ops
from pyllmtune._backend import Backend
from pyllmtune._sequences import sequence_offsets
from pyllmtune.reference import gae as reference


class GaeOutput(NamedTuple):
    """Per token, of the shape of the rewards, float32 (float64 for float64); without gradient."""

    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    terminated: Tensor | None = None,
    carry_masked: bool = True,
    backend: Backend = "auto",
) -> GaeOutput:
    """Generalised advantage estimation (Schulman et al. 2016), in one pass over the tokens.

    ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lam A_{t+1}``, and the return
    ``A_t + V_t``, the target of the critic. Advantages are targets, not functions: nothing here has
    a gradient. They are not whitened; ``whiten`` does that.

    Args:
        rewards: ``[B, T]``, or packed ``[total]`` with ``cu_seqlens``, any float dtype.
        values: the critic's values, of the shape of ``rewards``, or ``[B, T + 1]`` with the value
            after the end in the last column.
        mask: true selects; of the shape of ``rewards``. Masked tokens may hold anything; their
            results are 0.
        gamma: discount in [0, 1], or one per sequence ``[B]``.
        lam: weight of later deltas in [0, 1], or one per sequence ``[B]`` (VAPO).
        cu_seqlens: ``[B + 1]`` int, cumulative lengths starting at 0, for packed tensors.
        bootstrap: ``[B]``, the value after the end of each sequence, when ``values`` does not hold
            it: for sequences that were cut off (truncated). Without either it is 0.
        terminated: bool. ``[B]``: sequences that came to their own end; the value after it is 0. Of
            the shape of ``rewards``: an episode ends with this token and the next one begins
            another; nothing flows back across. (For one that is cut off within a row, add ``gamma``
            times the value of its last state to the reward as well.)
        carry_masked: masked tokens are passed over, as if the sequence consisted of the selected
            ones (verl, AReaL: answers of tools between turns). False: they are steps without reward
            and value, which discount and cut the value (TRL, OpenRLHF). Without masked tokens
            before selected ones, and without a bootstrap, the two agree.
        backend: ``"auto"`` takes the fastest present; a named one is used or refused, never
            replaced.

    Returns:
        ``GaeOutput(advantages, returns)``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, ``cu_seqlens`` does not partition the tokens, the
            bootstrap is given twice, or ``gamma`` or ``lam`` is not in [0, 1] (tensors of them are
            looked at on the CPU, outside ``torch.compile``).

    >>> import torch
    >>> out = gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]]), lam=1.0)
    >>> out.advantages  # the return minus the value
    tensor([[0.5000, 0.7500]])
    >>> out.returns
    tensor([[1., 1.]])
    """
    _checks.check_tensor("rewards", rewards, _checks.FLOATS)
    _checks.check_tensor("values", values, _checks.FLOATS)
    shape, device = rewards.shape, rewards.device
    dtype = torch.float64 if torch.float64 in (rewards.dtype, values.dtype) else torch.float32
    offsets = sequence_offsets("rewards", rewards, cu_seqlens)
    batch = torch.Size((offsets.shape[0] - 1,))
    values, bootstrap = _split_bootstrap(values, bootstrap, shape, batch, device)
    select = _checks.as_mask(mask, shape, device, "the shape of rewards")
    if terminated is not None:
        _checks.check_tensor("terminated", terminated, (torch.bool,))
        if terminated.shape != shape:
            of = f"one per sequence, or {list(shape)}, one per token"
            _checks.check_like("terminated", terminated, batch, device, of)
            bootstrap = None if bootstrap is None else torch.where(terminated, 0, bootstrap)
            terminated = None
    discounts = [
        _split_discount(name, value, batch, device, dtype)
        for name, value in (("gamma", gamma), ("lam", lam))
    ]

    def flat(value: Tensor) -> Tensor:
        return value.detach().to(dtype).reshape(-1).contiguous()

    def flags(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.reshape(-1).contiguous()

    floor = _backend.resolve(backend, device, dtype)
    run = reference.gae if floor == "reference" else _ops.handle("gae", floor)
    advantages, returns = run(
        flat(rewards),
        flat(values),
        offsets,
        flags(select),
        flags(terminated),
        None if bootstrap is None else flat(bootstrap),
        *(scalar for scalar, _ in discounts),
        *(per_sequence for _, per_sequence in discounts),
        carry_masked,
    )
    return GaeOutput(advantages.reshape(shape), returns.reshape(shape))


def _split_bootstrap(
    values: Tensor,
    bootstrap: Tensor | None,
    shape: torch.Size,
    batch: torch.Size,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """Values of the tokens, and the value after the end of each sequence or None."""
    if len(shape) == 2 and values.shape == (shape[0], shape[1] + 1):
        if bootstrap is not None:
            raise ValueError(
                f"values is [B, T + 1], {list(values.shape)}, so its last column is the value "
                "after the end; leave bootstrap=None, or give values of the shape of rewards"
            )
        values, bootstrap = values[:, :-1], values[:, -1]
    of = "the shape of rewards" + (", or one column more" if len(shape) == 2 else "")
    _checks.check_like("values", values, shape, device, of)
    if bootstrap is not None:
        _checks.check_tensor("bootstrap", bootstrap, _checks.FLOATS)
        _checks.check_like("bootstrap", bootstrap, batch, device, "one per sequence")
    return values, bootstrap


def _split_discount(
    name: str, value: float | Tensor, batch: torch.Size, device: torch.device, dtype: torch.dtype
) -> tuple[float, Tensor | None]:
    """(scalar, None) or (1.0, one per sequence), in [0, 1]."""
    if not isinstance(value, Tensor):
        number = float(value)
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {number}")
        return number, None
    _checks.check_tensor(name, value, _checks.FLOATS)
    if value.dim() == 0:
        value = value.to(device).expand(batch)
    _checks.check_like(name, value, batch, device, "one per sequence")
    if device.type == "cpu" and not torch.compiler.is_compiling() and value.numel():
        low, high = (float(bound) for bound in value.detach().aminmax())
        if not (low >= 0.0 and high <= 1.0) or math.isnan(low):
            raise ValueError(f"{name} must be in [0, 1] in every sequence, got {low} to {high}")
    return 1.0, value.detach().to(dtype).contiguous()


def _fake(rewards: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rewards), torch.empty_like(rewards)


def _register(floor: str) -> None:
    name = f"{_ops.NAMESPACE}::{_ops.op_name('gae', floor)}"
    torch.library.register_fake(name, _fake, lib=_ops.LIBRARY)


_ops.for_every_floor(_register)
