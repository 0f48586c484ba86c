"""The model that ``generate`` prepared, as a function of new tokens."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.utils import ALL_CACHE_NAMES

from pyllmtune.decoding.beam_search import reorder_cache

PRIVATE = (
    "_prefill",
    "_update_model_kwargs_for_generation",
    "_valid_auto_compile_criteria",
    "prepare_inputs_for_generation",
)


class Runner:
    """The model as a function of new tokens and of the rows that they continue."""

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        kwargs: dict[str, Any],
        config: GenerationConfig,
    ) -> None:
        self.model, self.tokens, self.kwargs, self.config = model, input_ids, kwargs, config
        # as transformers' sampling does: a static cache on a GPU
        compiled = model._valid_auto_compile_criteria(kwargs, config)
        self._forward = model.get_compiled_call(config.compile_config) if compiled else model

    @property
    def cache_name(self) -> str:
        return next((name for name in ALL_CACHE_NAMES if name in self.kwargs), "past_key_values")

    def prefill(self) -> Tensor:
        first = not self.config.is_assistant
        return self._logits(
            self.model._prefill(self.tokens, self.config, self.kwargs, is_first_iteration=first)
        )

    def run(self) -> Tensor:
        """The logits after the last token."""
        inputs = self.model.prepare_inputs_for_generation(
            self.tokens,
            next_sequence_length=1 if self.kwargs["use_cache"] else None,
            **self.kwargs,
        )
        return self._logits(self._forward(**inputs, return_dict=True))

    def append(self, tokens: Tensor) -> None:
        self.tokens = torch.cat((self.tokens, tokens[:, None]), dim=1)

    def followed_by(self, rows: Tensor, tokens: Tensor) -> Tensor:
        return torch.cat((self.tokens[rows], tokens[:, None]), dim=1)

    def step(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Go on with ``tokens`` after ``rows`` of the present batch."""
        self.tokens = self.followed_by(rows, tokens)
        cache = self.kwargs.get(self.cache_name)
        if hasattr(self.model, "_reorder_cache"):
            self.kwargs[self.cache_name] = self.model._reorder_cache(cache, rows)
        elif cache is not None:
            reorder_cache(cache, rows)
        return self.run()

    def _logits(self, outputs: Any) -> Tensor:
        self.kwargs = self.model._update_model_kwargs_for_generation(
            outputs, self.kwargs, is_encoder_decoder=self.model.config.is_encoder_decoder
        )
        return outputs.logits[:, -1]


def owned(logits: Tensor) -> Tensor:
    """A float32 copy for the caller: a compiled model may write the next step's logits over these,
    and a view of them would hold those of the whole prompt.
    """
    return logits.to(torch.float32, copy=True)


def refuse(model: PreTrainedModel, config: GenerationConfig) -> None:
    missing = [name for name in PRIVATE if not hasattr(model, name)]
    if missing:
        raise RuntimeError(
            f"transformers {transformers.__version__} has no {', '.join(missing)}: this module is "
            "written against 5.23, use that version or the plain generate"
        )
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise ValueError(
            "output_attentions and output_hidden_states are not supported here; "
            "leave them out, or leave custom_generate out"
        )
