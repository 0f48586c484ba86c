"""reinforce_loss: the closed form, and the gradient of an expectation by enumeration."""

from __future__ import annotations

import torch

from pyllmtune import reinforce_loss
from tests.helpers import BACKENDS, assert_close, pairs, use


@pairs(BACKENDS, (torch.float64, torch.float32))
def test_value_and_gradient_are_the_closed_form(backend, dtype):
    logprobs = -3 * torch.rand(3, 5, dtype=dtype)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    logprobs[~mask] = torch.nan
    leaf = logprobs.requires_grad_()
    rewards = torch.tensor([2.0, -1.0, 5.0], dtype=dtype)
    loss, metrics = reinforce_loss(leaf, rewards, mask, backend=use(backend))
    loss.backward()
    answers = logprobs.detach().where(mask, 0).sum(-1)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert_close(loss, -(rewards * answers).sum() / 2, tolerance, "loss")  # two answers count
    want = -rewards[:, None] / 2 * mask
    assert_close(leaf.grad, want, tolerance, "gradient")
    assert metrics.to_dict()["tokens"] == 8


def test_the_expected_gradient_is_the_gradient_of_the_expected_reward():
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    rewards = torch.randn(6, dtype=torch.float64)
    probabilities = logits.softmax(-1)
    (want,) = torch.autograd.grad((probabilities * rewards).sum(), logits)
    got = torch.zeros(6, dtype=torch.float64)
    for action in range(6):  # each action as often as the policy takes it
        loss = reinforce_loss(logits.log_softmax(-1)[action].view(1, 1), rewards[action, None]).loss
        (gradient,) = torch.autograd.grad(loss, logits)
        got -= probabilities[action].detach() * gradient
    assert_close(got, want, 1e-12, "gradient")
