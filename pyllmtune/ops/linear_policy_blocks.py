"""The loop of linear_policy_loss over chunks of rows, the same on every floor.

The gradient of a logit needs the whole row of logits first, so those of a chunk are kept,
``[rows of the chunk, V]``: one matmul makes them, the loss of the chunk turns its log-probs into
gradients, two matmuls carry these on. Where all rows fit in one chunk any loss is possible, and a
tile of the weight's gradient is written once. Where they do not, the loss must be one whose
gradient at a token depends on that token alone, up to the final division, and the weight's gradient
grows in float32 over the chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyllmtune import _ops
from pyllmtune.losses.config import code
from pyllmtune.ops import linear_tiles as tiles
from pyllmtune.ops.linear_tiles import ALIGNED, CHUNK_ROWS, Head
from pyllmtune.ops.policy_loss import LossInputs, run_policy_loss

# rows of a chunk by default. Every chunk reads W three times and dW twice: fewer rows would spend
# on that what the kept logits save
DEFAULT_ROWS = {"cpu": 512, "cuda": 4096}
# aggregations under which a token's gradient does not depend on its sequence
_BY_TOKEN = [code("aggregation", name) for name in ("token-mean", "seq-mean-token-sum", "constant")]


def row_bytes(vocab: int, device: torch.device, dtype: torch.dtype) -> int:
    """Of one row of a chunk: its logits, and one tile of them with its gradient."""
    kept = -(-vocab // ALIGNED) * ALIGNED * tiles.accumulator(dtype).itemsize
    return kept + tiles.row_bytes(device, dtype)


def default_workspace(vocab: int, device: torch.device, dtype: torch.dtype) -> int:
    rows = DEFAULT_ROWS.get(device.type, DEFAULT_ROWS["cpu"])
    return rows * row_bytes(vocab, device, dtype)


def chunk_rows(
    rows: int,
    vocab: int,
    device: torch.device,
    dtype: torch.dtype,
    workspace_bytes: int,
    choices: list[int],
) -> int:
    """How many rows are taken at a time; 0 if this loss does not fit in the workspace."""
    fit = workspace_bytes // row_bytes(vocab, device, dtype)
    if rows <= fit:
        return max(rows, 1)
    level, *_, aggregation = choices
    by_token = level == code("level", "token") and aggregation in _BY_TOKEN
    return fit // CHUNK_ROWS * CHUNK_ROWS if by_token else 0


class _Loss:
    """policy_loss on log-probs and entropy that the head has made."""

    def __init__(self, head: Head, inputs: LossInputs, numbers: tuple[list[int], list[float]]):
        self.floor, self.mask, self.inputs, self.numbers = head.floor, head.mask, inputs, numbers

    def of_batch(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, ...]:
        """loss, metrics, gradients by log-prob and entropy before they are scaled, scale."""
        return run_policy_loss(self.floor, logprobs, self.mask, entropy, self.inputs, self.numbers)

    def of_rows(self, logprobs: Tensor, entropy: Tensor, index: Tensor | slice) -> Tensor:
        """``[2, rows]``: the same gradients of some rows, as if they were one sequence."""
        old, advantages, token_advantages, offsets, ref, weights, *_ = self.inputs
        if not token_advantages:
            total = torch.arange(old.shape[0], device=old.device)
            advantages = advantages[torch.bucketize(total[index], offsets[1:], right=True)]
        else:
            advantages = advantages[index]
        sequence = LossInputs(
            old[index],
            advantages,
            True,
            torch.arange(2, device=old.device) * logprobs.shape[0],
            None if ref is None else ref[index],
            None if weights is None else weights[index],
            1.0,
            None,
        )
        run = run_policy_loss(self.floor, logprobs, None, entropy, sequence, self.numbers)
        return torch.stack(run[2:4])


class _Gradients:
    """Gradients of hidden, weight and bias that grow chunk by chunk; empty where not wanted.

    Accumulated in float32 and kept in the operands' dtype: float16, whose range is that of a
    gradient only once it is multiplied by the upstream one, stays in float32.
    """

    def __init__(self, head: Head, wanted: tuple[bool, ...], one_chunk: bool):
        hidden, weight = head.hidden, head.weight
        self.head, self.wanted = head, wanted
        self.dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        rows = hidden.shape[0] if wanted[0] else 0
        self.hidden = hidden.new_zeros((rows, hidden.shape[1]), dtype=head.dtype)
        # a tile of dW is complete after the only chunk, and rounded there
        by_weight = self.dtype if one_chunk else head.dtype
        self.weight = weight.new_zeros(weight.shape if wanted[1] else (0,), dtype=by_weight)
        self.bias = weight.new_zeros(weight.shape[0] if wanted[2] else 0, dtype=head.dtype)

    def add(
        self,
        logits: Tensor,
        index: Tensor | slice,
        stats: Tensor,
        entropy: Tensor,
        upstream: tuple[Tensor, ...],
    ) -> None:
        """One chunk: logits ``[rows, V]``, stats ``[2, rows]`` and vectors ``[rows]``."""
        by_hidden, _, by_bias = tiles.backward(
            *(self.head.part(index), entropy, stats, upstream, self.wanted),
            wide_hidden=True,
            logits=logits,
            grad_weight=self.weight,
        )
        if self.wanted[0]:
            self.hidden[index] = by_hidden
        if self.wanted[2]:
            self.bias += by_bias

    def finish(self, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if scale is not None:
            for grad in (self.hidden, self.weight, self.bias):
                grad.mul_(scale)
        return self.hidden.to(self.dtype), self.weight.to(self.dtype), self.bias


def forward(
    head: Head, inputs: LossInputs, numbers: tuple[list[int], list[float]], wanted: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    """loss, metrics, and the gradients of hidden, weight and bias."""
    hidden, vocab = head.hidden, head.weight.shape[0]
    rows = None if head.mask is None else head.mask.nonzero()[:, 0]
    count = hidden.shape[0] if rows is None else rows.shape[0]
    shape = (vocab, hidden.device, hidden.dtype, head.workspace_bytes, numbers[0])
    size = chunk_rows(count, *shape)
    if size == 0:
        raise ValueError(f"workspace_bytes={head.workspace_bytes} does not hold the rows it needs")
    one_chunk = count <= size
    # float16 would lose small gradients that are divided before they are summed
    scaled = one_chunk and hidden.dtype != torch.float16
    loss, grads = _Loss(head, inputs, numbers), _Gradients(head, wanted, one_chunk)
    logprobs, entropy = hidden.new_zeros(2, hidden.shape[0], dtype=head.dtype).unbind()
    result: tuple[Tensor, ...] | None = None
    kept = None
    for begin, end, index in head.chunks(rows, size):
        if kept is None:
            kept = head.workspace(end - begin, head.dtype, vocab)
        logits = kept[: end - begin, :vocab]
        scores, running = head.scores(hidden[index], index, logits, kept)
        logprobs[index], entropy[index] = scores[:2]
        if one_chunk:
            result = loss.of_batch(logprobs, entropy)
            upstream = torch.stack(result[2:4])[:, index]
            upstream = upstream * result[4] if scaled else upstream
        else:
            upstream = loss.of_rows(scores[0], scores[1], index)
        no_logsumexp = torch.zeros_like(upstream[0])
        grads.add(logits, index, running[:2], scores[1], (*upstream, no_logsumexp))
    if result is None:
        result = loss.of_batch(logprobs, entropy)
    return (*result[:2], *grads.finish(None if scaled else result[4]))


def times(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Tile by tile, so that no more than the result is as large as ``grad``."""
    if grad.dtype == factor.dtype == dtype:
        return grad * factor
    out = torch.empty_like(grad, dtype=dtype)
    for part, to in zip(grad.split(CHUNK_ROWS), out.split(CHUNK_ROWS), strict=True):
        to.copy_(part.to(factor.dtype).mul_(factor))
    return out


def register(floor: str) -> None:
    """The composed operators of a floor, for every device."""

    def run(*args: Any) -> Any:
        inputs, numbers, wanted = LossInputs(*args[10:18]), args[18:20], args[20:]
        with torch.autocast(args[0].device.type, enabled=False):
            return forward(Head(floor, *args[:10]), inputs, numbers, wanted)

    for word, function in (("linear_policy_loss", run), ("linear_policy_loss_backward", times)):
        for device in ("CPU", "CUDA"):
            _ops.LIBRARY.impl(_ops.op_name(word, floor), function, device)


_ops.for_every_floor(register)
