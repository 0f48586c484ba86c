"""Beam search in place of the loop of ``generate``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import (
    GenerateBeamDecoderOnlyOutput,
    GenerateBeamEncoderDecoderOutput,
)

from pyllmtune.decoding.beam_loop import BeamLoop, Settings
from pyllmtune.decoding.sample_beams import seeds_of
from pyllmtune.integrations.transformers.runner import Runner, owned, refuse
from pyllmtune.integrations.transformers.sampling import sample
from pyllmtune.ops.temperature_softmax import temperature_softmax


def beam_search(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    seed: int | Tensor | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateBeamDecoderOnlyOutput | GenerateBeamEncoderDecoderOutput:
    """Beam search as ``generate(num_beams=...)`` does it, on ``beam_step``: the same sequences and
    scores.

    Where no logits processor is active, a step is one read of the logits in the dtype of the model;
    otherwise log-probs are made and processed as in transformers. The results differ from
    transformers' where two sums are within rounding, or where fewer continuations than beams are
    possible at all. The returned cache is None: that of the beams which lost is of no use.

    With ``do_sample=True`` candidates are drawn without replacement by ``sample_beams``, from the
    distribution that transformers draws from; ``generate(..., seed=...)``, one or ``[B]`` int64,
    makes them reproducible, and without it they are those of torch's generator.

    Raises:
        ValueError: attentions or hidden states are asked for.
        RuntimeError: a method of the model that this needs is not there.
    """
    config = generation_config
    if config.num_beams == 1:
        arguments = (model, input_ids, logits_processor, stopping_criteria, config)
        return sample(*arguments, seed=seed, **model_kwargs)
    refuse(model, config)
    beams, prompt = config.num_beams, input_ids.shape[1]
    items = input_ids.shape[0] // beams
    runner = Runner(model, input_ids, model_kwargs, config)
    all_scores: list[Tensor] = []
    all_logits: list[Tensor] = []
    keep = config.return_dict_in_generate
    keep_scores, keep_logits = keep and config.output_scores, keep and config.output_logits

    def scored(logits: Tensor) -> Tensor:
        """Log-probs where somebody changes or wants them, else the logits."""
        if keep_logits:
            all_logits.append(owned(logits))
        if not logits_processor and not keep_scores:
            return logits
        logprobs = temperature_softmax(logits, log=True, dtype=torch.float32)
        if logits_processor:
            logprobs = logits_processor(runner.tokens, logprobs)
        if keep_scores:
            all_scores.append(logprobs)
        return logprobs

    eos = () if config._eos_token_tensor is None else tuple(config._eos_token_tensor.tolist())
    settings = Settings(
        num_beams=beams,
        max_length=config.max_length - prompt,
        eos=eos,
        length_penalty=config.length_penalty,
        early_stopping=config.early_stopping,
        do_sample=bool(config.do_sample),
        seeds=seeds_of(seed, None, items, input_ids.device) if config.do_sample else None,
    )
    settings.check()
    usual = (MaxLengthCriteria, EosTokenCriteria)
    loop = BeamLoop(
        items,
        settings,
        lambda rows, tokens: scored(runner.step(rows, tokens)),
        # others may end a sequence for any reason: they are shown every candidate
        ends=None
        if all(type(criterion) in usual for criterion in stopping_criteria)
        else lambda rows, tokens: stopping_criteria(runner.followed_by(rows, tokens), None),
        normalised=bool(logits_processor),
    )
    loop.run(scored(runner.prefill()))

    sequences, indices, scores = _collect(loop, input_ids, config, eos)
    if not keep:
        return sequences
    encoder_decoder = model.config.is_encoder_decoder
    kind = GenerateBeamEncoderDecoderOutput if encoder_decoder else GenerateBeamDecoderOnlyOutput
    return kind(
        sequences=sequences,
        sequences_scores=scores if config.output_scores else None,
        scores=tuple(all_scores) if keep_scores else None,
        logits=tuple(all_logits) if keep_logits else None,
        beam_indices=indices,
    )


def _collect(
    loop: BeamLoop, input_ids: Tensor, config: GenerationConfig, eos: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences, beam indices and scores, padded as transformers pads them."""
    beams, (rows, prompt), count = config.num_beams, input_ids.shape, config.num_return_sequences
    found = [loop.finished(item)[:count] for item in range(rows // beams)]
    length = max((len(one.tokens) for item in found for one in item), default=0)
    pad = config._pad_token_tensor
    # transformers takes a padding id of 0 for none
    fill = -1 if not eos else int(pad) if pad is not None and pad else eos[0]
    sequences = input_ids.new_full((len(found) * count, prompt + length), fill)
    indices = input_ids.new_full((len(sequences), length), -1, dtype=torch.int32)
    scores = input_ids.new_full((len(sequences),), -math.inf, dtype=torch.float32)
    sequences[:, :prompt] = input_ids[::beams].repeat_interleave(count, dim=0)
    for item, hypotheses in enumerate(found):
        for row, one in enumerate(hypotheses, start=item * count):
            here = len(one.tokens)
            sequences[row, prompt : prompt + here] = torch.tensor(one.tokens)
            indices[row, :here] = torch.tensor(one.parents, dtype=torch.int32) + item * beams
            scores[row] = one.score
    return sequences, indices, scores
