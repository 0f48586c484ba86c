"""Each preset against an independent transcription of its trainer's formula: loss and gradient."""

from __future__ import annotations

import math

import pytest
import torch

from pyllmtune import PolicyLossConfig, grpo_loss, policy_loss
from pyllmtune.losses.covariance import clip_cov_weights, kl_cov_reference
from pyllmtune.losses.presets import PRESETS, explain, get
from tests import helpers, preset_formulas
from tests.preset_formulas import FORMULAS

B, T = 6, 9
# trainers whose loss counts an empty answer as ratio 1, a constant without gradient
COUNT_EMPTY = ("lecture", "trl.rloo")
ROLLOUT_IS_OLD = ("prime_rl.default",)


def case(name: str) -> tuple[torch.Tensor, ...]:
    """Log-probs, old, advantages, mask, reference; float64. An empty answer, one of one token, and
    for trainers that clamp, log-ratios beyond the clamp.
    """
    lp = -3 * torch.rand(B, T, dtype=torch.float64)
    old = lp + 0.4 * torch.randn(B, T, dtype=torch.float64)
    A = torch.tensor([1.2, -0.7, 0.3, -1.5, 0.9, 0.0], dtype=torch.float64)
    mask = torch.rand(B, T) > 0.3
    mask[:, 0] = True
    mask[4, 1:] = False
    if name not in COUNT_EMPTY:
        mask[1] = False
    if get(name).config.log_ratio_limit < math.inf or name == "verl.gspo":
        old[0, 0], old[3, 0] = lp[0, 0] - 25, lp[3, 0] + 25
        old[4, 0] = lp[4, 0] - 15  # the mean log-ratio of a sequence above 10
    ref = old if name in ROLLOUT_IS_OLD else lp + 0.5 * torch.randn(B, T, dtype=torch.float64)
    return lp, old, A, mask, ref


def assert_equal(name: str, want_loss: torch.Tensor, loss: torch.Tensor, lp: torch.Tensor) -> None:
    (want,) = torch.autograd.grad(want_loss, lp)
    (got,) = torch.autograd.grad(loss, lp)
    tolerance = 1e-7 if name.startswith("verl") else 1e-12  # verl divides by n + 1e-8
    torch.testing.assert_close(loss, want_loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_every_preset_has_its_formula():
    assert set(PRESETS) == set(FORMULAS) | {"verl.clip_cov", "verl.kl_cov"}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("backend", ("reference", "cpp"))
def test_preset_equals_its_trainers_formula(name, backend):
    lp, old, A, mask, ref = case(name)
    lp.requires_grad_()
    formula, divisor = FORMULAS[name]
    m = mask.double()
    config = PolicyLossConfig.preset(name)
    out = policy_loss(
        lp,
        old,
        A,
        mask,
        ref_logprobs=ref if config.kl != "none" else None,
        normalizer=float(divisor(m)),
        config=config,
        backend=helpers.use(backend),
    )
    assert_equal(name, formula(lp, old, A, m, ref), out.loss, lp)


@pytest.mark.parametrize("name", FORMULAS)
def test_accumulated_micro_batches_give_the_loss_of_the_large_batch(name):
    """With the divisor of the large batch, in halves."""
    lp, old, A, mask, ref = case(name)
    config = PolicyLossConfig.preset(name)
    divisor = float(FORMULAS[name][1](mask.double()))

    def loss_and_gradient(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = lp[part].float().requires_grad_()
        given = ref[part].float() if config.kl != "none" else None
        loss = policy_loss(
            leaf,
            old[part].float(),
            A[part].float(),
            mask[part],
            ref_logprobs=given,
            normalizer=divisor,
            config=config,
        ).loss
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    whole = loss_and_gradient(slice(0, B))
    halves = [loss_and_gradient(part) for part in (slice(0, 2), slice(2, B))]
    torch.testing.assert_close(halves[0][0] + halves[1][0], whole[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([half[1] for half in halves]), whole[1], rtol=1e-6, atol=0)


def test_clip_cov_equals_verl():
    lp, old, A, mask, _ = case("verl.clip_cov")
    lp, A = (8 * lp).requires_grad_(), 2 * A
    m = mask.double()
    weights = clip_cov_weights(lp, old, A, mask, fraction=0.1)
    drawn = weights == 0
    ratio = (lp.detach() - old).exp()
    bound = ((A[:, None] > 0) & (ratio > 1.2)) | ((A[:, None] < 0) & (ratio < 0.8))
    cov = torch.zeros_like(m)
    cov[mask] = preset_formulas.covariance(lp, A, m)
    among = mask & ~bound & (cov > 1) & (cov < 5)
    assert drawn.sum() == min(max(1, int(0.1 * m.sum())), int(among.sum())) > 0
    assert not (drawn & ~among).any()
    seen = sum(clip_cov_weights(lp, old, A, mask, fraction=0.1) == 0 for _ in range(200))
    assert torch.equal(seen > 0, among)  # a random choice: each candidate is drawn at times
    config = PolicyLossConfig.preset("verl.clip_cov")
    out = policy_loss(lp, old, A, mask, weights=weights, config=config)
    want = preset_formulas.verl_clip_cov(lp, old, A, m, drawn)
    assert_equal("verl.clip_cov", want, out.loss, lp)


@pytest.mark.parametrize("fraction", (2e-4, 0.3))
def test_kl_cov_equals_verl(fraction):
    lp, old, A, mask, _ = case("verl.kl_cov")
    lp.requires_grad_()
    reference = kl_cov_reference(lp, old, A, mask, fraction=fraction)
    config = PolicyLossConfig.preset("verl.kl_cov")
    out = policy_loss(lp, old, A, mask, ref_logprobs=reference, config=config)
    want = preset_formulas.verl_kl_cov(lp, old, A, mask.double(), fraction)
    assert_equal("verl.kl_cov", want, out.loss, lp)


def test_covariance_passes_of_an_empty_batch():
    lp, mask = torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool)
    assert (clip_cov_weights(lp, lp, torch.ones(2), mask) == 1).all()
    assert kl_cov_reference(lp, lp, torch.ones(2), mask).isnan().all()


def test_topr_by_raw_score():
    """ROLL splits by the score, not by the sign of the advantage: w = 1 where it is positive."""
    lp, old, A, mask, _ = case("roll.topr")
    lp.requires_grad_()
    score = torch.tensor([1.0, 0.0, 0.0, 1.0, -1.0, 1.0])[:, None]
    base = torch.where(score > 0, lp.detach(), old)
    config = PolicyLossConfig(rule="cispo", eps_low=1.0, eps_high=0.0)
    out = policy_loss(lp, base, A, mask, config=config)
    w = torch.where(score > 0, 1.0, (lp - old).exp().clamp(0, 1).detach())
    want = preset_formulas.token_mean(-w * A[:, None] * lp, mask.double())
    assert_equal("roll.topr", want, out.loss, lp)


def test_a_preset_can_be_changed():
    config = PolicyLossConfig.preset("trl.grpo", kl="k3", kl_coef=0.04)
    assert config.aggregation == "seq-mean-token-mean" and config.kl_coef == 0.04
    with pytest.raises(ValueError, match=r"preset must be one of lecture, .*; got 'grpo'"):
        PolicyLossConfig.preset("grpo")
    with pytest.raises(TypeError, match="epsilon"):
        PolicyLossConfig.preset("trl.grpo", epsilon=0.1)


def test_explain_names_what_differs(capsys):
    explain("verl.vanilla", "trl.dapo")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["cap", "log_ratio_limit", "normalizer"]
    assert lines[1].split() == ["cap", "3.0", "None"]
    explain("trl.grpo", "trl.grpo")
    assert capsys.readouterr().out.splitlines() == []


def test_grpo_loss_takes_a_preset():
    lp, old, A, mask, _ = case("trl.grpo")
    got = grpo_loss(lp, old, A, mask, preset="trl.gspo").loss
    config = PolicyLossConfig.preset("trl.gspo")
    assert torch.equal(got, policy_loss(lp, old, A, mask, config=config).loss)
    with pytest.raises(ValueError, match=r"preset='trl.gspo' sets every option of the loss"):
        grpo_loss(lp, old, A, mask, preset="trl.gspo", eps_low=0.1)
