"""Top-p sampling in a loop with a key-value cache, and the same from transformers' ``generate``.

    python examples/sample_with_cache.py            # a small random Llama; half a minute
    python examples/sample_with_cache.py --smoke    # seconds

The loop is what one would write for any model: run it on the new tokens, draw, append. ``generate``
is then led along the tokens that were drawn, and at each step its logits and its top-p distribution
are compared with ours. Last, both sample freely and are timed. Needs transformers 5.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

import pyllmtune

LOGITS = 1e-4  # largest difference of a logit: the loop and generate run the same model
DISTANCE = (
    1e-4  # total variation: a float32 running sum may place the edge of the nucleus elsewhere
)


def random_llama(vocab: int, hidden: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,  # twenty times the usual, so that a few tokens stand out
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def sample_loop(
    model: LlamaForCausalLM,
    prompts: Tensor,
    new_tokens: int,
    seeds: Tensor,
    temperature: float,
    top_p: float,
) -> tuple[Tensor, list[Tensor]]:
    """``[B, new_tokens]`` tokens and the logits ``[B, V]`` that each column was drawn from."""
    cache = DynamicCache(config=model.config)
    tokens, drawn, seen = prompts, [], []
    for position in range(new_tokens):
        logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        out = pyllmtune.sample(
            logits, temperature=temperature, top_p=top_p, seed=seeds, position=position
        )
        tokens = out.tokens[:, None]
        drawn.append(tokens)
        seen.append(logits)
    return torch.cat(drawn, dim=1), seen


class Lead(LogitsProcessor):
    """Makes ``generate`` take the given tokens, and keeps the logits that it had."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.logits = tokens, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = len(self.logits)
        self.logits.append(scores)
        return torch.full_like(scores, -torch.inf).scatter(1, self.tokens[:, step : step + 1], 0.0)


def compare(seen: list[Tensor], theirs: list[Tensor], temperature: float, top_p: float) -> dict:
    """Over all steps and rows: the largest differences of logits and of top-p distributions."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)])
    logits_apart = distance = 0.0
    same_sets = kept = rows = 0
    for ours, other in zip(seen, theirs, strict=True):
        filtered = pyllmtune.filter_logits(ours, temperature=temperature, top_p=top_p)
        warped = warpers(None, other)
        apart = (filtered.softmax(-1) - warped.softmax(-1)).abs().sum(-1) / 2
        logits_apart = max(logits_apart, float((ours - other).abs().max()))
        distance = max(distance, float(apart.max()))
        same_sets += int((filtered.isfinite() == warped.isfinite()).all(-1).sum())
        kept += int(filtered.isfinite().sum())
        rows += len(ours)
    return {
        "largest difference of a logit": logits_apart,
        "largest total variation of a distribution": distance,
        "rows with the same kept set": f"{same_sets} of {rows}",
        "tokens kept on average": round(kept / rows, 1),
        "agree": logits_apart <= LOGITS and distance <= DISTANCE,
    }


def tokens_per_second(run, tokens: int, repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return tokens / sorted(times)[len(times) // 2]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small sizes, seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    words = parser.parse_args(argv)
    if words.smoke:
        words.batch, words.new_tokens, words.vocab = 3, 8, 1000

    torch.manual_seed(words.seed)
    model = random_llama(words.vocab, hidden=64)
    prompts = torch.randint(words.vocab, (words.batch, 5))
    seeds = torch.randint(2**62, (words.batch,))  # one a sequence: rows are independent
    settings = (words.temperature, words.top_p)
    # what generate needs to run on to the last token and to sample as the loop does
    free = {
        "do_sample": True,
        "temperature": words.temperature,
        "top_p": words.top_p,
        "top_k": 0,
        "max_new_tokens": words.new_tokens,
        "attention_mask": torch.ones_like(prompts),
    }
    with torch.inference_mode():
        tokens, seen = sample_loop(model, prompts, words.new_tokens, seeds, *settings)
        lead = Lead(tokens)
        led = model.generate(prompts, logits_processor=LogitsProcessorList([lead]), **free)
        if not torch.equal(led[:, prompts.shape[1] :], tokens):
            raise RuntimeError("generate left the tokens that it was led along")
        facts = compare(seen, lead.logits, *settings)

        count, repeats = tokens.numel(), 1 if words.smoke else 3

        def loop() -> None:
            sample_loop(model, prompts, words.new_tokens, seeds, *settings)

        facts["tokens per second, the loop"] = round(tokens_per_second(loop, count, repeats))
        facts["tokens per second, generate"] = round(
            tokens_per_second(lambda: model.generate(prompts, **free), count, repeats)
        )
    for name, value in facts.items():
        print(f"{name:<44}{value}")
    return 0 if facts["agree"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
