"""The loss of transformers' causal models on ``token_logprobs``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyllmtune.ops.token_logprobs import token_logprobs


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The loss of transformers' causal models, for ``model.loss_function = causal_lm_loss``: one
    read of the logits, no float32 copy of them and no shifted one.

    >>> import torch
    >>> causal_lm_loss(torch.zeros(1, 3, 4), torch.tensor([[0, 1, -100]]), 4)  # ln 4
    tensor(1.3863)
    """
    if shift_labels is None:
        logits, shift_labels = logits[..., :-1, :], labels[..., 1:]
    shift_labels = shift_labels.to(logits.device)
    mask = shift_labels != ignore_index
    logprobs = token_logprobs(logits, shift_labels, mask=mask).logprobs
    return -logprobs.sum() / (mask.sum() if num_items_in_batch is None else num_items_in_batch)
