"""Beam search where greedy decoding loses, its picture, and the same search inside ``generate``.

    python examples/beam_search.py                            # seconds
    python examples/beam_search.py --picture docs/beam_search.png
    python examples/beam_search.py --smoke

First a language of ten words in which the most probable first word is not the best one: greedy
decoding follows it, three beams do not. Then transformers' ``generate`` with its own beam search
and with ours, on a small random Llama: the sequences and scores must be the same. Needs
transformers 5; the picture needs matplotlib.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

import pyllmtune

NEXT = {  # probabilities of the next word
    "we": {"often": 0.5, "can": 0.4, "will": 0.1},
    "often": {"try": 0.4, "tune": 0.35, "stop": 0.25},
    "can": {"tune": 0.9, "stop": 0.1},
    "will": {"stop": 0.6, "tune": 0.4},
    "try": {"again": 0.6, "models": 0.4},
    "tune": {"models": 0.8, "again": 0.2},
    "stop": {"again": 0.5, ".": 0.5},
    "again": {".": 1.0},
    "models": {".": 1.0},
    ".": {".": 1.0},
}
WORDS = list(NEXT)
START, END = WORDS.index("we"), WORDS.index(".")


def next_word(tokens: Tensor, cache: None = None) -> Tensor:
    """The model: logits ``[rows, words]`` after the last token of each row."""
    table = torch.zeros(len(WORDS), len(WORDS))
    for word, following in NEXT.items():
        for other, probability in following.items():
            table[WORDS.index(word), WORDS.index(other)] = probability
    return table.log()[tokens[:, -1]]


def search(beams: int, length: int = 5) -> pyllmtune.BeamSearchOutput:
    return pyllmtune.beam_search(
        next_word,
        torch.tensor([[START]]),
        num_beams=beams,
        num_return_sequences=beams,
        max_length=length,
        eos_token_id=END,
        return_trees=True,
    )


def greedy(length: int = 5) -> tuple[list[int], float]:
    """Tokens and their probability."""
    tokens, probability = [START], 1.0
    while tokens[-1] != END and len(tokens) <= length:
        out = pyllmtune.greedy(next_word(torch.tensor([tokens])), logprobs=True)
        tokens.append(int(out.tokens))
        probability *= float(out.logprobs.exp())
    return tokens[1:], probability


def sentence(tokens: list[int]) -> str:
    return " ".join(["we", *(WORDS[token] for token in tokens)])


def show_lecture_case(picture: str | None) -> bool:
    """Greedy and three beams; whether the beams win."""
    tokens, probability = greedy()
    out = search(beams=3)
    print(f"greedy        {probability:.3f}  {sentence(tokens)}")
    for rank in range(3):
        found = out.tokens[0, rank, : out.lengths[0, rank]].tolist()
        print(f"three beams   {float(out.scores[0, rank].exp()):.3f}  {sentence(found)}")
    if picture is not None:
        title = "Width 3: each word with the log-probability of the sentence so far"
        axes = pyllmtune.plot_search_tree(out.trees[0], label=WORDS.__getitem__, prompt="we")
        axes.set_title(title, fontsize=10)
        axes.figure.savefig(picture, bbox_inches="tight")
        print(f"picture in {picture}")
    return float(out.scores[0, 0].exp()) > probability


def compare_with_generate(vocab: int, batch: int, new_tokens: int) -> bool:
    """Both loops around one model; whether sequences and scores are the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from pyllmtune.integrations import transformers as fused

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.3,  # a fresh model's 0.02 leaves all tokens nearly equal
        eos_token_id=2,
        pad_token_id=3,
    )
    model = LlamaForCausalLM(config).eval()
    prompts = torch.randint(4, vocab, (batch, 5))
    words: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompts),
        "num_beams": 4,
        "max_new_tokens": new_tokens,
        "return_dict_in_generate": True,
    }
    results = {}
    for name, how in {
        "transformers": {},
        "pyllmtune": {"custom_generate": fused.beam_search},
    }.items():
        model.generate(prompts, **words, **how)  # warm
        began = time.perf_counter()
        model.generate(prompts, **words, **how)
        seconds = time.perf_counter() - began
        print(f"{name:<14}{batch * new_tokens / seconds:.0f} tokens a second")
        results[name] = model.generate(prompts, **words, **how, output_scores=True)
    theirs, ours = results["transformers"], results["pyllmtune"]
    apart = float((theirs.sequences_scores - ours.sequences_scores).abs().max())
    same = torch.equal(theirs.sequences, ours.sequences)
    print(f"same sequences: {same}; largest difference of a score: {apart:.1e}")
    return same and apart < 1e-4


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small sizes, seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", metavar="PNG", help="write the search tree there")
    words = parser.parse_args(argv)
    torch.manual_seed(words.seed)
    won = show_lecture_case(words.picture)
    sizes = (1000, 2, 6) if words.smoke else (128_256, 4, 16)
    return 0 if won and compare_with_generate(*sizes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
