"""dpo_loss: every type and divergence against its formula in float64, and at extreme values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyllmtune import dpo_loss
from pyllmtune.losses.dpo_types import SCORED, SMOOTHED, SORTED, TYPES
from tests.helpers import FORWARD, assert_close
from tests.preference_cases import BETA, PAIRS, batch, log_sigmoid, sigmoid

SMOOTHING, TAU, ALPHA = 0.1, 0.5, 0.7


def score(ratio: Tensor, divergence: str) -> Tensor:
    """f'(t) of the ratio t, for f with f'(1) = 0."""
    t = torch.exp(ratio)
    return {
        "reverse_kl": torch.log(t),
        "forward_kl": 1 - 1 / t,
        "js_divergence": torch.log(2 * t / (1 + t)),
        "alpha_divergence": (t ** (ALPHA - 1) - 1) / (ALPHA - 1),
    }[divergence]


def written_out(loss_type: str, divergence: str, smoothing: float, averaged: bool) -> Tensor:
    """The mean loss of ``batch()`` of the current seed, from the papers' formulas."""
    b = batch()
    c, r = b["chosen"] - b["ref_chosen"], b["rejected"] - b["ref_rejected"]
    u, v = score(c, divergence), score(r, divergence)
    x = BETA * (u - v)
    per_token = u / b["chosen_n"] - v / b["rejected_n"]

    def smoothed(margin: Tensor) -> Tensor:
        return -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)

    if loss_type == "exo_pair":
        p, q = torch.stack((sigmoid(x), sigmoid(-x))), [1 - smoothing, smoothing]
        return (p * (p.log() - torch.tensor(q, dtype=torch.float64).log()[:, None])).sum(0).mean()
    if loss_type == "aot":
        own = torch.sort(b["chosen"] - b["rejected"]).values
        return smoothed(
            BETA * (own - torch.sort(b["ref_chosen"] - b["ref_rejected"]).values)
        ).mean()
    gate = sigmoid(x / TAU)
    return {
        "sigmoid": lambda: smoothed(x),
        "sigmoid_norm": lambda: smoothed(BETA * per_token),
        "hinge": lambda: torch.where(x < 1, 1 - x, 0.0),
        "ipo": lambda: ((per_token if averaged else u - v) - 1 / (2 * BETA)) ** 2,
        "nca_pair": lambda: (
            -log_sigmoid(BETA * c) - log_sigmoid(-BETA * c) / 2 - log_sigmoid(-BETA * r) / 2
        ),
        "robust": lambda: (
            (-(1 - smoothing) * log_sigmoid(x) + smoothing * log_sigmoid(-x)) / (1 - 2 * smoothing)
        ),
        "bco_pair": lambda: -log_sigmoid(BETA * c) - log_sigmoid(-BETA * r),
        "sppo_hard": lambda: (c - 1 / (2 * BETA)) ** 2 + (r + 1 / (2 * BETA)) ** 2,
        "aot_unpaired": lambda: smoothed(BETA * (torch.sort(c).values - torch.sort(r).values)),
        "apo_zero": lambda: 1 - sigmoid(BETA * c) + sigmoid(BETA * r),
        "apo_down": lambda: sigmoid(BETA * c) + 1 - sigmoid(BETA * (c - r)),
        "discopop": lambda: -log_sigmoid(x) * (1 - gate) + torch.exp(-x) * gate,
        "sft": lambda: -b["chosen"].sum() / b["chosen_n"].sum(),
    }[loss_type]().mean()


def dpo_cases() -> list[tuple[str, str, float, bool]]:
    cases = []
    for name in TYPES:
        smoothings = [0.0, SMOOTHING] if name in SMOOTHED else [0.0]
        smoothings = smoothings[1:] if name == "exo_pair" else smoothings
        kinds = ["reverse_kl"]
        if name in SCORED:
            kinds += ["forward_kl", "js_divergence", "alpha_divergence"]
        averages = [True, False] if name == "ipo" else [True]
        cases += [(name, kind, s, mean) for kind in kinds for s in smoothings for mean in averages]
    return cases


def options_of(loss_type: str, divergence: str, smoothing: float) -> dict[str, object]:
    return {
        "beta": BETA,
        "loss_type": loss_type,
        "label_smoothing": smoothing,
        "f_divergence": divergence,
        "alpha": ALPHA,
        "discopop_tau": TAU,
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", dpo_cases(), ids=lambda case: "-".join(map(str, case)))
def test_dpo_types_are_their_formulas(case, dtype):
    *what, averaged = case
    want = written_out(*case)
    torch.manual_seed(0)  # the same batch again
    b = batch(dtype)
    lengths = {"chosen_lengths": b["chosen_n"], "rejected_lengths": b["rejected_n"]}
    values = [b[name] for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")]
    got = dpo_loss(*values, **options_of(*what), **(lengths if averaged else {}))
    assert got.dtype == dtype
    # float32: an error of the inputs, 4e-7 of a log-prob of 10, passes through squares and e^r
    assert_close(got, want, FORWARD[dtype] * (1 if dtype == torch.float64 else 10), case[0])


@pytest.mark.parametrize("case", dpo_cases(), ids=lambda case: "-".join(map(str, case)))
def test_dpo_gradient(case):
    *what, averaged = case
    b = batch()
    lengths = {"chosen_lengths": b["chosen_n"], "rejected_lengths": b["rejected_n"]}
    refs = b["ref_chosen"], b["ref_rejected"]

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        options = options_of(*what) | (lengths if averaged else {})
        return dpo_loss(chosen, rejected, *refs, **options, reduction="none")

    leaves = [b[name].requires_grad_() for name in ("chosen", "rejected")]
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", dpo_cases(), ids=lambda case: "-".join(map(str, case)))
def test_dpo_is_finite_at_extremes(case, dtype):
    *what, averaged = case
    far = torch.tensor([1e4, -1e4, 0.0])
    chosen, rejected = (x.to(dtype).requires_grad_() for x in torch.cartesian_prod(far, far).T)
    refs = torch.zeros_like(chosen), torch.zeros_like(chosen)
    lengths = {"chosen_lengths": torch.ones(9), "rejected_lengths": torch.ones(9)}
    options = options_of(*what) | (lengths if averaged else {})
    if case[0] == "discopop":
        options["discopop_tau"] = 0.05  # above 1 the exponential itself has no bound
    loss = dpo_loss(chosen, rejected, *refs, **options)
    loss.backward()
    if case[0] == "ipo" and case[1] in ("forward_kl", "alpha_divergence"):
        assert loss > 1e30 or loss == math.inf  # a square of e^80
    else:
        assert loss.isfinite()
    assert chosen.grad.isfinite().all()
    assert case[0] == "sft" or rejected.grad.isfinite().all()
    assert chosen.grad.any() or case[1] != "reverse_kl"  # something pulls


def test_dpo_without_a_reference_and_reductions():
    b = batch()
    pair = b["chosen"], b["rejected"]
    zeros = torch.zeros(PAIRS, dtype=torch.float64)
    each = dpo_loss(*pair, reduction="none")
    assert torch.equal(each, dpo_loss(*pair, zeros, zeros, reduction="none"))
    assert torch.equal(dpo_loss(*pair, reduction="sum"), each.sum())
    assert torch.equal(dpo_loss(*pair), each.sum() / PAIRS)
    weights = torch.rand(PAIRS, dtype=torch.float64, requires_grad=True)
    weighted = dpo_loss(*pair, weights=weights, reduction="none")
    assert torch.equal(weighted, each * weights) and not weighted.requires_grad
    halves = [
        dpo_loss(*(x[part] for x in pair), reduction="sum") for part in (slice(3), slice(3, 9))
    ]
    torch.testing.assert_close(sum(halves) / PAIRS, each.mean())


def test_the_reference_is_a_constant():
    leaves = [batch()[name].requires_grad_() for name in ("chosen", "rejected", "ref_chosen")]
    dpo_loss(leaves[0], leaves[1], leaves[2], leaves[2]).backward()
    assert leaves[0].grad.any() and leaves[2].grad is None


@pytest.mark.parametrize("loss_type", [name for name in TYPES if name not in ("exo_pair", "sft")])
def test_no_pair_has_loss_0_and_a_gradient(loss_type):
    none = torch.zeros(0, requires_grad=True)
    lengths = {"chosen_lengths": torch.ones(0), "rejected_lengths": torch.ones(0)}
    loss = dpo_loss(none, none, loss_type=loss_type, **lengths)
    loss.backward()
    assert loss == 0 and none.grad.shape == (0,)


def test_sorted_types_are_the_only_ones_that_depend_on_the_order_of_one_side():
    b = batch()
    order = torch.randperm(PAIRS)
    sides = [b[name] for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")]
    lengths = {"chosen_lengths": b["chosen_n"], "rejected_lengths": b["rejected_n"]}
    for name in TYPES:
        smoothing = 0.1 if name == "exo_pair" else 0.0
        options = {"loss_type": name, "label_smoothing": smoothing, "reduction": "none"}
        each = dpo_loss(*sides, **lengths, **options)
        shuffled = dpo_loss(
            *(x[order] for x in sides), **{k: n[order] for k, n in lengths.items()}, **options
        )
        if name in SORTED:
            assert torch.equal(each, shuffled)  # both in the order of the sort
        else:
            assert torch.equal(each[order], shuffled)


def test_half_precision_is_read_and_computed_in_float32():
    chosen, rejected = torch.tensor([-2.0, -5.0]), torch.tensor([-3.0, -4.0])
    want = dpo_loss(chosen, rejected)
    for dtype in (torch.bfloat16, torch.float16):
        got = dpo_loss(chosen.to(dtype), rejected.to(dtype))
        assert got.dtype == torch.float32 and torch.equal(got, want)
