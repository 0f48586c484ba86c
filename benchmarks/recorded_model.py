"""A language model of negligible cost for transformers' ``generate``: it returns what it was given.

What is then timed is the search alone, as it runs around a model that is fast enough.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class RecordedModel(PreTrainedModel, GenerationMixin):
    """Says ``logits[t]``, ``[rows, V]``, after t + 1 tokens, whatever they are."""

    config_class = PreTrainedConfig

    def __init__(self, logits: Tensor) -> None:
        super().__init__(PreTrainedConfig(vocab_size=logits.shape[-1], num_hidden_layers=1))
        self.recorded = logits  # [steps, rows, V]

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.recorded[input_ids.shape[1] - 1][:, None])

    @property
    def device(self):
        return self.recorded.device
