"""Weights and masks for tokens of another policy, against loops over sequences."""

from __future__ import annotations

import math

import pytest
import torch

from pyllmtune import policy_loss
from pyllmtune.losses.off_policy import (
    effective_sample_share,
    importance_weights,
    off_policy_sequence_mask,
    rejection_mask,
    top_entropy_mask,
)

B, T = 5, 8


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Old and rollout log-probs, and a mask with an empty row."""
    old = -2 * torch.rand(B, T)
    mask = torch.rand(B, T) > 0.3
    mask[2] = False
    return old, old + 0.6 * torch.randn(B, T), mask


def statistic(values: torch.Tensor, over: str) -> torch.Tensor:
    """Of the selected tokens of one sequence."""
    if over == "token":
        return values
    if len(values) == 0:
        return values
    number = {"sum": values.sum, "mean": values.mean, "max": values.max}[over]()
    return number.expand_as(values)


@pytest.mark.parametrize("over", ("token", "sum", "mean", "max"))
@pytest.mark.parametrize("mode", ("truncate", "mask"))
def test_importance_weights(over, mode):
    old, rollout, mask = case()
    got = importance_weights(old, rollout, mask, over=over, mode=mode, low=0.6, high=1.5)
    for row in range(B):
        select = mask[row]
        w = statistic((old - rollout)[row][select], over).exp()
        inside = (w >= 0.6) & (w <= 1.5)
        want = w.clamp(0.6, 1.5) if mode == "truncate" else w * inside
        torch.testing.assert_close(got[row][select], want)
        assert (got[row][~select] == 1).all()


@pytest.mark.parametrize("over", ("token", "sum"))
def test_packed_weights_are_the_padded_ones(over):
    old, rollout, mask = case()
    lengths = mask.sum(-1)
    ends = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
    padded = importance_weights(old, rollout, mask, over=over)
    packed = importance_weights(old[mask], rollout[mask], over=over, cu_seqlens=ends)
    torch.testing.assert_close(packed, padded[mask])


def test_log_ratios_are_limited_and_normalised_weights_have_mean_one():
    old, rollout = torch.tensor([[0.0, 0.0]]), torch.tensor([[-300.0, 300.0]])
    weights = importance_weights(old, rollout, high=math.inf)
    torch.testing.assert_close(weights, torch.tensor([[math.exp(20), math.exp(-20)]]))
    old, rollout, mask = case()
    weights = importance_weights(old, rollout, mask, normalize=True)
    torch.testing.assert_close(weights[mask].mean(), torch.tensor(1.0))


def test_what_is_not_finite_is_no_evidence():
    old, rollout, mask = case()
    mask[:] = True
    without = mask.clone()
    without[0, 3] = False
    rollout[0, 3] = math.nan
    weights = importance_weights(old, rollout, mask, over="sum")
    torch.testing.assert_close(
        weights[0, 0], importance_weights(old, rollout, without, over="sum")[0, 0]
    )
    keep = off_policy_sequence_mask(old, rollout, -torch.ones(B), mask, threshold=100.0)
    assert keep.all() and weights.isfinite().all()


@pytest.mark.parametrize("estimator", ("k1", "k2", "k3"))
@pytest.mark.parametrize("over", ("token", "sum", "mean", "max"))
def test_rejection_mask(estimator, over):
    old, rollout, mask = case()
    r = old - rollout
    divergence = {"k1": -r, "k2": r**2 / 2, "k3": r.exp() - 1 - r}[estimator]
    values = [statistic(divergence[row][mask[row]], over) for row in range(B)]
    low, high = torch.quantile(torch.cat(values), torch.tensor([0.3, 0.7])).tolist()
    limits = {"low": low - 1e-6, "high": high + 1e-6}  # rounding does not decide at the bound
    got = rejection_mask(old, rollout, mask, estimator=estimator, over=over, **limits)
    for row, value in enumerate(values):
        inside = (value >= limits["low"]) & (value <= limits["high"])
        assert torch.equal(got[row][mask[row]], inside)
    assert not (got & ~mask).any() and got.any() and not got[mask].all()


def test_effective_sample_share():
    weights, mask = torch.rand(B, T), torch.rand(B, T) > 0.3
    w = weights[mask]
    want = 1 / ((w / w.mean()) ** 2).mean()
    torch.testing.assert_close(effective_sample_share(weights, mask), want)
    assert effective_sample_share(weights, torch.zeros_like(mask)) == 0


@pytest.mark.parametrize("per_token", (False, True))
def test_off_policy_sequence_mask(per_token):
    old, rollout, mask = case()
    advantages = torch.tensor([1.0, -1.0, -1.0, -1.0, 0.0])
    given = advantages[:, None].expand(B, T) if per_token else advantages
    got = off_policy_sequence_mask(old, rollout, given, mask, threshold=0.05)
    for row in range(B):
        moved = (rollout - old)[row][mask[row]].mean()
        keep = bool(advantages[row] >= 0 or moved <= 0.05)
        assert torch.equal(got[row], mask[row] & keep)


@pytest.mark.parametrize("fraction", (0.05, 0.2, 0.5, 1.0))
def test_top_entropy_mask(fraction):
    entropy, mask = torch.rand(B, T), torch.rand(B, T) > 0.3
    bound = torch.quantile(entropy[mask], 1 - fraction)
    torch.testing.assert_close(
        top_entropy_mask(entropy, mask, fraction=fraction), mask & (entropy >= bound)
    )
    assert not top_entropy_mask(entropy, torch.zeros_like(mask)).any()
    entropy[mask] = 0.5  # all equal: all are kept
    assert torch.equal(top_entropy_mask(entropy, mask, fraction=fraction), mask)


def test_weights_of_a_masking_rule_silence_the_policy_term():
    old, rollout, mask = case()
    lp = old.clone().requires_grad_()
    weights = importance_weights(old, rollout, mask, mode="mask", low=0.7, high=1.4)
    (grad,) = torch.autograd.grad(
        policy_loss(lp, old, torch.ones(B), mask, weights=weights).loss, lp
    )
    assert torch.equal(grad != 0, mask & (weights != 0))


@pytest.mark.parametrize(
    "message, call",
    {
        "over must be one of token, sum, mean, max, got 'row'": lambda x: importance_weights(
            x, x, over="row"
        ),
        "mode must be truncate or mask, got 'clip'": lambda x: importance_weights(
            x, x, mode="clip"
        ),
        "low must be at most high": lambda x: importance_weights(x, x, low=3.0),
        "rollout_logprobs must have shape": lambda x: importance_weights(x, x[:1]),
        "estimator must be one of k1, k2, k3, got 'k4'": lambda x: rejection_mask(
            x, x, estimator="k4"
        ),
        "advantages must have shape": lambda x: off_policy_sequence_mask(
            x, x, torch.ones(9), threshold=1.0
        ),
        "fraction must be in \\(0, 1\\]": lambda x: top_entropy_mask(x, fraction=0.0),
    }.items(),
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_bad_input_is_refused_by_name(message, call):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))
