"""Preference losses beside DPO against formulas written out in float64, and what all refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyllmtune import (
    cpo_loss,
    dpo_loss,
    kto_loss,
    orpo_loss,
    preference_loss,
    preference_pairs,
    simpo_loss,
)
from tests.helpers import assert_close
from tests.preference_cases import BETA, PAIRS, batch, log_sigmoid, sigmoid


def test_preference_loss_margin_and_centring():
    chosen, rejected = torch.randn(2, PAIRS, dtype=torch.float64)
    margin = torch.rand(PAIRS, dtype=torch.float64)
    want = -log_sigmoid(chosen - rejected - margin) + 0.2 * (chosen + rejected) ** 2
    got = preference_loss(chosen, rejected, margin=margin, center=0.2, reduction="none")
    assert_close(got, want, 1e-12, "loss")
    assert_close(
        preference_loss(chosen, rejected, margin=0.5),
        -log_sigmoid(chosen - rejected - 0.5).mean(),
        1e-12,
        "loss",
    )
    leaves = [x.clone().requires_grad_() for x in (chosen, rejected)]
    assert torch.autograd.gradcheck(
        lambda c, r: preference_loss(c, r, margin=margin, center=0.2), leaves
    )
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    preference_loss(far, -far).backward()
    assert torch.equal(far.grad, torch.tensor([0.0, -1.0]))  # (sigmoid - 1) * 2 / 2


def test_pairs_of_rankings():
    def found(ranks: list[float], groups: list[int] | None = None) -> set[tuple[int, int]]:
        ids = None if groups is None else torch.tensor(groups)
        pairs = preference_pairs(torch.tensor(ranks), ids)
        return set(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True))

    assert found([3, 1, 2]) == {(1, 0), (1, 2), (2, 0)}
    assert found([1.0, 1.0, 2.0, math.nan]) == {(0, 2), (1, 2)}  # a tie and NaN say nothing
    assert found([1, 2, 2, 1], [7, 5, 7, 5]) == {(0, 2), (3, 1)}
    assert found([]) == set()
    with pytest.raises(ValueError, match=r"ranks must be \[B\]"):
        preference_pairs(torch.zeros(2, 2))
    with pytest.raises(TypeError, match="group_ids must be one of int64"):
        preference_pairs(torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.5])
def test_simpo_and_alphapo(alpha):
    b = batch()
    c, r = b["chosen"] / b["chosen_n"], b["rejected"] / b["rejected_n"]

    def reward(mean: Tensor) -> Tensor:
        return mean if alpha == 0 else (1 - torch.exp(mean) ** -alpha) / alpha

    x = 1.5 * (reward(c) - reward(r)) - 0.4
    want = -0.9 * log_sigmoid(x) - 0.1 * log_sigmoid(-x)
    options = {"beta": 1.5, "gamma": 0.4, "alpha": alpha, "label_smoothing": 0.1}

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        lengths = b["chosen_n"], b["rejected_n"]
        return simpo_loss(chosen, rejected, *lengths, **options, reduction="none")

    leaves = [b[name].requires_grad_() for name in ("chosen", "rejected")]
    assert_close(loss(*leaves), want, 1e-12, "loss")
    assert torch.autograd.gradcheck(loss, leaves)
    far = torch.tensor([-1e4, -1e4, 0.0], requires_grad=True)
    one = torch.ones(3)
    simpo_loss(far, far.detach().flip(0), one, one, alpha=alpha).backward()
    assert far.grad.isfinite().all()


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_cpo(loss_type):
    b = batch()
    gap = b["chosen"] - b["rejected"]
    nll = -b["chosen"].sum() / b["chosen_n"].sum()
    preferred = {
        "sigmoid": -log_sigmoid(BETA * gap),
        "hinge": (1 - BETA * gap).clamp(min=0),
        "ipo": (gap - 1 / (2 * BETA)) ** 2,
    }[loss_type]
    options = {"beta": BETA, "loss_type": loss_type, "nll_coef": 0.7}

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return cpo_loss(chosen, rejected, b["chosen_n"], **options)

    leaves = [b[name].requires_grad_() for name in ("chosen", "rejected")]
    assert_close(loss(*leaves), preferred.mean() + 0.7 * nll, 1e-12, "loss")
    assert torch.autograd.gradcheck(loss, leaves)
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    cpo_loss(far, -far, torch.ones(2), loss_type=loss_type).backward()
    assert far.grad.isfinite().all() and far.grad.any()


def test_orpo():
    b = batch()
    p, q = (torch.exp(b[n] / b[f"{n}_n"]) for n in ("chosen", "rejected"))
    nll = -b["chosen"].sum() / b["chosen_n"].sum()
    want = nll - 0.2 * log_sigmoid(torch.log(p / (1 - p)) - torch.log(q / (1 - q))).mean()

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return orpo_loss(chosen, rejected, b["chosen_n"], b["rejected_n"], beta=0.2)

    leaves = [b[name].requires_grad_() for name in ("chosen", "rejected")]
    assert_close(loss(*leaves), want, 1e-12, "loss")
    assert torch.autograd.gradcheck(loss, leaves)


def test_orpo_where_the_odds_have_no_digits():
    """A naive log(1 - e^x) is -inf at 0 and 1e4 below; float32 must stay close to float64."""
    ends = torch.tensor([0.0, -1e-6, -1e-3, -0.7, -20.0, -1e4])
    chosen, rejected = (x.clone().requires_grad_() for x in torch.cartesian_prod(ends, ends).T)
    one = torch.ones(len(chosen))
    loss = orpo_loss(chosen, rejected, one, one, nll_coef=0.0, reduction="none")
    loss.sum().backward()
    assert chosen.grad.isfinite().all() and rejected.grad.isfinite().all()
    x, y = (z.detach().double().clamp(max=-(2.0**-23)) for z in (chosen, rejected))
    odds = [z - torch.log(-torch.expm1(z)) for z in (x, y)]
    want = 0.1 * torch.nn.functional.softplus(odds[1] - odds[0])
    torch.testing.assert_close(loss.detach().double(), want, rtol=1e-6, atol=1e-7)


def test_kto():
    b = batch()
    marks = torch.tensor([True, False, True, True, False, False, True])
    mismatched = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    for shift in (2.0, -5.0):  # the estimate of the KL: above 0, and below, where it is held
        kl = torch.clamp((mismatched + shift).mean(), min=0)
        d = b["chosen"] - b["ref_chosen"]
        want = torch.where(
            marks, 1.5 * (1 - sigmoid(BETA * (d - kl))), 0.5 * (1 - sigmoid(BETA * (kl - d)))
        )
        options = {"beta": BETA, "desirable_weight": 1.5, "undesirable_weight": 0.5}

        def loss(logprobs: Tensor, shift: float = shift, options: dict = options) -> Tensor:
            return kto_loss(
                logprobs,
                marks,
                b["ref_chosen"],
                mismatched_logratios=mismatched + shift,
                **options,
            )

        leaf = b["chosen"].clone().requires_grad_()
        assert_close(loss(leaf), want.mean(), 1e-12, "loss")
        assert torch.autograd.gradcheck(loss, leaf)
        assert mismatched.grad is None
    far = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    kto_loss(far, torch.tensor([True, True, False, False])).backward()
    assert far.grad.isfinite().all()


ONES = torch.ones(2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dpo_loss([1.0], ONES), TypeError, "chosen_logprobs must be a torch.Tensor"),
        (lambda: dpo_loss(torch.ones(2, 2), ONES), ValueError, "sum token log-probs"),
        (lambda: dpo_loss(ONES, torch.ones(3)), ValueError, r"rejected_logprobs must have shape"),
        (lambda: dpo_loss(ONES, ONES, ONES), ValueError, "give both ref_chosen_logprobs"),
        (lambda: dpo_loss(ONES, ONES, beta=0.0), ValueError, "beta must be positive"),
        (lambda: dpo_loss(ONES, ONES, loss_type="dpo"), ValueError, "one of sigmoid, hinge"),
        (lambda: dpo_loss(ONES, ONES, label_smoothing=0.5), ValueError, r"in \[0, 0.5\)"),
        (
            lambda: dpo_loss(ONES, ONES, loss_type="hinge", label_smoothing=0.1),
            ValueError,
            "has no meaning for loss_type='hinge'",
        ),
        (lambda: dpo_loss(ONES, ONES, loss_type="exo_pair"), ValueError, "needs a positive label"),
        (
            lambda: dpo_loss(ONES, ONES, loss_type="apo_zero", f_divergence="forward_kl"),
            ValueError,
            "f_divergence='forward_kl' has no meaning",
        ),
        (lambda: dpo_loss(ONES, ONES, f_divergence="kl"), ValueError, "f_divergence must be one"),
        (lambda: dpo_loss(ONES, ONES, loss_type="sft"), ValueError, "needs chosen_lengths"),
        (
            lambda: dpo_loss(ONES, ONES, loss_type="ipo", chosen_lengths=ONES),
            ValueError,
            "needs rejected_lengths",
        ),
        (
            lambda: dpo_loss(ONES, ONES, loss_type="aot", weights=ONES),
            ValueError,
            "sorts them apart",
        ),
        (lambda: dpo_loss(ONES, ONES, reduction="avg"), ValueError, "mean, sum, none, got 'avg'"),
        (lambda: preference_loss(ONES, ONES, center=-1.0), ValueError, "center must be at least"),
        (
            lambda: preference_loss(ONES, ONES, margin=torch.ones(3)),
            ValueError,
            "margin must have shape",
        ),
        (
            lambda: simpo_loss(ONES, ONES, torch.ones(3), ONES),
            ValueError,
            "chosen_lengths must have shape",
        ),
        (lambda: simpo_loss(ONES, ONES, ONES, ONES, gamma=math.nan), ValueError, "gamma must be"),
        (lambda: cpo_loss(ONES, ONES, ONES, loss_type="simpo"), ValueError, "sigmoid, hinge, ipo"),
        (
            lambda: cpo_loss(ONES, ONES, ONES, loss_type="ipo", label_smoothing=0.1),
            ValueError,
            "belongs to loss_type='sigmoid'",
        ),
        (lambda: orpo_loss(ONES, ONES, ONES, ONES, beta=-1.0), ValueError, "beta must be positive"),
        (lambda: kto_loss(ONES, ONES), TypeError, "desirable must be one of bool"),
        (
            lambda: kto_loss(ONES, ONES > 0, desirable_weight=-1.0),
            ValueError,
            "desirable_weight must be at least 0",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
