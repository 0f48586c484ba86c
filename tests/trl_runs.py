"""Small runs of TRL's trainers: a tiny random Llama, a word tokenizer, no hub."""

from __future__ import annotations

import tempfile

WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "plus",
    "minus",
    "equals",
    "yes",
    "no",
]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>", *WORDS]
    model = models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    words = Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def model(folder: str, seed: int = 0):
    """Saved to ``folder`` and loaded from there, as the trainers load the reference again."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=3 + len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def _arguments(folder: str, **settings) -> dict:
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
        **settings,
    }


def _train(trainer) -> list[dict]:
    trainer.train()
    return trainer.state.log_history


def grpo(**settings) -> list[dict]:
    """The log of a run whose reward counts the word "seven"."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def sevens(completions, **_):
        return [float(text.split().count("seven")) + 0.1 * len(text) for text in completions]

    prompts = Dataset.from_dict(
        {"prompt": [f"{a} plus {b} equals" for a in WORDS[:4] for b in WORDS[:4]]}
    )
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            **_arguments(
                folder,
                **{
                    "per_device_train_batch_size": 4,
                    "num_generations": 4,
                    "max_completion_length": 6,
                    **settings,
                },
            )
        )
        return _train(
            GRPOTrainer(
                model=model(folder),
                reward_funcs=sevens,
                args=config,
                train_dataset=prompts,
                processing_class=tokenizer(),
            )
        )


def dpo(**settings) -> list[dict]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = Dataset.from_dict(
        {
            "prompt": [f"{word} plus one equals" for word in WORDS[:8]],
            "chosen": [f" {word} yes" for word in WORDS[1:9]],
            "rejected": [f" {word} no no" for word in WORDS[1:9]],
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(**_arguments(folder, per_device_train_batch_size=4, **settings))
        return _train(
            DPOTrainer(
                model=model(folder),
                args=config,
                train_dataset=pairs,
                processing_class=tokenizer(),
            )
        )


def sft(**settings) -> list[dict]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    texts = Dataset.from_dict(
        {"text": [f"{a} plus {b} equals yes" for a in WORDS[:4] for b in WORDS[:4]]}
    )
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            **_arguments(folder, per_device_train_batch_size=4, max_length=16, **settings)
        )
        return _train(
            SFTTrainer(
                model=model(folder), args=config, train_dataset=texts, processing_class=tokenizer()
            )
        )


RUNS = {"grpo": grpo, "dpo": dpo, "sft": sft}
