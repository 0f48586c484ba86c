"""The full product level x rule x KL x gradient x aggregation x limits of policy_loss, and what
happens at its edges: overflow, one-token sequences, nothing selected, nothing finite.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from pyllmtune import PolicyLossConfig, policy_loss
from pyllmtune.losses.config import Aggregation, KlEstimator, KlGradient, Rule
from pyllmtune.losses.metrics import SUMS
from tests import helpers
from tests.policy_cases import LEVELS, batch, compare, run

LIMITS = {
    "log_ratio_limit": 0.6,
    "score_limits": (-0.4, 0.5),
    "kl_input_limit": 0.4,
    "kl_limit": 0.05,
}
CAPPED = ("ppo", "dppo-tv", "dppo-kl")
PAIRS = [
    (level, rule)
    for level, rule in itertools.product(LEVELS, Rule.__args__)
    if level != "geometric" or rule == "unclipped"
]


def configs(level: str, rule: str) -> Iterator[PolicyLossConfig]:
    """KL x gradient x aggregation x limits of one level and rule: 170, with terms that matter."""
    kls = [("none", "plain"), *itertools.product(KlEstimator.__args__[1:], KlGradient.__args__)]
    for (kl, gradient), aggregation, limits in itertools.product(
        kls, Aggregation.__args__, ({}, LIMITS)
    ):
        yield PolicyLossConfig(
            level=level,
            rule=rule,
            eps_low=0.1,
            eps_high=0.15,
            cap=1.5 if rule in CAPPED else None,
            dro_beta=0.3,
            kl=kl,
            kl_gradient=gradient,
            kl_coef=0.0 if kl == "none" else 0.3,
            entropy_coef=0.05,
            aggregation=aggregation,
            **limits,
        )


def uneven_batch(length: int = 11):
    """A full sequence, a random one, an empty one, one of one token."""
    data = batch(4, length)
    data["mask"][0] = True
    data["mask"][2] = False
    data["mask"][3] = torch.arange(length) == 2
    return data


@pytest.mark.parametrize("level, rule", PAIRS)
def test_full_product_in_float64(level, rule):
    """The closed form of the kernels is the autograd gradient of the reference, to rounding."""
    data = uneven_batch()
    for config in configs(level, rule):
        compare(data, config, "cpp", torch.float64)


@pytest.mark.parametrize("level, rule", PAIRS)
@pytest.mark.parametrize("backend", helpers.KERNELS)
def test_product_in_float32(backend, level, rule):
    """Every level and rule; KL, aggregation and limits in turn."""
    step = 7 if backend == "cpp" else 101
    start = PAIRS.index((level, rule))
    for config in itertools.islice(configs(level, rule), start % step, None, step):
        compare(uneven_batch(), config, backend)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("level", LEVELS)
def test_overflow_gives_no_nan(backend, level):
    """One token, log-ratio +-200, each sign of the advantage: e^200 is infinite in float32. Where
    float64 is finite in float32's range the values agree; elsewhere they are infinite, never NaN.
    """
    rules = [rule for other, rule in PAIRS if other == level]
    if backend not in ("reference", "cpp"):
        rules = rules[LEVELS.index(level) % 2 :: 2]  # the interpreters are slow; levels alternate
    for rule, log_ratio, advantage in itertools.product(rules, (200.0, -200.0), (1.0, 0.0, -1.0)):
        config = PolicyLossConfig(level=level, rule=rule, dro_beta=0.1)
        data = {
            "logprobs": torch.tensor([[log_ratio]]),
            "old_logprobs": torch.zeros(1, 1),
            "advantages": torch.tensor([advantage]),
        }
        loss, metrics, grad = run(data, config, helpers.use(backend), torch.float32)
        wide = {name: value.double() for name, value in data.items()}
        want, _, want_grad = run(wide, config, "reference", torch.float64)
        name = f"{rule} {log_ratio} {advantage}"
        helpers.assert_close(loss, want.float(), 1e-5, name)
        helpers.assert_close(grad, want_grad.float(), 1e-5, name)
        assert not metrics.isnan().any(), name


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf), ids=str)
def test_a_token_with_anything_not_finite_is_dropped_and_counted(backend, bad):
    """Every per-token input alike, and the advantage of a whole sequence."""
    config = PolicyLossConfig(
        level="sequence",
        rule="sapo",
        kl="k3",
        kl_coef=0.1,
        entropy_coef=0.1,
        aggregation="seq-mean-token-mean",
    )
    data = batch(3, 5, per_token=True)
    data["mask"][:] = True
    for name in [name for name in data if name != "mask"]:
        without = {key: value.clone() for key, value in data.items()}
        without["mask"][1, 3] = False
        broken = {key: value.clone() for key, value in data.items()}
        broken[name][1, 3] = bad
        got = run(broken, config, helpers.use(backend), torch.float32)
        want = run(without, config, backend, torch.float32)
        assert got[1][SUMS.index("dropped")] == 1 and want[1][SUMS.index("dropped")] == 0
        for index in (0, 2, 3):
            assert torch.equal(got[index], want[index]), name
    data["advantages"] = torch.tensor([0.5, bad, -0.5], dtype=torch.float64)
    loss, metrics, *grads = run(data, config, backend, torch.float32)
    assert metrics[SUMS.index("dropped")] == 5 and metrics[SUMS.index("sequences")] == 2
    assert loss.isfinite() and all((grad[1] == 0).all() for grad in grads)


def test_the_importance_corrected_kl_at_token_level_is_the_log_ratio():
    """w k3 has the gradient w (logprob - ref): the terms in e^d cancel, even overflowed."""
    logprobs = torch.tensor([[-1.0, -150.0]], requires_grad=True)
    old, ref = torch.tensor([[-1.5, -150.0]]), torch.tensor([[-0.4, 0.0]])
    config = PolicyLossConfig(kl="k3", kl_gradient="ratio", kl_coef=1.0, aggregation="constant")
    out = policy_loss(
        logprobs, old, torch.zeros(1), ref_logprobs=ref, normalizer=1.0, config=config
    )
    (grad,) = torch.autograd.grad(out.loss, logprobs)
    want = (logprobs - old).exp() * (logprobs - ref)
    torch.testing.assert_close(grad, want.detach())


def test_the_importance_corrected_kl_of_a_sequence_by_hand():
    """c [(1 - e^d) / n + sum k3 / n^2] for the mean over tokens, c the ratio of the sequence."""
    old, ref, logprobs = -torch.rand(3, 1, 5, dtype=torch.float64)
    logprobs.requires_grad_()
    config = PolicyLossConfig(
        level="sequence",
        kl="k3",
        kl_gradient="ratio",
        kl_coef=1.0,
        aggregation="seq-mean-token-mean",
    )
    out = policy_loss(
        logprobs, old, torch.zeros(1, dtype=torch.float64), ref_logprobs=ref, config=config
    )
    (grad,) = torch.autograd.grad(out.loss, logprobs)
    d = ref - logprobs.detach()
    k3 = d.exp() - d - 1
    ratio = (logprobs.detach() - old).mean().exp()
    torch.testing.assert_close(grad, ratio * ((1 - d.exp()) / 5 + k3.sum() / 25))
