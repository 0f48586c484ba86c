"""The tokens that survived a sampler's filters, ragged: what the trainer needs to score exactly the
distribution that was sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class KeptTokens(NamedTuple):
    """Token ids of N rows, one after the other (CSR).

    offsets: ``[N + 1]`` int64; row i owns ``token_ids[offsets[i]:offsets[i + 1]]``.
    token_ids: ``[offsets[N]]`` int32, ascending within a row.

    >>> kept = KeptTokens.from_mask(torch.tensor([[True, False, True], [False, True, False]]))
    >>> kept.token_ids
    tensor([0, 2, 1], dtype=torch.int32)
    >>> kept.to_mask(3)
    tensor([[ True, False,  True],
            [False,  True, False]])
    """

    offsets: Tensor
    token_ids: Tensor

    @property
    def num_rows(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def rows(self) -> Tensor:
        """The row of each token id, ``[offsets[N]]`` int64."""
        rows = torch.arange(self.num_rows, device=self.offsets.device)
        return rows.repeat_interleave(self.counts, output_size=self.token_ids.shape[0])

    @property
    def counts(self) -> Tensor:
        """Tokens of each row, ``[N]`` int64."""
        return self.offsets.diff()

    @classmethod
    def from_counts(cls, counts: Tensor, token_ids: Tensor) -> KeptTokens:
        """From the number of tokens of each row ``[...]`` and all ids, row after row."""
        offsets = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
        torch.cumsum(counts.reshape(-1), 0, out=offsets[1:])
        return cls(offsets, token_ids)

    @classmethod
    def from_mask(cls, mask: Tensor) -> KeptTokens:
        """From a bool mask ``[..., V]``, leading axes taken as rows. On a GPU this waits for the
        device: the number of ids decides a shape.

        Raises:
            TypeError: ``mask`` is not a bool tensor.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() == 0:
            raise TypeError(
                "mask must be a bool tensor [..., V]; compare logits with -inf to get one"
            )
        rows = mask.reshape(-1, mask.shape[-1])  # [N, V]
        return cls.from_counts(rows.sum(-1), rows.nonzero()[:, 1].int())

    @classmethod
    def cat(cls, parts: Sequence[KeptTokens]) -> KeptTokens:
        """The rows of all parts, one part after the other; at least one part.

        >>> one = KeptTokens(torch.tensor([0, 2]), torch.tensor([3, 7], dtype=torch.int32))
        >>> KeptTokens.cat([one, one]).offsets
        tensor([0, 2, 4])
        """
        counts = torch.cat([part.counts for part in parts])
        return cls.from_counts(counts, torch.cat([part.token_ids for part in parts]))

    @classmethod
    def from_steps(cls, steps: Sequence[KeptTokens]) -> KeptTokens:
        """From T steps of a decoding loop, each with a row per sequence, B rows, to the order of
        trainers, ``[B, T]`` flattened: row ``b * T + t`` is row b of step t.

        >>> steps = [KeptTokens.from_mask(torch.eye(2, 4, dtype=torch.bool).roll(2 * t, 1))
        ...          for t in range(2)]  # sequence 0 keeps 0, then 2; sequence 1 keeps 1, then 3
        >>> KeptTokens.from_steps(steps).token_ids
        tensor([0, 2, 1, 3], dtype=torch.int32)
        """
        by_step = cls.cat(steps)
        place = torch.arange(by_step.num_rows, device=by_step.offsets.device)
        place = place.view(len(steps), -1).T.flatten()  # where row b * T + t lies in by_step
        kept = cls.from_counts(by_step.counts[place], by_step.token_ids)
        moved = by_step.offsets[place] - kept.offsets[:-1]
        entries = torch.arange(kept.token_ids.shape[0], device=moved.device)
        return cls(kept.offsets, kept.token_ids[entries + moved[kept.rows]])

    def split(self, sizes: Sequence[int]) -> list[KeptTokens]:
        """Parts of so many rows each; :meth:`cat` joins them. Waits for the device.

        Raises:
            ValueError: the sizes do not add up to the number of rows.
        """
        if sum(sizes) != self.num_rows:
            raise ValueError(f"sizes must add up to {self.num_rows} rows, got {sum(sizes)}")
        counts = self.counts.split(list(sizes))
        ids = self.token_ids.split([int(count.sum()) for count in counts])
        return [KeptTokens.from_counts(*part) for part in zip(counts, ids, strict=True)]

    def to_mask(self, vocab: int) -> Tensor:
        """Bool ``[N, vocab]``, true where kept.

        Raises:
            ValueError: an id is outside the vocabulary (on the CPU).
        """
        ids = self.token_ids
        if ids.numel() and ids.device.type == "cpu" and int(ids.max()) >= vocab:
            raise ValueError(f"vocab must exceed every token id, got {vocab} for {int(ids.max())}")
        mask = torch.zeros(self.num_rows, vocab, dtype=torch.bool, device=ids.device)
        mask[self.rows, ids.long()] = True
        return mask

    def contains(self, tokens: Tensor) -> Tensor:
        """Whether row i kept ``tokens[i]``: bool of the shape of ``tokens``, which has N elements.

        >>> kept = KeptTokens(torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1], dtype=torch.int32))
        >>> kept.contains(torch.tensor([2, 2]))
        tensor([ True, False])
        """
        rows = self.rows
        hits = (self.token_ids == tokens.reshape(-1)[rows]).int()  # at most one in a row
        counts = torch.zeros(self.num_rows, dtype=torch.int32, device=hits.device)
        return (counts.index_add_(0, rows, hits) > 0).reshape(tokens.shape)
