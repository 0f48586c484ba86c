"""The loops of linear_token_logprobs over tiles of logits, the same on every floor.

A tile is ``[rows of a chunk, TILE_COLUMNS]``: one matmul, then one kernel of the floor that takes
all it needs from the tile before the next one overwrites it. Forward goes over V inside a chunk of
rows. Backward goes over V outside, so that a tile of the weight's gradient is complete, and written
once, while the hidden states' gradient grows in float32.

On the CPU nothing depends on how the rows are cut: a row's results are merged tile by tile of V,
and chunks are multiples of the blocks in which ``csrc/cpu/matmul.h`` adds (512).

What a tile leaves of the workspace holds the logits of the first columns from forward to backward,
which then has a matmul less to do for them: all columns where ``workspace_bytes`` allows ``[N,
V]``, a few or none by default. They are the same bits either way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyllmtune import _backend, _ops

TILE_COLUMNS = {"cpu": 2048, "cuda": 16384}
CHUNK_ROWS = 512
ALIGNED = 16  # elements: rows of a tile begin on 16-byte boundaries, whatever the vocabulary
# cpu: about a third-level cache; cuda: matmuls of 4,096 rows
WORKSPACE = {"cpu": 32 << 20, "cuda": 512 << 20}


def tile_columns(device: torch.device) -> int:
    return TILE_COLUMNS.get(device.type, TILE_COLUMNS["cpu"])


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_bytes(device: torch.device, dtype: torch.dtype) -> int:
    """Of one row of a tile: logits, and in backward their gradient."""
    return tile_columns(device) * (accumulator(dtype).itemsize + dtype.itemsize)


def kept_columns(rows: int, vocab: int, workspace_bytes: int, like: Tensor) -> int:
    """How many columns of logits, of all ``rows``, the workspace has room for beside a tile."""
    one = row_bytes(like.device, like.dtype)
    tile = min(rows, max(workspace_bytes // one // CHUNK_ROWS, 1) * CHUNK_ROWS) * one
    column = rows * accumulator(like.dtype).itemsize
    fit = (workspace_bytes - tile) // column if column else 0
    whole, some = -(-vocab // ALIGNED) * ALIGNED, tile_columns(like.device)
    return whole if fit >= whole else max(fit, 0) // some * some


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """``out (+)= a @ b`` with float32 accumulation and no rounding of the result."""
    if a.device.type == "cpu" and _backend.why_not("cpp", "cpu") is None:
        torch.ops.pyllmtune.matmul(a, b, add, out)
        return
    if a.dtype == out.dtype:
        product = torch.mm(a, b) if add else torch.mm(a, b, out=out)
    elif a.is_cuda:
        options = {} if add else {"out": out}
        product = torch.mm(a, b, out_dtype=out.dtype, **options)
    else:
        product = torch.mm(a.to(out.dtype), b.to(out.dtype))
        if not add:
            out.copy_(product)
    if add:
        out += product


@dataclass(frozen=True)
class Head:
    """The arguments of the operator, and its tiles."""

    floor: str
    hidden: Tensor
    weight: Tensor
    tokens: Tensor
    bias: Tensor | None
    temperature: float
    row_temperature: Tensor | None
    logit_scale: float
    softcap: float
    mask: Tensor | None
    workspace_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        return accumulator(self.hidden.dtype)

    def chunks(
        self, rows: Tensor | None, size: int | None = None
    ) -> Iterator[tuple[int, int, Tensor | slice]]:
        """(begin, end, index into ``[N]``) of each chunk of the rows that count."""
        count = self.hidden.shape[0] if rows is None else rows.shape[0]
        if size is None:
            fit = self.workspace_bytes // row_bytes(self.hidden.device, self.hidden.dtype)
            size = max(fit // CHUNK_ROWS, 1) * CHUNK_ROWS
        for begin in range(0, count, size):
            end = min(begin + size, count)
            yield begin, end, slice(begin, end) if rows is None else rows[begin:end]

    def part(self, index: Tensor | slice) -> Head:
        """Some of its rows, in one chunk."""
        per_row = (self.hidden, self.tokens, self.row_temperature)
        hidden, tokens, temperatures = (None if x is None else x[index] for x in per_row)
        of_rows = {"hidden": hidden, "tokens": tokens, "row_temperature": temperatures}
        return replace(self, **of_rows, mask=None, workspace_bytes=sys.maxsize)

    def columns(self) -> Iterator[tuple[int, int]]:
        vocab, size = self.weight.shape[0], tile_columns(self.weight.device)
        for first in range(0, vocab, size):
            yield first, min(first + size, vocab)

    def workspace(self, rows: int, dtype: torch.dtype, columns: int | None = None) -> Tensor:
        if columns is None:
            columns = min(tile_columns(self.weight.device), self.weight.shape[0])
        columns = -(-columns // ALIGNED) * ALIGNED
        return self.hidden.new_empty(rows, columns, dtype=dtype)

    def logits(self, x: Tensor, first: int, last: int, space: Tensor) -> Tensor:
        tile = space[: x.shape[0], : last - first]
        multiply(x, self.weight[first:last].T, tile)
        return tile

    def scores(
        self, x: Tensor, index: Tensor | slice, kept: Tensor, space: Tensor
    ) -> tuple[Tensor, Tensor]:
        """scores [3, rows] and running [4, rows] of a chunk. The logits of the first columns go to
        ``kept``, as many as it has; the rest to ``space``, one tile over the other.
        """
        running = x.new_zeros(4, x.shape[0], dtype=self.dtype)
        running[0], running[3] = -torch.inf, torch.nan
        scores = torch.empty_like(running[:3])
        for first, last in self.columns():
            keeps = last <= kept.shape[1]
            tile = self.logits(x, first, last, kept[:, first:] if keeps else space)
            self.call("tile", tile, first, index, running, scores)
        return scores, running

    def call(
        self, word: str, tile: Tensor, first: int, index: Tensor | slice, *rest: Tensor
    ) -> None:
        """One of the floor's kernels on a tile."""
        temperatures = None if self.row_temperature is None else self.row_temperature[index]
        bias = None if self.bias is None else self.bias[first : first + tile.shape[1]]
        _ops.handle(f"linear_token_logprobs_{word}", self.floor)(
            *(tile, first, self.logit_scale, self.softcap, bias),
            *(self.tokens[index], self.temperature, temperatures, *rest),
        )


def score(head: Head, kept: Tensor) -> Tensor:
    """``[7, N]``: log-prob, entropy, logsumexp, then max, sum, weighted sum, target's logit. The
    logits of the first columns go to ``kept``, a row for each that the mask selects.
    """
    rows = None if head.mask is None else head.mask.nonzero()[:, 0]
    out = head.hidden.new_zeros(7, head.hidden.shape[0], dtype=head.dtype)
    space = None
    for begin, end, index in head.chunks(rows):
        x = head.hidden[index]
        if space is None:
            space = head.workspace(end - begin, head.dtype)
        out[:, index] = torch.cat(head.scores(x, index, kept[begin:end], space))
    return out


def forward(head: Head, keep_logits: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log-prob, entropy, logsumexp ``[N]``, stats ``[2, N]`` = (max, sum), and logits that were
    kept, ``[N, columns]``: the products, before bias, scale and cap.
    """
    rows, vocab = head.hidden.shape[0], head.weight.shape[0]
    columns = kept_columns(rows, vocab, head.workspace_bytes, head.hidden)
    kept = head.hidden.new_empty(rows, columns if keep_logits else 0, dtype=head.dtype)
    out = score(head, kept)
    return out[0].clone(), out[1].clone(), out[2].clone(), out[3:5].clone(), kept


def shard_stats(head: Head) -> Tensor:
    """``[4, N]``: max, sum, weighted sum, and the target's logit or NaN if it is not here."""
    return score(head, head.hidden.new_empty(0, 0))[3:].clone()


def backward(
    head: Head,
    entropy: Tensor,
    stats: Tensor,
    upstream: tuple[Tensor, ...],
    wanted: tuple[bool, bool, bool],
    wide_hidden: bool = False,
    logits: Tensor | None = None,
    grad_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; those that are not wanted are empty. The first is
    rounded to the dtype of hidden, unless it is wanted wide. ``logits``: what forward kept.
    ``grad_weight``: where the second goes; in float32 it is added to what is there.
    """
    hidden, weight, bias = head.hidden, head.weight, head.bias
    idle = sum(grad != 0 for grad in upstream) == 0  # NaN counts
    if head.mask is not None:
        idle |= ~head.mask
    live = (~idle).nonzero()[:, 0]
    rows = None if live.shape[0] == hidden.shape[0] else live
    at = live if head.mask is None or rows is None else (head.mask.cumsum(0) - 1)[live]
    wide = (stats[0], stats[1], entropy), upstream

    grad_hidden = hidden.new_zeros(live.shape[0] if wanted[0] else 0, hidden.shape[1]).to(
        head.dtype
    )
    grows = grad_weight is not None and grad_weight.dtype == head.dtype
    if grad_weight is None:
        # every row is written, tile by tile, if there is anything to add up
        new = weight.new_empty if live.shape[0] else weight.new_zeros
        grad_weight = new(weight.shape if wanted[1] else (0,))
    rounds = grad_weight.dtype != head.dtype  # once a tile of it is complete
    grad_bias = weight.new_zeros(weight.shape[0] if wanted[2] else 0, dtype=head.dtype)
    space = None
    for first, last in head.columns():
        for begin, end, index in head.chunks(rows):
            if space is None:
                space = head.workspace(end - begin, head.dtype)
                space_dz = head.workspace(end - begin, hidden.dtype)
                partial = hidden.new_empty(
                    space.shape[1] if rounds and wanted[1] else 0, hidden.shape[1], dtype=head.dtype
                )
            x = hidden[index]
            if logits is not None and last <= logits.shape[1]:
                tile = logits[begin:end, first:last]
                if rows is not None:
                    kept, out = logits[:, first:last], space[: end - begin, : last - first]
                    tile = torch.index_select(kept, 0, at[begin:end], out=out)
            else:
                tile = head.logits(x, first, last, space)
            dz = space_dz[: end - begin, : last - first]
            per_row = [torch.stack([value[index] for value in values]) for values in wide]
            head.call("tile_backward", tile, first, index, *per_row, dz)
            if wanted[0]:
                multiply(dz, weight[first:last], grad_hidden[begin:end], add=first > 0)
            if wanted[1]:
                sums = partial[: last - first] if rounds else grad_weight[first:last]
                multiply(dz.T, x, sums, add=grows or begin > 0)
            if wanted[2]:
                ones = x.new_ones(end - begin, 1)
                multiply(dz.T, ones, grad_bias[first:last, None], add=begin > 0)
        if wanted[1] and rounds and live.shape[0] > 0:
            grad_weight[first:last] = partial[: last - first]
    if wanted[0]:
        grad_hidden = grad_hidden if wide_hidden else grad_hidden.to(hidden.dtype)
        if rows is not None:
            every_row = grad_hidden.new_zeros(hidden.shape)
            grad_hidden = every_row.index_copy_(0, rows, grad_hidden)
    return grad_hidden, grad_weight, grad_bias if bias is not None else grad_bias[:0]


def register(floor: str) -> None:
    """The composed operators of a floor, for every device."""

    def run_forward(*args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return forward(Head(floor, *args[:10]), *args[10:])

    def run_stats(*args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return shard_stats(Head(floor, *args))

    def run_backward(*args: Any) -> Any:
        inputs, (entropy, stats), rest = args[:10], args[10:12], args[12:]
        with torch.autocast(args[0].device.type, enabled=False):
            return backward(Head(floor, *inputs), entropy, stats, rest[:3], rest[3:6], *rest[6:])

    for word, run in (
        ("linear_token_logprobs", run_forward),
        ("linear_token_logprobs_stats", run_stats),
        ("linear_token_logprobs_backward", run_backward),
    ):
        for device in ("CPU", "CUDA"):
            _ops.LIBRARY.impl(_ops.op_name(word, floor), run, device)


_ops.for_every_floor(register)
