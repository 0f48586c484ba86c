"""The policy loss that ``patch(policy_loss=True)`` puts into ``GRPOTrainer``: loss, gradient and
log are TRL's own, on a stub that has what TRL's function reads.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from tests import helpers
from tests.test_presets_trl import (
    LOSSES,
    PLAIN,
    B,
    T,
    batch,
    stub_trainer,
    trainer_inputs,
)

OURS = tuple(name for name in LOSSES if name != "vespo")


@pytest.fixture(autouse=True)
def _trl():
    helpers.need("trl")


def run(function, trainer, inputs: dict[str, Tensor], leaf: Tensor) -> tuple[Tensor, Tensor, dict]:
    loss = function(trainer, None, inputs)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad, {mode: dict(log) for mode, log in trainer._metrics.items()}


def both(loss_type: str, level: str = "token", *, change=lambda trainer, inputs: None, **options):
    """TRL's result, ours, and how often ours left the work to TRL."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    from pyllmtune.integrations.trl_loss import compute_loss

    fallen = Counter()

    def original(*arguments):
        fallen["original"] += 1
        return GRPOTrainer._compute_loss(*arguments)

    options, x, results = PLAIN | options, batch(), []
    x["lp"].requires_grad_()
    for function in (GRPOTrainer._compute_loss, compute_loss(original)):
        trainer, inputs = stub_trainer(loss_type, level, options, x), trainer_inputs(options, x)
        trainer._metrics["eval"] = type(trainer._metrics["train"])(list)
        change(trainer, inputs)
        results.append(run(function, trainer, inputs, x["lp"]))
    return *results, fallen["original"]


def assert_same(*arguments, ours: bool = True, **options) -> None:
    want, got, fallen = both(*arguments, **options)
    assert fallen == (0 if ours else 1)
    torch.testing.assert_close(got[:2], want[:2], rtol=1e-5, atol=1e-7)
    for mode in ("train", "eval"):
        log, expected = got[2].get(mode, {}), want[2].get(mode, {})
        assert log.keys() == expected.keys()
        for name, values in expected.items():
            assert log[name] == pytest.approx(values, rel=1e-5, abs=1e-7, nan_ok=True), name


@pytest.mark.parametrize("loss_type", OURS)
@pytest.mark.parametrize("level", ("token", "sequence"))
def test_loss_gradient_and_log(loss_type, level):
    for beta, corrected, weighted in itertools.product((0.0, 0.04), (False, True), (False, True)):
        assert_same(loss_type, level, beta=beta, corrected=corrected, weighted=weighted)


@pytest.mark.parametrize("loss_type", OURS)
def test_masks_dual_clip_and_evaluation(loss_type):
    def evaluate(trainer, inputs):
        trainer.model.training = False

    assert_same(loss_type, delta=1.5, off_policy=0.05, top_entropy=0.5, beta=0.04)
    assert_same(loss_type, change=evaluate)


def test_the_log_counts_what_is_clipped():
    def change(trainer, inputs):  # every ratio e or 1 / e: clipped where the advantage agrees
        x = trainer._get_per_token_logps_and_entropies()[0].detach()
        inputs["old_per_token_logps"] = x + torch.tensor([[1.0], [1.0], [-1.0], [1.0]])

    assert_same("grpo", change=change)
    _, (_, _, log), _ = both("grpo", change=change)
    tokens = (7, 3, 1, 5)  # advantages +, -, +, -
    assert log["train"]["clip_ratio/low_mean"] == [pytest.approx((3 + 5) / sum(tokens))]
    assert log["train"]["clip_ratio/high_mean"] == [pytest.approx(1 / sum(tokens))]
    assert log["train"]["clip_ratio/low_min"] == [0.0]
    assert log["train"]["clip_ratio/high_max"] == [1.0]


def test_optional_inputs():
    def change(trainer, inputs):
        inputs["old_per_token_logps"] = None
        inputs["advantages"] = inputs["advantages"][:, None]
        inputs["tool_mask"] = (torch.arange(T) % 3 > 0).long().expand(B, T)

    assert_same("dapo", change=change)

    def per_token(trainer, inputs):
        inputs["advantages"] = torch.randn(B, T, generator=torch.Generator().manual_seed(1))

    assert_same("grpo", change=per_token)


def test_an_empty_answer_and_no_answer_at_all():
    def one(trainer, inputs):
        inputs["completion_mask"][2] = 0

    def every(trainer, inputs):
        inputs["completion_mask"].zero_()

    for loss_type in OURS:
        assert_same(loss_type, "token", change=one)
        assert_same(loss_type, "sequence", change=one)
        assert_same(loss_type, "token", change=every)
    _, (_, _, log), _ = both("grpo", change=every)
    assert math.isnan(log["train"]["clip_ratio/low_min"][0])


@pytest.mark.parametrize(
    "loss_type, options, change",
    [
        ("vespo", {}, {}),
        ("grpo", {"bonus": 0.02}, {}),
        ("grpo", {"delta": 1.1}, {}),
        ("grpo", {}, {"epsilon_high": -0.1}),
        ("grpo", {}, {"epsilon_low": 1.5}),
        ("cispo", {}, {"epsilon_high": 0.9}),
    ],
)
def test_what_our_op_does_not_express_is_trls(loss_type, options, change):
    def apply(trainer, inputs):
        vars(trainer).update(change)

    assert_same(loss_type, ours=False, change=apply, **options)


def test_a_token_that_is_not_finite_is_dropped():
    """TRL's loss would be NaN, and the step lost."""

    def change(trainer, inputs):
        inputs["old_per_token_logps"] = inputs["old_per_token_logps"].clone()
        inputs["old_per_token_logps"][0, 1] = math.nan

    want, (loss, grad, _), _ = both("dapo", change=change)
    assert not want[0].isfinite() and loss.isfinite()
    assert grad.isfinite().all() and grad[0, 1] == 0 and (grad[0, [0, 2]] != 0).all()
