"""TRL's GRPOTrainer, as it is and with one line of ours: the same numbers, less time and memory.

    python examples/trl_grpo.py                                     # a small random Llama; a minute
    python examples/trl_grpo.py --smoke                             # seconds
    python examples/trl_grpo.py --vocab 151936 --hidden 896 --dtype bfloat16 --batch 16 --length 32

Both runs are in processes of their own, on the same seeds, and every logged number is compared.
No downloads: a random model, a tokenizer that splits at spaces, a reward that counts a word.
Needs trl 1.16.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import tempfile
import time

WORD = "w7"  # what the reward counts
RELATIVE, ABSOLUTE = 1e-5, 2e-6  # of a logged number, for float32
TIMES = ("runtime", "per_second", "step_time")


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


def train(words: argparse.Namespace, patched: bool) -> dict:
    """One run: what was logged, seconds, memory, and the calls of our functions."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    calls: dict[str, int] = {}
    if patched:
        import pyllmtune.integrations.trl

        calls = pyllmtune.integrations.trl.patch().calls  # this is the line

    prompts = [f"w{i} w{i + 1} w{i + 2}" for i in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=words.batch,
            num_generations=words.batch,
            max_completion_length=words.length,
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
        losses: list[float] = []
        compute_loss = trainer.compute_loss

        def timed(*args, **kwargs):  # forward with the loss; its backward is in the step
            began = time.perf_counter()
            loss = compute_loss(*args, **kwargs)
            losses.append(time.perf_counter() - began)
            return loss

        trainer.compute_loss = timed
        trainer.train()
    log = trainer.state.log_history
    steps = [entry["step_time"] for entry in log if "step_time" in entry]
    return {
        "log": log,
        "seconds a step": sorted(steps)[len(steps) // 2],
        "of which the loss, forward": sorted(losses)[len(losses) // 2],
        "peak memory, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
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
    parser.add_argument("--batch", type=int, default=8, help="answers to a question")
    parser.add_argument("--length", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--steps", type=int, default=5)
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
    print(f"{'':<28}{'TRL':>12}{'patched':>12}{'ratio':>8}")
    for name in ("seconds a step", "of which the loss, forward", "peak memory, MiB"):
        ratio = theirs[name] / ours[name]
        print(f"{name:<28}{theirs[name]:>12.3f}{ours[name]:>12.3f}{ratio:>8.2f}")
    print(f"{'calls of ours':<28}{theirs['calls of ours']:>12}{ours['calls of ours']:>12}")

    if words.dtype != "float32":
        print("logs are not compared: TRL rounds the logits to bfloat16, we do not")
        return 0
    found = differences(ours["log"], theirs["log"], RELATIVE)
    print("\n".join(found) or f"{len(ours['log'])} log entries, every number the same")
    return 1 if found or not ours["calls of ours"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
