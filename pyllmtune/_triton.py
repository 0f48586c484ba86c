"""Registers the Triton floor. Triton itself is imported when one of its operators is first
called.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pyllmtune import _ops

# the module of pyllmtune.kernels that holds each operator's function, of the operator's name
_MODULES = {
    "token_logprobs": "token_logprobs",
    "token_logprobs_backward": "token_logprobs",
    "token_logprobs_backward_inplace": "token_logprobs",
    "kept_token_logprobs": "kept_token_logprobs",
    "kept_token_logprobs_backward": "kept_token_logprobs",
    "linear_token_logprobs_tile": "linear_token_logprobs",
    "linear_token_logprobs_tile_backward": "linear_token_logprobs",
    "kept_logits": "kept_logits",
    "kept_logits_backward_hidden": "kept_logits",
    "kept_logits_backward_weight": "kept_logits",
    "temperature_softmax": "temperature_softmax",
    "temperature_softmax_out": "temperature_softmax",
    "temperature_softmax_backward": "temperature_softmax",
    "filter_logits": "filter_logits",
    "filter_logits_out": "filter_logits",
    "filter_logits_backward": "filter_logits",
    "sample": "sample",
    "kl_divergence": "kl_divergence",
    "kl_divergence_backward": "kl_divergence",
    "beam_step": "beam_step",
    "policy_loss": "policy_loss",
    "gae": "gae",
}


def _register(word: str, module: str) -> None:
    def launch(*args: Any) -> Any:
        return getattr(import_module(f"pyllmtune.kernels.{module}"), word)(*args)

    for device in ("CPU", "CUDA"):  # on the CPU, under TRITON_INTERPRET=1
        _ops.LIBRARY.impl(_ops.op_name(word, "triton"), launch, device)


for _word, _module in _MODULES.items():
    _register(_word, _module)
