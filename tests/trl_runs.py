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
# the assistant's words are marked, for losses of them alone
CHAT = (
    "{% for one in messages %}{% if one.role == 'assistant' %}{% generation %}"
    "{{ one.content + ' <eos> ' }}{% endgeneration %}"
    "{% else %}{{ one.content + ' ' }}{% endif %}{% endfor %}"
)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>", *WORDS]
    model = models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    words = Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT,
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
    from trl import GRPOConfig, GRPOTrainer

    return _online(GRPOTrainer, GRPOConfig, settings)


def rloo(**settings) -> list[dict]:
    from trl import RLOOConfig, RLOOTrainer

    return _online(RLOOTrainer, RLOOConfig, settings)


def _online(trainer: type, config_type: type, settings: dict) -> list[dict]:
    """The log of a run whose reward counts the word "seven"."""
    from datasets import Dataset

    def sevens(completions, **_):
        return [float(text.split().count("seven")) + 0.1 * len(text) for text in completions]

    prompts = Dataset.from_dict(
        {"prompt": [f"{a} plus {b} equals" for a in WORDS[:4] for b in WORDS[:4]]}
    )
    with tempfile.TemporaryDirectory() as folder:
        config = config_type(
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
            trainer(
                model=model(folder),
                reward_funcs=sevens,
                args=config,
                train_dataset=prompts,
                processing_class=tokenizer(),
            )
        )


def dpo(**settings) -> list[dict]:
    from trl import DPOConfig, DPOTrainer

    return _offline(DPOTrainer, DPOConfig, _pairs(), settings)


def kto(**settings) -> list[dict]:
    from trl import KTOConfig, KTOTrainer

    answers = {
        "prompt": [f"{word} plus one equals" for word in WORDS[:8]],
        "completion": [
            f" {word} yes" if i % 2 else f" {word} no no" for i, word in enumerate(WORDS[:8])
        ],
        "label": [bool(i % 2) for i in range(8)],
    }
    return _offline(KTOTrainer, KTOConfig, answers, settings)


def orpo(**settings) -> list[dict]:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return _offline(ORPOTrainer, ORPOConfig, _pairs(), settings)


def cpo(**settings) -> list[dict]:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return _offline(CPOTrainer, CPOConfig, _pairs(), settings)


def sft(**settings) -> list[dict]:
    from trl import SFTConfig, SFTTrainer

    sums = [(f"{a} plus {b} equals", "yes") for a in WORDS[:4] for b in WORDS[:4]]
    if settings.get("assistant_only_loss"):
        roles = ("user", "assistant")
        talks = [
            [{"role": role, "content": text} for role, text in zip(roles, one, strict=True)]
            for one in sums
        ]
        texts = {"messages": talks}
    else:
        texts = {"text": [" ".join(one) for one in sums]}
    return _offline(SFTTrainer, SFTConfig, texts, {"max_length": 16, **settings})


def _pairs() -> dict[str, list[str]]:
    return {
        "prompt": [f"{word} plus one equals" for word in WORDS[:8]],
        "chosen": [f" {word} yes" for word in WORDS[1:9]],
        "rejected": [f" {word} no no" for word in WORDS[1:9]],
    }


def _offline(trainer: type, config_type: type, rows: dict[str, list], settings: dict) -> list[dict]:
    import datasets

    datasets.disable_caching()  # precomputed log-probs are the run's own, not those of the last one
    try:
        with tempfile.TemporaryDirectory() as folder:
            settings = {"per_device_train_batch_size": 4, **settings}
            return _train(
                trainer(
                    model=model(folder),
                    args=config_type(**_arguments(folder, **settings)),
                    train_dataset=datasets.Dataset.from_dict(rows),
                    processing_class=tokenizer(),
                )
            )
    finally:
        datasets.enable_caching()


RUNS = {"grpo": grpo, "rloo": rloo, "dpo": dpo, "kto": kto, "sft": sft}
