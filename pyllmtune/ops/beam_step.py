"""beam_step: the best continuations of the beams of each item, from one read of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyllmtune import _backend, _checks, _ops
from pyllmtune._backend import Backend
from pyllmtune._filters import split_parameter
from pyllmtune.ops.sample import as_allowed
from pyllmtune.reference import beam_step as reference


class BeamStep(NamedTuple):
    """Candidates of each item, best first; with groups, those of group 0, then of group 1, ...

    scores: ``[batch, num_candidates]``, the beam's score plus the token's log-prob, in nats;
        float32 (float64 for float64 logits). An empty slot has score -inf, token -1, parent 0.
    tokens: ``[batch, num_candidates]`` int64.
    parents: ``[batch, num_candidates]`` int64, the beam of the item that the token continues.
    is_eos: ``[batch, num_candidates]`` bool, the token is one of ``eos_token_id``.
    valid: ``[batch, num_beams]`` bool, false where a beam was dropped: its row holds NaN or +inf or
        allows nothing, or its score is NaN or +inf. A finished beam is not looked at: true.
    """

    scores: Tensor
    tokens: Tensor
    parents: Tensor
    is_eos: Tensor
    valid: Tensor


def beam_step(
    logits: Tensor,
    beam_scores: Tensor,
    *,
    num_beams: int,
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    num_candidates: int | None = None,
    allowed: Tensor | None = None,
    renormalize: bool = True,
    widths: Tensor | None = None,
    num_groups: int = 1,
    diversity_penalty: float = 0.0,
    backend: Backend = "auto",
) -> BeamStep:
    """The ``num_candidates`` best of ``beam_scores + log_softmax(logits / temperature)`` over all
    beams and tokens of an item, without a log-softmax in memory and without a sort.

    A candidate is ahead of another if its score is higher; of equal scores, if its beam is lower;
    in one beam, if its logit is higher, then if its id is lower. Results have the same bits for any
    batch and number of threads; another backend may round a score otherwise, and so order two beams
    otherwise whose scores differ by less. See docs/beam_step.md.

    A beam of score -inf is finished (or not begun): its logits may hold anything, it contributes
    nothing. So the first step gives all but one beam of an item the score -inf. Hypotheses that end
    are the caller's: a candidate with ``is_eos`` goes to its list, the first ``num_beams`` others
    go on. There are always enough of them among ``num_candidates``, since a beam has no more
    candidates that end than there are EOS ids.

    Args:
        logits: ``[batch, num_beams, V]`` or ``[batch * num_beams, V]``, float16, bfloat16, float32
            or float64, last axis contiguous. -inf means "not allowed".
        beam_scores: ``[batch, num_beams]`` or ``[batch * num_beams]``, summed log-probs.
        num_beams: beams of an item.
        eos_token_id: one id or several; marks candidates, changes none.
        temperature: positive scalar, or one per beam.
        num_candidates: of an item; None is ``num_beams`` times 2, or times 1 + the number of EOS
            ids if there are several.
        allowed: as in ``sample``: bool ``[V]`` or one row per beam, or int32 bits; what is not
            allowed may hold anything.
        renormalize: whether the softmax is over the allowed tokens alone; False leaves log-probs as
            they were without ``allowed``, as Transformers' processors do.
        widths: ``[batch]``, int64 or int32: item ``i`` uses its first ``widths[i]`` beams and gets
            ``num_candidates * widths[i] // num_beams`` candidates; its other slots are empty.
        num_groups: diverse beam search (Vijayakumar et al. 2016): beams in groups of
            ``num_beams / num_groups``, each with its own ``num_candidates / num_groups``
            candidates, found one group after another.
        diversity_penalty: what a group's candidate loses, for the order alone, each time that an
            earlier group goes on with the same token at this step; a group goes on with its first
            candidates that are not EOS, one a beam.
        backend: ``"auto"`` takes the fastest present; a named one is used or refused, never
            replaced.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value.

    >>> import torch
    >>> p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]])
    >>> out = beam_step(p.log(), torch.tensor([[0.6, 0.4]]).log(), num_beams=2, eos_token_id=0)
    >>> out.scores.exp()
    tensor([[0.3200, 0.3000, 0.1800, 0.1200]])
    >>> out.tokens, out.parents
    (tensor([[1, 0, 1, 2]]), tensor([[1, 0, 0, 0]]))
    """
    rows = as_beams(logits, num_beams)
    device, shape = logits.device, rows.shape[:2]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scores = of_beams("beam_scores", beam_scores, shape, device).detach().to(dtype)
    scalar, per_row = split_beam_temperature(temperature, shape, device)
    eos = as_ids(eos_token_id, device)
    num_candidates = candidates_of(num_candidates, num_beams, eos)
    _check_groups(num_beams, num_candidates, num_groups, diversity_penalty, widths)
    limits = {"off": num_beams, "dtype": torch.int64, "least": 0, "most": num_beams}
    if widths is not None and not isinstance(widths, Tensor):
        raise TypeError(f"widths must be a torch.Tensor [batch], got {type(widths).__name__}")
    remedy = f"in [0, num_beams={num_beams}]"
    _, widths = split_parameter(*("widths", widths, shape[:1], device), **limits, remedy=remedy)
    mask = as_allowed(allowed, logits.shape[:-1], logits.shape[-1], device)
    floor = _backend.resolve(backend, device, logits.dtype)
    run = reference.beam_step if floor == "reference" else _ops.handle("beam_step", floor)
    return BeamStep(
        *run(
            rows,
            scores.contiguous(),
            scalar,
            None if per_row is None else per_row.to(dtype).contiguous(),
            mask,
            bool(renormalize),
            widths,
            eos,
            num_candidates,
            num_groups,
            float(diversity_penalty),
        )
    )


def at_least_one(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def as_beams(logits: Tensor, num_beams: int) -> Tensor:
    """``[batch, num_beams, V]``, detached, from that or ``[batch * num_beams, V]``."""
    _checks.check_logits("logits", logits)
    at_least_one("num_beams", num_beams)
    lead, rows = logits.shape[:-1], logits.detach()
    if len(lead) == 2 and lead[1] == num_beams:
        return rows
    if len(lead) == 1 and lead[0] % num_beams == 0:
        return rows.unflatten(0, (-1, num_beams))
    raise ValueError(
        f"logits must be [batch, {num_beams}, V] or [batch * {num_beams}, V] for "
        f"num_beams={num_beams}, got {list(logits.shape)}"
    )


def candidates_of(num_candidates: int | None, num_beams: int, eos: Tensor | None) -> int:
    """By default as many as leave ``num_beams`` that have not ended."""
    if num_candidates is None:
        return num_beams * max(2, 1 + (0 if eos is None else eos.numel()))
    at_least_one("num_candidates", num_candidates)
    return num_candidates


def split_beam_temperature(
    temperature: float | Tensor, shape: torch.Size, device: torch.device
) -> tuple[float, Tensor | None]:
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        temperature = of_beams("temperature", temperature, shape, device)
    return _checks.split_temperature(temperature, shape, device)


def of_beams(name: str, value: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """``[batch, num_beams]`` from that or ``[batch * num_beams]``."""
    _checks.check_tensor(name, value, _checks.FLOATS)
    batch, num_beams = shape
    if tuple(value.shape) not in ((batch, num_beams), (batch * num_beams,)):
        raise ValueError(
            f"{name} must be [{batch}, {num_beams}] or [{batch * num_beams}], one value per beam; "
            f"got {list(value.shape)}"
        )
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, logits are on {device}; move it with .to()")
    return value.reshape(batch, num_beams)


def as_ids(ids: int | Sequence[int] | Tensor | None, device: torch.device) -> Tensor | None:
    if ids is None:
        return None
    if isinstance(ids, Tensor):
        _checks.check_tensor("eos_token_id", ids, (torch.int64, torch.int32))
        if ids.dim() > 1:
            raise ValueError(f"eos_token_id must be one id or [ids], got {list(ids.shape)}")
        return ids.to(device).long().reshape(-1)
    listed = [ids] if isinstance(ids, int) else list(ids)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in listed):
        raise TypeError(f"eos_token_id must be an integer or several, got {ids!r}")
    return torch.tensor(listed, dtype=torch.int64, device=device)


def _check_groups(
    num_beams: int,
    num_candidates: int,
    num_groups: int,
    diversity_penalty: float,
    widths: Tensor | None,
) -> None:
    at_least_one("num_groups", num_groups)
    if num_beams % num_groups or num_candidates % num_groups:
        raise ValueError(
            "num_groups must divide num_beams and num_candidates, got "
            f"{num_groups} for {num_beams} and {num_candidates}"
        )
    if not 0.0 <= diversity_penalty < float("inf"):
        raise ValueError(f"diversity_penalty must be finite, 0 or more; got {diversity_penalty}")
    if num_groups > 1 and widths is not None:
        raise ValueError("widths are for one group; leave out widths or num_groups")


def _fake(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    batch, beams, _ = logits.shape
    num_candidates = args[7]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    kinds = (dtype, torch.int64, torch.int64, torch.bool)
    results = [logits.new_empty((batch, num_candidates), dtype=kind) for kind in kinds]
    return *results, logits.new_empty((batch, beams), dtype=torch.bool)


def _register(floor: str) -> None:
    name = f"{_ops.NAMESPACE}::{_ops.op_name('beam_step', floor)}"
    torch.library.register_fake(name, _fake, lib=_ops.LIBRARY)


_ops.for_every_floor(_register)
