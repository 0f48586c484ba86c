"""TRL's GRPOTrainer, as it is and with one line of ours: the same numbers, less time and memory.

    python examples/trl_grpo.py                                     # a small random Llama; a minute
    python examples/trl_grpo.py --smoke                             # seconds
    python examples/trl_grpo.py --vocab 151936 --hidden 896 --dtype bfloat16 --batch 16 --prompt 32
    python examples/trl_grpo.py --sampler --top-k 50                # answers drawn by ours, too

Both runs are in processes of their own, on the same seeds, and every logged number is compared;
with --sampler the draws are others, and times are all there is to compare.
No downloads: a random model, a tokenizer that splits at spaces, a reward that counts a word.
Needs trl 1.16.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace

WORD = "w7"  # what the reward counts
RELATIVE, ABSOLUTE = 1e-5, 2e-6  # of a logged number, for float32
TIMES = ("runtime", "per_second", "step_time")
MEMORY = "peak memory, MiB"


def random_model(words: argparse.Namespace, folder: str):
    """Saved to ``folder`` and loaded from there, as the trainer loads the reference again."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(words.seed)
    config = LlamaConfig(
        vocab_size=words.vocab,
        hidden_size=words.hidden,
        intermediate_size=2 * words.hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).to(getattr(torch, words.dtype)).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=words.dtype)


def word_tokenizer(vocab: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(vocab - 3))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def reward(completions: list[str], **_: object) -> list[float]:
    return [text.split().count(WORD) + len(text) / 1000 for text in completions]


class Stages:
    """Seconds of each stage of a step, by the clock and of the processor (all threads together)."""

    def __init__(self) -> None:
        self.steps: list[dict[str, list[float]]] = []  # stage: [clock, processor]
        self._began: dict[str, tuple[float, float]] = {}

    def begin(self, stage: str) -> None:
        if stage == "step":
            self.steps.append(defaultdict(lambda: [0.0, 0.0]))
        self._began[stage] = time.perf_counter(), time.process_time()

    def end(self, stage: str) -> None:
        for i, now in enumerate((time.perf_counter(), time.process_time())):
            self.steps[-1][stage][i] += now - self._began[stage][i]

    def timed(self, stage: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args, **kwargs):
            self.begin(stage)
            result = function(*args, **kwargs)
            self.end(stage)
            return result

        return run

    def head(self, function: Callable) -> Callable:
        """Forward is the call; backward, from the gradient of its result to its input's."""
        forward = self.timed("head", function)

        def run(hidden, *args):
            result = forward(hidden, *args)
            if hidden.requires_grad:
                result[0].register_hook(lambda _: self.begin("head"))
                hidden.register_hook(lambda _: self.end("head"))
            return result

        return run

    def medians(self) -> dict[str, list[float]]:
        """Without the first step, which allocates the optimiser's state."""
        steps = self.steps[1:] or self.steps
        return {
            stage: [statistics.median(step[stage][i] for step in steps) for i in (0, 1)]
            for stage in steps[0]
        }


def train(words: argparse.Namespace, patched: bool) -> dict:
    """One run: what was logged, seconds, memory, and the calls of our functions."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import trl.trainer.utils as scoring
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    if words.threads:
        torch.set_num_threads(words.threads)
    calls: dict[str, int] = {}
    if patched:
        import pyllmtune.integrations.trl

        patch = pyllmtune.integrations.trl.patch(policy_loss=True, generation=words.sampler)
        calls = patch.calls

    prompts = [" ".join(f"w{i + j}" for j in range(words.prompt)) for i in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=words.batch,
            num_generations=words.batch,
            max_completion_length=words.length,
            top_k=words.top_k,
            top_p=words.top_p,
            max_steps=words.steps,
            beta=0.04,
            learning_rate=1e-3,
            logging_steps=1,
            seed=words.seed,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=not words.progress,
        )
        trainer = GRPOTrainer(
            model=random_model(words, folder),
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=word_tokenizer(words.vocab),
        )
        stages = Stages()

        class Clock(TrainerCallback):
            def on_step_begin(self, *_, **__):
                stages.begin("step")

            def on_pre_optimizer_step(self, *_, **__):
                stages.begin("optimiser")

            def on_optimizer_step(self, *_, **__):
                stages.end("optimiser")

            def on_step_end(self, *_, **__):
                stages.end("step")

        trainer.add_callback(Clock())
        trainer._generate = stages.timed("generation", trainer._generate)
        scoring._ChunkedLogProbFunction = SimpleNamespace(
            apply=stages.head(scoring._ChunkedLogProbFunction.apply)
        )
        trainer.train()
    return {
        "log": trainer.state.log_history,
        "seconds": stages.medians(),
        MEMORY: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "calls of ours": sum(calls.values()),
    }


def differences(ours: list[dict], theirs: list[dict], relative: float) -> list[str]:
    """Every logged number that is not the same, times aside."""
    found = []
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        for name in b.keys() | a.keys():
            x, y = a.get(name), b.get(name)
            if any(word in name for word in TIMES) or x == y:
                continue
            if x is None or y is None or not abs(x - y) <= ABSOLUTE + relative * abs(y):
                found.append(f"step {step}, {name}: {y} without, {x} with the patch")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small sizes, seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a question")
    parser.add_argument("--batch", type=int, default=8, help="answers to a question")
    parser.add_argument("--length", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--top-k", type=int, default=0, help="of the answers; 0 is all")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus of the answers")
    parser.add_argument(
        "--sampler",
        action="store_true",
        help="the patched run draws by our sampler and scores the kept set; nothing is compared",
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its choice")
    parser.add_argument("--progress", action="store_true", help="TRL's progress bar")
    words = parser.parse_args(argv)
    if words.smoke:
        words.vocab, words.hidden, words.batch, words.length, words.steps = 500, 32, 4, 6, 2

    runs = {}
    context = multiprocessing.get_context("spawn")  # memory is that of a process
    for name, patched in (("TRL", False), ("patched", True)):
        with context.Pool(1) as pool:
            runs[name] = pool.apply(train, (words, patched))

    theirs, ours = runs["TRL"], runs["patched"]
    print(f"{'':<22}{'TRL':>12}{'patched':>12}{'ratio':>8}")

    def row(name: str, before: float, after: float) -> None:
        print(f"{name:<22}{before:>12.3f}{after:>12.3f}{before / max(after, 1e-9):>8.2f}")

    for i, kind in enumerate(("seconds", "processor")):
        for stage in theirs["seconds"]:
            row(f"{stage}, {kind}", theirs["seconds"][stage][i], ours["seconds"][stage][i])
    row(MEMORY, theirs[MEMORY], ours[MEMORY])
    print(f"{'calls of ours':<22}{theirs['calls of ours']:>12}{ours['calls of ours']:>12}")

    if words.sampler:
        print("other draws, other numbers: not compared")
        return 0 if ours["calls of ours"] else 1
    compared, relative = len(theirs["log"]), RELATIVE
    if words.dtype == "bfloat16":  # TRL rounds the logits, and from then on the weights differ
        compared, relative = 1, 2**-8
    found = differences(ours["log"][:compared], theirs["log"][:compared], relative)
    print("\n".join(found) or f"{compared} log entries compared, every number the same")
    return 1 if found or not ours["calls of ours"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
