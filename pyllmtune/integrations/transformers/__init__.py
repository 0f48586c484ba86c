"""Transformers' ``generate`` with our decoding, and the loss of its causal models.

    from pyllmtune.integrations import transformers as fused

    model.generate(**inputs, num_beams=4, custom_generate=fused.beam_search)
    model.generate(**inputs, do_sample=True, top_p=0.95, custom_generate=fused.sample, seed=7)
    model.loss_function = fused.causal_lm_loss

``generate`` prepares inputs, cache, logits processors and stopping criteria as always, and its loop
is replaced. Written against 5.23; the private methods of the model that are needed are checked for.
Transformers hands no streamer to a ``custom_generate`` function.
"""

from pyllmtune.integrations.transformers.beam_search import beam_search
from pyllmtune.integrations.transformers.loss import causal_lm_loss
from pyllmtune.integrations.transformers.processors import FilterLogits
from pyllmtune.integrations.transformers.sampling import sample

__all__ = ["FilterLogits", "beam_search", "causal_lm_loss", "sample"]
