"""The lm_head as a module that scores tokens, for what wraps modules: FSDP2, DDP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pyllmtune._backend import Backend
from pyllmtune.ops.linear_token_logprobs import linear_token_logprobs
from pyllmtune.ops.token_logprobs import TokenLogprobs


class LogprobHead(nn.Module):
    """``linear_token_logprobs`` over the parameters of an ``nn.Linear``, the lm_head.

    Put it where the head was, or beside it: its parameters *are* those of ``linear``, so a tied
    embedding stays tied and one step of an optimiser moves all. ``state_dict`` has ``weight`` and,
    if there is one, ``bias``, as that of ``linear``: checkpoints fit both ways.

    Args:
        linear: ``nn.Linear(D, V)``; its parameters may be DTensors.
        logit_scale, softcap, backend: as of ``linear_token_logprobs``.

    Raises:
        TypeError: ``linear`` is not an ``nn.Linear``.

    >>> import torch
    >>> head = LogprobHead(torch.nn.Linear(2, 3, bias=False))
    >>> head(torch.zeros(1, 2), torch.tensor([1])).logprobs.exp()
    tensor([0.3333], grad_fn=<ExpBackward0>)
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        backend: Backend = "auto",
    ) -> None:
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        super().__init__()
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.logit_scale, self.softcap, self.backend = logit_scale, softcap, backend

    def forward(self, hidden: Tensor, tokens: Tensor, **options: Any) -> TokenLogprobs:
        """``options``: temperature, mask, kept, process_group, vocab_start, workspace_bytes."""
        fixed = {name: getattr(self, name) for name in ("logit_scale", "softcap", "backend")}
        scores = linear_token_logprobs(
            hidden, self.weight, tokens, bias=self.bias, **fixed, **options
        )
        # FSDP2 hooks onto results; an operation in place on one that is a view takes the hook off
        return TokenLogprobs(*(score.clone() for score in scores))

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        vocab, width = self.weight.shape
        return (
            f"{width}, {vocab}, bias={self.bias is not None}, logit_scale={self.logit_scale}, "
            f"softcap={self.softcap}, backend={self.backend!r}"
        )
