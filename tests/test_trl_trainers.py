"""TRL's other trainers with and without the patch, and how often our functions scored for them."""

from __future__ import annotations

import pytest

from tests import trl_runs
from tests.test_trl import _alone, native_and_patched  # noqa: F401  the fixture is automatic

HEAD = "_ChunkedLogProbFunction"
STEPS = 2


@pytest.mark.parametrize("accumulation", (1, 2))
@pytest.mark.parametrize("beta", (0.0, 0.05))
def test_rloo_trains_the_same(beta, accumulation):
    patched = native_and_patched(trl_runs.rloo, beta=beta, gradient_accumulation_steps=accumulation)
    models = 3 if beta else 2  # the policy trained, the policy that sampled, and the reference
    assert patched.calls[HEAD] == models * accumulation * STEPS


# calls of a step: the policy and the reference, each on the answers and on those of the KL estimate
KTO = {
    "kto": ({}, 4 * STEPS),
    "accumulation": ({"gradient_accumulation_steps": 2, "max_steps": 2}, 4 * 2 * STEPS),
    "apo_zero_unpaired": ({"loss_type": "apo_zero_unpaired"}, 2 * STEPS),
    # the reference has scored all 8 answers, in batches of 4, before the first step
    "precomputed": ({"precompute_ref_log_probs": True}, 2 * 2 + 2 * STEPS),
}


@pytest.mark.parametrize("name", KTO)
def test_kto_trains_the_same(name):
    settings, calls = KTO[name]
    assert native_and_patched(trl_runs.kto, **settings).calls[HEAD] == calls


DPO = {
    "accumulation": ({"gradient_accumulation_steps": 2}, 2 * 2 * STEPS),
    "precomputed": ({"precompute_ref_log_probs": True}, 2 + STEPS),
    "padding_free": ({"padding_free": True}, 2 * STEPS),
    "several_losses": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, 2 * STEPS),
    "length_desensitised": ({"ld_alpha": 0.5}, 2 * STEPS),
}


@pytest.mark.parametrize("name", DPO)
def test_dpo_trains_the_same(name):
    settings, calls = DPO[name]
    assert native_and_patched(trl_runs.dpo, **settings).calls[HEAD] == calls


SFT = {
    "dft": {"loss_type": "dft"},
    "packing": {"packing": True},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "padding_free": {"padding_free": True, "max_length": None},
    "assistant_only": {"assistant_only_loss": True},
    # TRL makes the logits for this loss itself and takes only entropy and accuracy from the head
    "label_smoothing": {"label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("name", SFT)
def test_sft_trains_the_same(name):
    assert native_and_patched(trl_runs.sft, **SFT[name]).calls[HEAD] == STEPS


@pytest.mark.parametrize("name", ("orpo", "cpo"))
def test_experimental_trainers_score_logits_with_us(name):
    patched = native_and_patched(getattr(trl_runs, name))
    assert patched.calls["selective_log_softmax"] == STEPS
