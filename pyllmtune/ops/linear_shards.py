"""linear_token_logprobs over a vocabulary that is sharded over the ranks of a process group. Users
reach it by ``linear_token_logprobs(..., process_group=)`` or by a weight that is a DTensor.

Forward: four numbers a row and rank, (max, sum, weighted sum, target's logit), one all-gather, and
a merge in the order of the ranks, so every rank holds the same bits. One column more says which
tokens a rank scored; if they differ, all is NaN, or on the CPU an error. Backward: the operator's
own, on the shard, from the merged numbers; the hidden states' gradient is then a sum over the
shards, one all-reduce before it is rounded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from pyllmtune import _checks, _ops
from pyllmtune.reference import linear_token_logprobs as reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def merge(
    parts: Sequence[Tensor], inverse: float | Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """(log-prob, entropy, logsumexp), each ``[N]``, and ``[2, N]`` = (max, sum), from
    ``linear_token_logprobs_stats`` of each shard; ``inverse`` is 1 / temperature. A row whose token
    is in no shard, or in several, is NaN.
    """
    top = torch.stack([part[0] for part in parts]).amax(0)
    total = weighted = target = torch.zeros_like(top)
    owners = torch.zeros_like(top, dtype=torch.int32)
    for top_here, total_here, weighted_here, target_here in parts:  # in the order of the ranks
        shift = torch.where(top_here == -math.inf, 0, (top_here - top) * inverse)
        scale = shift.exp()
        total = total + scale * total_here
        moved = scale * (weighted_here + shift * total_here)
        weighted = weighted + torch.where(scale == 0, 0, moved)  # 0 times an infinite shift
        here = ~target_here.isnan()
        target = torch.where(here, target_here, target)
        owners = owners + here
    found = torch.where(owners == 1, total, math.nan)
    log_sum = found.log()
    nothing = (top == -math.inf) & (found == 0)  # is allowed
    logprobs = ((target - top) * inverse - log_sum).clamp(max=0)
    entropy = (log_sum - weighted / found).clamp(min=0)
    logsumexp = top * inverse + log_sum
    scores = (
        torch.where(nothing, -math.inf, logprobs),
        torch.where(nothing, 0, entropy),
        torch.where(nothing, -math.inf, logsumexp),
    )
    return scores, torch.stack((top, total))


def score_shards(
    floor: str, group: ProcessGroup, start: int, head: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the operator returns for the whole vocabulary, from its arguments for this rank's shard,
    whose first row is ``start``.
    """
    hidden, weight, tokens, bias, *rest = head
    return _Sharded.apply(floor, group, start, hidden, weight, bias, tokens, *rest)


def _run(word: str, floor: str) -> Any:
    return getattr(reference, word) if floor == "reference" else _ops.handle(word, floor)


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        floor: str,
        group: ProcessGroup,
        start: int,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        row_temperature: Tensor | None,
        scale: float,
        cap: float,
        mask: Tensor | None,
        space: int,
    ) -> tuple[Tensor, ...]:
        here = tokens - start
        numbers = (temperature, row_temperature, scale, cap, mask, space)
        stats = _run("linear_token_logprobs_stats", floor)(hidden, weight, here, bias, *numbers)
        mark = _signature(tokens, mask).to(stats.dtype).expand(4, 1)
        sent = torch.cat((stats, mark), 1)  # [4, N + 1]
        parts = [torch.empty_like(sent) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(parts, sent, group=group)
        alike = torch.stack([part[0, -1] == mark[0, 0] for part in parts]).all()
        inverse = 1 / (temperature if row_temperature is None else row_temperature)
        scores, stats = merge([part[:, :-1] for part in parts], inverse)
        _check_found(tokens, start, weight.shape[0], mask, alike, scores[0], stats[1])
        scores = tuple(torch.where(alike, score, math.nan) for score in scores)
        if mask is not None:
            scores = tuple(torch.where(mask, score, 0) for score in scores)
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(hidden, weight, here, bias, row_temperature, mask, scores[1], stats)
        ctx.options = floor, group, temperature, scale, cap, space
        return (*scores, stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, here, bias, row_temperature, mask, entropy, stats = ctx.saved_tensors
        floor, group, temperature, scale, cap, space = ctx.options
        wanted = [ctx.needs_input_grad[i] for i in (3, 4, 5)]
        by_hidden, by_weight, by_bias = _run("linear_token_logprobs_backward", floor)(
            *(hidden, weight, here, bias, temperature, row_temperature, scale, cap, mask, space),
            *(entropy, stats, *(grad.contiguous() for grad in grads[:3]), *wanted, True),
        )
        if wanted[0]:
            by_hidden = by_hidden.contiguous()
            distributed.all_reduce(by_hidden, group=group)
            by_hidden = by_hidden.to(hidden.dtype)
        found = zip((by_hidden, by_weight, by_bias), wanted, strict=True)
        return (None, None, None, *(grad if want else None for grad, want in found), *(None,) * 7)


def _signature(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """A number that float32 holds exactly and that ranks with other tokens hardly share."""
    live = tokens if mask is None else torch.where(mask, tokens, 0)
    place = torch.arange(1, tokens.shape[0] + 1, device=tokens.device) % 8191
    return (live * place).sum() % 16_777_213  # primes; the second is below 2^24


def _check_found(
    tokens: Tensor,
    start: int,
    rows: int,
    mask: Tensor | None,
    alike: Tensor,
    logprobs: Tensor,
    total: Tensor,
) -> None:
    """The CPU's refusal of tokens that differ between ranks or are out of range, which is known
    once the shards are merged: on every rank, or on none.
    """
    if torch.compiler.is_compiling():
        return
    if tokens.device.type != "cpu" and os.environ.get(_checks.DEBUG_VARIABLE) != "1":
        return
    if not alike:
        raise ValueError(
            "tokens must be the same on every rank of process_group, got others on this rank than "
            "elsewhere. FSDP2's parameters are shards for other data on each rank: use "
            "pyllmtune.nn.LogprobHead, which runs where they are whole"
        )
    lost = logprobs.isnan() & ~total.isnan()
    if mask is not None:
        lost &= mask
    if lost.any():
        raise ValueError(
            f"tokens must each be in one rank's shard, got {int(tokens[lost][0])}, which is in "
            f"none or in several; here the shard is [{start}, {start + rows}): vocab_start is the "
            "first row's token id. Mask positions without a token with mask="
        )


def of_rank(
    weight: Tensor, bias: Tensor | None, group: ProcessGroup | None, start: int
) -> tuple[Tensor, Tensor | None, ProcessGroup | None, int]:
    """Weight and bias as plain tensors, and whose shard they are: of no group if they are whole."""
    if not _is_dtensor(weight):
        _check_group(group, start)
        return weight, whole("bias", bias), group, start
    if group is not None or start != 0:
        raise ValueError("a weight that is a DTensor knows its shards; leave out process_group=")
    mesh, placements = weight.device_mesh, tuple(weight.placements)
    if bias is not None and (not _is_dtensor(bias) or tuple(bias.placements) != placements):
        raise ValueError(f"bias must be a DTensor placed as weight is, {placements}")
    if not all(placement.is_replicate() for placement in placements):
        if mesh.ndim != 1 or not placements[0].is_shard(0):
            raise ValueError(
                "weight must be sharded by rows over a 1-d mesh, or replicated; got a DTensor "
                f"placed {placements} on a {mesh.ndim}-d mesh. Redistribute it, or pass "
                "weight.to_local() with process_group= and vocab_start="
            )
        each = -(-weight.shape[0] // mesh.size())  # as torch cuts it
        group, start = mesh.get_group(), min(each * mesh.get_local_rank(), weight.shape[0])
    return weight.to_local(), None if bias is None else bias.to_local(), group, start


def whole(name: str, value: Any) -> Any:
    """The tensor of a replicated DTensor; anything else as it is."""
    if not _is_dtensor(value):
        return value
    if not all(placement.is_replicate() for placement in value.placements):
        raise ValueError(
            f"{name} must be replicated, got a DTensor placed {tuple(value.placements)}; "
            ".redistribute(placements=[Replicate()]) first"
        )
    return value.to_local()


def _is_dtensor(value: object) -> bool:
    # importing torch.distributed.tensor takes most of a second
    return isinstance(value, Tensor) and hasattr(value, "placements")


def _check_group(group: ProcessGroup | None, start: int) -> None:
    if group is None:
        if start != 0:
            raise ValueError(f"vocab_start={start} is for a shard; give its process_group too")
        return
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup that this rank belongs to, got "
            f"{type(group).__name__}; of a 1-d DeviceMesh take mesh.get_group()"
        )
    if start < 0:
        raise ValueError(
            f"vocab_start must be at least 0, got {start}: the token id of the first row of this "
            "rank's weight"
        )
