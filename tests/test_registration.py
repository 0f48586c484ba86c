"""Every operator under torch's own checks: opcheck, float64 gradcheck, compile without a break or a
recompile.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pyllmtune
from pyllmtune import KeptTokens, PolicyLossConfig, _ops, policy_loss, token_logprobs
from tests import helpers, test_registration_decoding, test_registration_kl_divergence

LOGITS = torch.randn(2, 3, 17, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 17, (2, 3), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[True, False, True], [True, True, True]])


def score_args(dtype: torch.dtype, grad: bool) -> list[tuple]:
    logits = LOGITS.to(dtype)
    leaf = logits.clone().requires_grad_(grad)
    rows = torch.rand(2, 3).to(helpers.accumulator(dtype)) + 0.5
    return [
        (leaf, TOKENS, 0.7, None, None, False),
        (leaf, TOKENS, 1.0, rows, MASK, False),
        (logits[:, :-1].requires_grad_(grad), TOKENS[:, :-1].contiguous(), 1.0, None, None, False),
    ]


def backward_args(dtype: torch.dtype) -> tuple:
    wide = helpers.accumulator(dtype)
    return (
        LOGITS.to(dtype),
        TOKENS,
        1.0,
        None,
        MASK,
        *(torch.rand(*size).to(wide) for size in [(2, 3), (2, 2, 3)] + [(2, 3)] * 3),
    )


def softmax_args(grad: bool) -> list[tuple]:
    leaf, rows = LOGITS.clone().requires_grad_(grad), (torch.rand(2, 3) + 0.5).requires_grad_(grad)
    half = LOGITS.bfloat16()[:, :-1].requires_grad_(grad)
    return [
        (leaf, 0.7, None, False, torch.float32),
        (leaf, 1.0, rows, True, torch.float32),
        (half, 0.7, None, False, torch.float32),
    ]


def policy_args(dtype: torch.dtype, grad: bool) -> list[tuple]:
    def values() -> Tensor:
        return torch.rand(6, dtype=dtype)

    offsets, leaf = torch.tensor([0, 2, 6]), values().requires_grad_(grad)
    mask = torch.rand(6) > 0.2
    everything = PolicyLossConfig(
        level="sequence", cap=3.0, kl="k3", kl_coef=0.1, entropy_coef=0.01
    )
    plain = PolicyLossConfig(rule="cispo")
    bonus = values().requires_grad_(grad)
    return [
        (
            leaf,
            values(),
            values(),
            True,
            offsets,
            mask,
            values(),
            bonus,
            values(),
            0.0,
            None,
            everything.choices,
            everything.constants,
        ),
        (
            leaf,
            values(),
            values()[:2],
            False,
            offsets,
            None,
            None,
            None,
            None,
            4.0,
            None,
            plain.choices,
            plain.constants,
        ),
    ]


def gae_args() -> list[tuple]:
    offsets, lam = torch.tensor([0, 2, 6]), torch.rand(2)
    flags = (torch.rand(6) > 0.2, torch.rand(6) > 0.8)
    plain = (None, None, None, 0.9, 0.95, None, None, True)
    full = (*flags, torch.rand(2), 1.0, 1.0, lam, lam, False)
    return [(torch.rand(6), torch.rand(6), offsets, *rest) for rest in (plain, full)]


def kept_args(grad: bool) -> list[tuple]:
    """Whole rows and flat logits of the same kept sets, one of them empty."""
    mask = LOGITS.view(6, 17) > 0.5
    mask[2] = False
    kept = KeptTokens.from_mask(mask)
    flat = LOGITS.view(6, 17)[mask].requires_grad_(grad)
    rows = (TOKENS.flatten(), 1.0, torch.rand(6) + 0.5, MASK.flatten())
    whole = LOGITS.bfloat16().requires_grad_(grad)
    return [(whole, *kept, *rows), (flat, *kept, TOKENS.flatten(), 0.7, None, None)]


def kept_logits_args(dtype: torch.dtype) -> dict[str, tuple]:
    """Of each operator of kept_logits."""
    kept, wide = KeptTokens.from_mask(LOGITS.view(6, 17) > 0.5), helpers.accumulator(dtype)
    hidden, weight = (torch.rand(n, 5).to(dtype).requires_grad_() for n in (6, 17))
    grad, (ids, order) = torch.rand(kept.token_ids.shape, dtype=wide), kept.token_ids.sort()
    fixed = (hidden.detach(), weight.detach())
    return {
        "kept_logits": (hidden, weight, *kept, MASK.flatten()),
        "kept_logits_backward_hidden": (grad, fixed[1], *kept),
        "kept_logits_backward_weight": (grad[order], kept.rows[order], ids, *fixed),
    }


FLOORS = ("cpp", "triton", "emulated")


@pytest.mark.parametrize("floor", FLOORS)
def test_opcheck(floor):
    """Schema, fake tensors, autograd registration, ahead-of-time dispatch with dynamic shapes: for
    every operator.
    """
    helpers.use(floor)
    for args in score_args(torch.float32, grad=True):
        torch.library.opcheck(_ops.handle("token_logprobs", floor), args)
    torch.library.opcheck(
        _ops.handle("token_logprobs_backward", floor), backward_args(torch.float32)
    )
    torch.library.opcheck(
        _ops.handle("token_logprobs_backward_inplace", floor), backward_args(torch.float32)
    )
    for args in kept_args(grad=True):
        torch.library.opcheck(_ops.handle("kept_token_logprobs", floor), args)
    for args in kept_args(grad=False):
        upstream = (torch.rand(size) for size in [(6,), (2, 6)] + [(6,)] * 3)
        backward = _ops.handle("kept_token_logprobs_backward", floor)
        torch.library.opcheck(backward, (*args, *upstream))
    for word, args in kept_logits_args(torch.bfloat16).items():
        torch.library.opcheck(_ops.handle(word, floor), args)
    for args in softmax_args(grad=True):
        torch.library.opcheck(_ops.handle("temperature_softmax", floor), args)
    for args in softmax_args(grad=False):
        out = _ops.handle("temperature_softmax", floor)(*args)
        torch.library.opcheck(_ops.handle("temperature_softmax_out", floor), (*args[:-1], out))
        for wanted in (False, True):
            backward = (torch.randn(args[0].shape), out, *args[1:-1], args[0].dtype, wanted)
            torch.library.opcheck(_ops.handle("temperature_softmax_backward", floor), backward)
    for args in policy_args(torch.float32, grad=True):
        torch.library.opcheck(_ops.handle("policy_loss", floor), args)
    for args in gae_args():
        torch.library.opcheck(_ops.handle("gae", floor), args)


def test_every_schema_is_checked_above():
    words = {
        "token_logprobs",
        "token_logprobs_backward",
        "token_logprobs_backward_inplace",
        "kept_token_logprobs",
        "kept_token_logprobs_backward",
        *kept_logits_args(torch.float32),
        "temperature_softmax",
        "temperature_softmax_out",
        "temperature_softmax_backward",
        "policy_loss",
        "gae",
        *("linear_token_logprobs_tile", "linear_token_logprobs_tile_backward"),  # their own file
    }
    words |= test_registration_decoding.CHECKED | test_registration_kl_divergence.CHECKED
    assert words == set(_ops.SCHEMAS)


@pytest.mark.parametrize("backend", ("reference", "cpp"))
@pytest.mark.parametrize("masked", (False, True))
def test_gradcheck_token_logprobs(backend, masked):
    """Float64 finite differences through the reference and through the compiled kernel, all three
    results.
    """
    logits = LOGITS.double().requires_grad_()
    temperature = torch.rand(2, 3, dtype=torch.float64) + 0.5
    mask = MASK if masked else None

    def scores(x: Tensor) -> tuple[Tensor, ...]:
        return token_logprobs(
            x, TOKENS, temperature=temperature, mask=mask, backend=helpers.use(backend)
        )

    assert torch.autograd.gradcheck(scores, logits)


# finite differences see all of a loss: of rules without constants of the update, or with them at 1
DIFFERENTIABLE = ("ppo", "unclipped", "clip", "sapo", "prime", "dro", "reinforce", "cispo")


@pytest.mark.parametrize("backend", ("reference", "cpp"))
@pytest.mark.parametrize("level", ("token", "sequence", "sequence-sum", "geometric"))
@pytest.mark.parametrize("rule", DIFFERENTIABLE)
@pytest.mark.parametrize("kl", ("none", "k1", "k2", "k3", "abs"))
@pytest.mark.parametrize("masked", ("none", "random", "empty", "one token"))
def test_gradcheck_policy_loss(backend, level, rule, kl, masked):
    """Float64 finite differences in log-probs and entropy, the KL term plain and importance
    corrected.
    """
    if level == "geometric" and rule != "unclipped":
        return
    old, ref, entropy = (-torch.rand(3, 7, dtype=torch.float64) for _ in range(3))
    logprobs = (old + 0.4 * torch.randn(3, 7, dtype=torch.float64)).requires_grad_()
    entropy = (-entropy).requires_grad_()
    advantages = torch.randn(3, dtype=torch.float64)
    mask = {
        "none": None,
        "random": torch.rand(3, 7) > 0.3,
        "empty": torch.zeros(3, 7, dtype=torch.bool),
        "one token": torch.arange(7).expand(3, 7) == 4,
    }[masked]
    bound = {"ppo": {"cap": 2.0}, "cispo": {"eps_low": 0.0, "eps_high": 0.0}}.get(rule, {})
    config = PolicyLossConfig(
        level=level,
        rule=rule,
        dro_beta=0.3,
        kl=kl,
        kl_gradient="plain" if masked == "random" else "ratio",
        kl_coef=0.3 if kl != "none" else 0.0,
        entropy_coef=0.1,
        aggregation="seq-mean-token-mean",
        **bound,
    )

    def loss(x: Tensor, h: Tensor) -> Tensor:
        return policy_loss(
            x,
            old,
            advantages,
            mask,
            ref_logprobs=ref,
            entropy=h,
            config=config,
            backend=helpers.use(backend),
        ).loss

    assert torch.autograd.gradcheck(loss, (logprobs, entropy))


def test_double_backward_is_refused_clearly():
    helpers.need("cpp")
    logits = LOGITS.clone().requires_grad_()
    logprobs = (-torch.rand(2, 3)).requires_grad_()
    loss = policy_loss(logprobs, logprobs.detach() - 0.1, torch.randn(2)).loss
    for value, leaf in ((token_logprobs(logits, TOKENS).logprobs.sum(), logits), (loss, logprobs)):
        (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="does not require grad"):
            grad.sum().backward()


def step(
    logits: Tensor, tokens: Tensor, mask: Tensor, old: Tensor, advantages: Tensor, backend: str
) -> Tensor:
    scores = token_logprobs(logits, tokens, temperature=0.9, mask=mask, backend=backend)
    config = PolicyLossConfig(entropy_coef=0.01)
    out = policy_loss(
        scores.logprobs,
        old,
        advantages,
        mask,
        entropy=scores.entropy,
        config=config,
        backend=backend,
    )
    return out.loss + 0.0 * out.metrics.vector.sum()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_compile_has_no_graph_break_and_no_recompile(backend):
    """A training step, forward and backward, as one graph; a second call and a second batch size
    compile nothing new.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.utils.deterministic.fill_uninitialized_memory = False  # inductor's own buffers
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    graphs = []
    for rows in (3, 3, 5, 8):
        logits = torch.randn(2, rows, 30)
        leaves = [logits.clone().requires_grad_() for _ in range(2)]
        tokens, mask = torch.randint(0, 30, (2, rows)), torch.rand(2, rows) > 0.2
        rest = (tokens, mask, -torch.rand(2, rows), torch.randn(2), backend)
        got, want = compiled(leaves[0], *rest), step(leaves[1], *rest)
        torch.testing.assert_close(got, want)
        got.backward(), want.backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
        graphs.append(counter.frame_count)
    started = 2 if helpers.torch_before("2.12") else 1  # it starts again when it meets the floats
    assert graphs == [started] * 4


@pytest.mark.slow
def test_compile_with_inductor():
    """The default compiler, static shapes, gradient included; the second call compiles nothing."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    tokens, mask = torch.randint(0, 30, (2, 4)), torch.rand(2, 4) > 0.2
    old, advantages = -torch.rand(2, 4), torch.randn(2)
    for attempt in range(2):
        leaves = [
            LOGITS.new_tensor(torch.randn(2, 4, 30).tolist()).requires_grad_() for _ in range(1)
        ]
        with torch.compiler.set_stance("fail_on_recompile" if attempt else "default"):
            got = compiled(leaves[0], tokens, mask, old, advantages, "auto")
        twin = leaves[0].detach().clone().requires_grad_()
        want = step(twin, tokens, mask, old, advantages, "auto")
        torch.testing.assert_close(got, want)
        got.backward(), want.backward()
        torch.testing.assert_close(leaves[0].grad, twin.grad)


@pytest.mark.slow
def test_compile_with_inplace_backward():
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch._dynamo.reset()

    def head(hidden: Tensor, weight: Tensor, inplace: bool) -> Tensor:
        logits = hidden @ weight
        return token_logprobs(logits, TOKENS[0], inplace_backward=inplace).logprobs.sum()

    weight = torch.randn(5, 17)
    leaves = [torch.randn(3, 5).requires_grad_()]
    leaves.append(leaves[0].detach().clone().requires_grad_())
    torch.compile(head, fullgraph=True)(leaves[0], weight, True).backward()
    head(leaves[1], weight, False).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_public_names_exist():
    assert all(hasattr(pyllmtune, name) for name in pyllmtune.__all__)
