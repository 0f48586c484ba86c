"""Where each sequence lies in a batch: padded ``[B, T]``, or packed ``[total]`` with
``cu_seqlens``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyllmtune import _checks


def sequence_offsets(name: str, tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``[B + 1]`` int64: where each sequence starts in the flattened ``tokens``, called ``name`` in
    errors. The values of ``cu_seqlens`` are checked on the CPU, outside ``torch.compile``.
    """
    if cu_seqlens is None:
        if tokens.dim() != 2:
            raise ValueError(
                f"{name} must be [B, T], got {list(tokens.shape)}; packed [total] needs cu_seqlens="
            )
        batch, length = tokens.shape
        if length == 0:
            return torch.zeros(batch + 1, dtype=torch.int64, device=tokens.device)
        return torch.arange(0, batch * length + 1, length, device=tokens.device)
    _checks.check_tensor("cu_seqlens", cu_seqlens, (torch.int64, torch.int32))
    if tokens.dim() != 1:
        raise ValueError(f"{name} must be [total] with cu_seqlens, got {list(tokens.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.device != tokens.device:
        raise ValueError(
            f"cu_seqlens must be [B + 1] on {tokens.device}, "
            f"got {list(cu_seqlens.shape)} on {cu_seqlens.device}"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != tokens.shape[0] or ends != sorted(ends):
            raise ValueError(
                f"cu_seqlens must rise from 0 to {tokens.shape[0]}, the number of tokens; "
                f"got {ends[:8]}{' ...' if len(ends) > 8 else ''}"
            )
    return cu_seqlens.long().contiguous()
