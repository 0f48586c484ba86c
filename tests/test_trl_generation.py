"""``patch(generation=True)``: GRPO's answers come from our sampler, and every log-prob is that of
the tokens it kept, wherever TRL's shuffling and splitting has put the answer.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import helpers, trl_runs
from tests.test_trl import _alone, assert_same_log  # noqa: F401  a fixture

helpers.need("trl")
trl_integration = pytest.importorskip("pyllmtune.integrations.trl")

FILTERS = {"top_p": 0.7, "top_k": 6, "temperature": 0.8}


def truncated_logprobs(
    model, tokens: Tensor, attention: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of the last ``length`` tokens under what transformers' warpers leave."""
    from transformers import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    warpers = LogitsProcessorList(
        [
            TemperatureLogitsWarper(FILTERS["temperature"]),
            TopKLogitsWarper(FILTERS["top_k"]),
            TopPLogitsWarper(FILTERS["top_p"]),
        ]
    )
    with torch.no_grad():
        logits = model(tokens, attention_mask=attention).logits[:, -length - 1 : -1]
        scores = warpers(None, logits.reshape(-1, logits.shape[-1])).view_as(logits)
        every = scores.log_softmax(-1)
        entropy = -torch.where(every.isfinite(), every.exp() * every, 0.0).sum(-1)
        return every.gather(-1, tokens[:, -length:, None])[..., 0], entropy


@pytest.fixture
def watched(monkeypatch):
    """How many tokens TRL scored at a time; each time they must have been scored as drawn."""
    from trl import GRPOTrainer

    seen: list[int] = []
    with trl_integration.patch(generation=True, policy_loss=True):
        compute = GRPOTrainer._get_per_token_logps_and_entropies

        def watch(self, model, input_ids, attention_mask, logits_to_keep, *rest, **options):
            tokens = (input_ids, attention_mask, logits_to_keep)
            result = compute(self, model, *tokens, *rest, **options)
            answers = attention_mask[:, -logits_to_keep:].bool()
            for got, want in zip(result[:2], truncated_logprobs(model, *tokens), strict=True):
                if got is not None:
                    close = {"rtol": 1e-4, "atol": 1e-5}  # float32 of two forward passes
                    torch.testing.assert_close(got.detach()[answers], want[answers], **close)
            seen.append(int(answers.sum()))
            return result

        with monkeypatch.context() as patch:
            patch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", watch)
            yield seen


@pytest.mark.parametrize("steps_per_generation, iterations, beta", [(2, 1, 0.0), (4, 2, 0.04)])
def test_scored_is_what_was_drawn(watched, steps_per_generation, iterations, beta):
    """With a learning rate of 0 the kept sets can be had again, from the model as it is."""
    log = trl_runs.grpo(
        learning_rate=0.0,
        gradient_accumulation_steps=2,
        steps_per_generation=steps_per_generation,
        num_iterations=iterations,
        beta=beta,
        max_steps=4,
        **FILTERS,
    )
    # every micro-batch; per generation, the reference and, with iterations, the old policy
    assert len(watched) >= 8 and min(watched) >= 4
    if beta:  # the model has not moved: nothing is between it and its reference on the kept set
        assert all(abs(step["kl"]) < 1e-6 for step in log[:-1])
    assert all(step["clip_ratio/region_mean"] == 0.0 for step in log[:-1])


def test_without_filters_the_whole_vocabulary_counts():
    with trl_integration.patch(generation=True) as patched:
        first = trl_runs.grpo(beta=0.04)
        again = trl_runs.grpo(beta=0.04)
    assert patched.calls["GRPOTrainer._generate_single_turn"] >= 2
    assert_same_log(first, again)  # seeds are the trainer's


def test_a_run_learns_on_the_kept_set():
    with trl_integration.patch(generation=True, policy_loss=True):
        log = trl_runs.grpo(max_steps=12, learning_rate=3e-2, **FILTERS)
    rewards = [step["reward"] for step in log[:-1]]
    assert sum(rewards[-3:]) > sum(rewards[:3])


def test_every_name_is_restored():
    from trl import GRPOTrainer
    from trl.trainer import grpo_trainer

    names = [name for name in vars(GRPOTrainer) if not name.startswith("__")]
    before = {name: vars(GRPOTrainer)[name] for name in names}
    unwrap = grpo_trainer.unwrap_model_for_generation
    patched = trl_integration.patch(generation=True, policy_loss=True)
    changed = {name for name in names if vars(GRPOTrainer)[name] is not before[name]}
    assert changed == {
        "_compute_loss",
        "_generate_and_score_completions",
        "_generate_single_turn",
        "_get_per_token_logps_and_entropies",
        "_prepare_inputs",
    }
    assert {f"trl.trainer.grpo_trainer.GRPOTrainer.{name}" for name in changed} <= set(
        patched.changed
    )
    trl_integration.unpatch()
    assert all(vars(GRPOTrainer)[name] is before[name] for name in names)
    assert grpo_trainer.unwrap_model_for_generation is unwrap
