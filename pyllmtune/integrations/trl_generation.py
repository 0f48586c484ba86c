"""Answers of TRL's ``GRPOTrainer`` drawn by :func:`pyllmtune.sample`, and scored over the tokens
that the sampler kept.

With top-k, top-p or min-p an answer comes from a truncated distribution, while the trainer's
log-probs are those of the whole vocabulary: the ratio is then one of another pair of policies
("keep sampling mask", DeepSeek-V3.2). Here the kept set of every token goes with its answer,
through TRL's shuffling and splitting, to every log-prob of it: policy, old policy and reference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyllmtune.integrations.patching import Seam
from pyllmtune.kept import KeptTokens

_TRAINER = "trl.trainer.grpo_trainer"
_KEY = "pyllmtune_kept"  # in TRL's batches, and on the trainer: a KeptTokens per answer

_steps: list[KeptTokens] | None = None  # of the generate call that runs
_rows: list[KeptTokens] | None = None  # of the tokens to be scored, in order; taken head by head


class _Sampler:
    """The model as TRL's generation sees it: ``generate`` draws by our loop."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, *arguments: Any, **options: Any) -> Any:
        from pyllmtune.integrations import transformers as fused

        return self._model.generate(
            *arguments, **options, custom_generate=fused.sample, kept=_steps
        )


def _unwrap(original: Any) -> Any:
    @contextlib.contextmanager
    def unwrap_model_for_generation(*arguments: Any, **options: Any) -> Iterator[Any]:
        with original(*arguments, **options) as model:
            yield model if _steps is None else _Sampler(model)

    return unwrap_model_for_generation


def _generate(original: Any) -> Any:
    def _generate_single_turn(self: Any, *arguments: Any, **options: Any) -> Any:
        global _steps
        elsewhere = self.use_vllm or self.use_transformers_continuous_batching
        if elsewhere or (self.generation_config.num_beams or 1) > 1:
            return original(self, *arguments, **options)
        steps: list[KeptTokens] = []
        _steps = steps
        try:
            result = original(self, *arguments, **options)
        finally:
            _steps = None
        kept = None
        if steps and not self.tools:  # with tools an answer has tokens that nobody drew
            kept = KeptTokens.from_steps(steps).split([len(steps)] * steps[0].num_rows)
        setattr(self, _KEY, kept)
        return result

    return _generate_single_turn


def _remember(original: Any) -> Any:
    def _generate_and_score_completions(self: Any, inputs: Any) -> dict[str, Any]:
        setattr(self, _KEY, None)
        batch = original(self, inputs)
        kept = getattr(self, _KEY)
        return batch if kept is None else batch | {_KEY: kept}

    return _generate_and_score_completions


def _recall(original: Any) -> Any:
    def _prepare_inputs(self: Any, generation_batch: Any) -> dict[str, Any]:
        batch = original(self, generation_batch)
        setattr(self, _KEY, batch.get(_KEY))
        return batch

    return _prepare_inputs


def _score(original: Any) -> Any:
    def _get_per_token_logps_and_entropies(
        self: Any, model: Any, input_ids: Tensor, attention_mask: Tensor, *rest: Any, **options: Any
    ) -> Any:
        global _rows
        kept = getattr(self, _KEY, None)
        if kept is None:
            return original(self, model, input_ids, attention_mask, *rest, **options)
        logits_to_keep = rest[0] if rest else options["logits_to_keep"]
        lengths = attention_mask[:, -logits_to_keep:].sum(1).tolist()
        _rows = [
            part.split([length, part.num_rows - length])[0]
            for part, length in zip(kept, lengths, strict=True)
        ]
        try:
            result = original(self, model, input_ids, attention_mask, *rest, **options)
            if sum(part.num_rows for part in _rows):
                raise RuntimeError(
                    "TRL scored fewer tokens than the sampler drew; without generation=True it "
                    "scores the whole vocabulary"
                )
        finally:
            _rows = None
        return result

    return _get_per_token_logps_and_entropies


def take_kept(tokens: Tensor) -> KeptTokens | None:
    """The kept sets of the next ``tokens`` ``[N]`` to be scored; None where the whole vocabulary
    counts.
    """
    global _rows
    if _rows is None:
        return None
    wanted, taken = tokens.numel(), []
    while wanted and _rows and _rows[0].num_rows <= wanted:
        taken.append(_rows.pop(0))
        wanted -= taken[-1].num_rows
    if wanted:
        raise RuntimeError(
            f"TRL scores {tokens.numel()} tokens at once, which are not the answers that were drawn"
        )
    none = torch.zeros(1, dtype=torch.int64, device=tokens.device)
    return KeptTokens.cat(taken) if taken else KeptTokens(none, none[:0].int())


GENERATION = (
    Seam(
        _TRAINER,
        "unwrap_model_for_generation",
        (
            "model",
            "accelerator",
            "gather_deepspeed3_params",
            "generation_kwargs",
            "gradient_checkpointing_kwargs",
        ),
        _unwrap,
        everywhere=False,
    ),
    Seam(
        _TRAINER,
        "GRPOTrainer._generate_single_turn",
        (
            "self",
            "prompt_ids",
            "images",
            "multimodal_fields",
            "num_generations",
            "has_tool_images",
        ),
        _generate,
        everywhere=False,
    ),
    Seam(
        _TRAINER,
        "GRPOTrainer._generate_and_score_completions",
        ("self", "inputs"),
        _remember,
        everywhere=False,
    ),
    Seam(
        _TRAINER,
        "GRPOTrainer._prepare_inputs",
        ("self", "generation_batch"),
        _recall,
        everywhere=False,
    ),
    Seam(
        _TRAINER,
        "GRPOTrainer._get_per_token_logps_and_entropies",
        (
            "self",
            "model",
            "input_ids",
            "attention_mask",
            "logits_to_keep",
            "batch_size",
            "compute_entropy",
            "compute_aux_loss",
            "pixel_values",
            "image_grid_thw",
            "num_images",
            "pixel_attention_mask",
            "spatial_shapes",
            "num_tiles",
            "image_sizes",
            "token_type_ids",
            "mm_token_type_ids",
            "image_position_ids",
        ),
        _score,
        everywhere=False,
    ),
)
