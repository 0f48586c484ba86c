"""kept_logits of large sets, by matmuls: tile after tile of the vocabulary, [rows, TILE_COLUMNS]
logits of which the kept ones are taken.

Sorted by token, the entries of a tile are neighbours. Forward multiplies a tile and picks; backward
puts the gradient into a tile of zeros and multiplies twice, so a tile of the weight's gradient is
written once. Memory: one tile, its gradient, and the hidden states' gradient in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyllmtune.kept import KeptTokens
from pyllmtune.ops.linear_tiles import accumulator, multiply, tile_columns

# of the vocabulary in the sets, on average: from there on a matmul of it all is faster, forward and
# backward, than a dot product for each (measured: docs/kept_logits.md)
SHARE = 0.07


def is_faster(entries: int, rows: int, vocab: int) -> bool:
    return entries > SHARE * rows * vocab


class Tile(NamedTuple):
    """Columns ``vocab`` of the logits, and which of them are entries ``own``, by token."""

    vocab: slice
    own: slice
    at: tuple[Tensor, Tensor]  # row and column of each


def tiles(rows: Tensor, token_ids: Tensor, vocab: int) -> Iterator[Tile]:
    """``token_ids`` ascending. The number of entries of each tile is read from the device."""
    width = tile_columns(rows.device)
    first = torch.arange(0, vocab + width, width, dtype=torch.int32, device=rows.device)
    bounds = torch.searchsorted(token_ids, first).tolist()
    for i, (begin, end) in enumerate(pairwise(bounds)):
        own, columns = slice(begin, end), slice(i * width, min((i + 1) * width, vocab))
        if begin < end:
            yield Tile(columns, own, (rows[own], token_ids[own].long() - i * width))


class DenseKeptLogits(torch.autograd.Function):
    """``(hidden, weight, offsets, token_ids) -> [entries]``, as the operator without a mask."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, *kept: Tensor) -> Tensor:
        token_ids, order = kept[1].sort(stable=True)
        rows = KeptTokens(*kept).rows[order]
        ctx.save_for_backward(hidden, weight, rows, token_ids, order)
        dtype = accumulator(hidden.dtype)
        logits = hidden.new_empty(token_ids.shape, dtype=dtype)
        space = hidden.new_empty(hidden.shape[0], tile_columns(hidden.device), dtype=dtype)
        for tile in tiles(rows, token_ids, weight.shape[0]):
            part = weight[tile.vocab]  # [columns, D]
            multiply(hidden, part.T, space[:, : part.shape[0]])
            logits[order[tile.own]] = space[tile.at]
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, rows, token_ids, order = ctx.saved_tensors
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        by_hidden = hidden.new_zeros(hidden.shape, dtype=grad.dtype)
        by_weight = torch.zeros_like(weight) if of_weight else None
        for tile in tiles(rows, token_ids, weight.shape[0]):
            part = weight[tile.vocab]  # [columns, D]
            by_logits = hidden.new_zeros(hidden.shape[0], part.shape[0])
            by_logits[tile.at] = grad[order[tile.own]].to(by_logits.dtype)
            if of_hidden:
                multiply(by_logits, part, by_hidden, add=True)
            if of_weight:
                product = part.new_empty(part.shape, dtype=grad.dtype)
                multiply(by_logits.T, hidden, product)
                by_weight[tile.vocab] = product.to(weight.dtype)
        return by_hidden.to(hidden.dtype) if of_hidden else None, by_weight, None, None
