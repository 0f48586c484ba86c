"""Greedy decoding and sampling in place of the loop of ``generate``."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from pyllmtune.integrations.transformers.processors import split_warpers
from pyllmtune.integrations.transformers.runner import Runner, owned, refuse
from pyllmtune.kept import KeptTokens
from pyllmtune.ops.filter_logits import filter_logits
from pyllmtune.ops.sample import sample as draw


def sample(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    seed: int | Tensor | None = None,
    kept: list[KeptTokens] | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput | GenerateEncoderDecoderOutput:
    """Greedy decoding or sampling as ``generate`` does it, on ``sample``: the same distribution,
    drawn without a sort.

    Temperature, top-k, top-p and min-p go to ``sample`` if they are the last processors, as they
    are unless a rarer one follows; the others run before, as in transformers. A sequence depends on
    its own logits and seed alone, not on the batch.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: from
            ``generate``.
        seed: ``generate(..., seed=...)``: an integer from which each row gets its seed, or one per
            row, ``[B * num_return_sequences]`` int64. None draws them from torch's generator, so
            that ``torch.manual_seed`` works.
        kept: ``generate(..., kept=[])``: gets the kept set of every step, a row per sequence, of
            whatever top-k, top-p and min-p left; nothing if there are none.
            ``KeptTokens.from_steps`` puts them in the order of a trainer.

    Raises:
        ValueError: logits hold NaN or +inf, or allow nothing; attentions or hidden states are asked
            for.
        RuntimeError: a method of the model that this needs is not there.
    """
    config, rows = generation_config, input_ids.shape[0]
    refuse(model, config)
    before, filters = logits_processor, {"temperature": 0.0}  # greedy
    if config.do_sample:
        before, filters = split_warpers(logits_processor)
    if not isinstance(seed, Tensor):
        generator = None
        if seed is not None:
            generator = torch.Generator(input_ids.device).manual_seed(seed)
        seed = torch.randint(2**62, (rows,), generator=generator, device=input_ids.device)
    keep = config.return_dict_in_generate
    scores: list[Tensor] | None = [] if keep and config.output_scores else None
    raw: list[Tensor] | None = [] if keep and config.output_logits else None
    truncated = kept is not None and bool(filters.keys() - {"temperature"})
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)

    runner = Runner(model, input_ids, model_kwargs, config)
    logits = runner.prefill()
    running = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
    for position in itertools.count():
        if raw is not None:
            raw.append(owned(logits))
        if before:
            logits = before(runner.tokens, logits.float())
        if scores is not None:
            scores.append(
                filter_logits(logits.float(), **filters) if config.do_sample else owned(logits)
            )
        out = draw(logits, **filters, seed=seed, position=position, return_kept=truncated)
        if truncated:
            kept.append(out.kept)
        tokens = torch.where(running, out.tokens, config._pad_token_tensor) if ends else out.tokens
        runner.append(tokens)
        bad = running & ~out.valid
        running = running & ~stopping_criteria(runner.tokens, tuple(scores or ()) or None)
        more, failed = torch.stack((running.any(), bad.any())).tolist()  # the only sync of a step
        if failed:
            raise ValueError(
                f"the logits of row {int(bad.nonzero()[0])} hold NaN or +inf, or allow no token, "
                f"at new token {position}; look at the model's output there"
            )
        if not more:
            break
        logits = runner.run()

    encoder_decoder = model.config.is_encoder_decoder
    if not keep:
        return runner.tokens
    kind = GenerateEncoderDecoderOutput if encoder_decoder else GenerateDecoderOnlyOutput
    return kind(
        sequences=runner.tokens,
        scores=None if scores is None else tuple(scores),
        logits=None if raw is None else tuple(raw),
        past_key_values=runner.kwargs.get(runner.cache_name),
    )
