"""What must hold for any input: identities of the softmax and of the losses, on drawn shapes and
values.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllmtune import PolicyLossConfig, policy_loss, token_logprobs
from tests import helpers

SHAPES = st.tuples(st.integers(0, 5), st.integers(1, 300))
BACKENDS = st.sampled_from(("reference", "cpp", "triton"))
FEW = settings(max_examples=40, deadline=None)


def case(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, vocab = shape
    logits = 4 * torch.randn(rows, vocab, generator=generator)
    return logits, torch.randint(0, vocab, (rows,), generator=generator), generator


@FEW
@given(st.tuples(st.integers(0, 3), st.integers(1, 40)), BACKENDS, st.integers(0, 2**31))
def test_probabilities_of_all_tokens_sum_to_one(shape, backend, seed):
    logits, _, _ = case(shape, seed)
    everything = logits[:, None, :].expand(
        -1, shape[1], -1
    )  # every token of every row, without a copy
    tokens = torch.arange(shape[1]).expand(shape)
    out = token_logprobs(everything, tokens, backend=helpers.use(backend))
    torch.testing.assert_close(out.logprobs.exp().sum(-1), torch.ones(shape[0]), atol=2e-5, rtol=0)
    entropy = -(out.logprobs.exp() * out.logprobs).sum(-1)
    torch.testing.assert_close(out.entropy[:, 0], entropy, atol=1e-4, rtol=1e-4)


@FEW
@given(SHAPES, BACKENDS, st.integers(0, 2**31), st.floats(-50, 50))
def test_a_common_shift_moves_the_logsumexp_alone(shape, backend, seed, shift):
    logits, tokens, _ = case(shape, seed)
    before = token_logprobs(logits, tokens, backend=helpers.use(backend))
    after = token_logprobs(logits + shift, tokens, backend=backend)
    torch.testing.assert_close(after.logprobs, before.logprobs, atol=3e-5, rtol=0)
    torch.testing.assert_close(after.entropy, before.entropy, atol=3e-5, rtol=0)
    torch.testing.assert_close(after.logsumexp, before.logsumexp + shift, atol=3e-5, rtol=1e-6)


@FEW
@given(SHAPES, BACKENDS, st.integers(0, 2**31))
def test_the_gradient_of_a_row_sums_to_the_logsumexp_weight(shape, backend, seed):
    """Log-prob and entropy do not change under a common shift, so their gradients sum to 0;
    logsumexp's to 1.
    """
    logits, tokens, generator = case(shape, seed)
    leaf = logits.requires_grad_()
    weights = torch.randn(3, shape[0], generator=generator)
    out = token_logprobs(leaf, tokens, backend=helpers.use(backend))
    total = sum((value * weight).sum() for value, weight in zip(out, weights, strict=True))
    (grad,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(grad.sum(-1), weights[2], atol=5e-5, rtol=0)


@FEW
@given(
    st.integers(1, 5),
    st.integers(1, 40),
    BACKENDS,
    st.sampled_from(("token", "sequence")),
    st.integers(0, 2**31),
)
def test_on_policy_the_gradient_is_that_of_reinforce(batch, length, backend, level, seed):
    """At ratio 1 nothing is clipped: loss is -mean A and its gradient -A / tokens, whatever the
    level.
    """
    generator = torch.Generator().manual_seed(seed)
    logprobs = (-3 * torch.rand(batch, length, generator=generator)).requires_grad_()
    advantages = torch.randn(batch, generator=generator)
    out = policy_loss(
        logprobs,
        logprobs.detach(),
        advantages,
        config=PolicyLossConfig(level=level),
        backend=helpers.use(backend),
    )
    torch.testing.assert_close(out.loss, -advantages.mean(), atol=1e-6, rtol=1e-5)
    (grad,) = torch.autograd.grad(out.loss, logprobs)
    expected = -advantages[:, None].expand(batch, length) / (batch * length)
    torch.testing.assert_close(grad, expected, atol=1e-7, rtol=1e-5)
