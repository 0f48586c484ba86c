"""Inputs and float64 answers for both GPU floors: test_emulated_ops.py, test_triton_ops.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from pyllmtune import (
    KeptTokens,
    PolicyLossConfig,
    gae,
    policy_loss,
    temperature_softmax,
    token_logprobs,
)
from pyllmtune.losses.metrics import MAXIMA, SUMS
from pyllmtune.ops import kept_logits_dense
from pyllmtune.ops.kept_logits import kept_logits
from pyllmtune.ops.kept_token_logprobs import kept_token_logprobs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABS = (1, 2, 7, 128, 255, 257, 1000)
LAYOUTS = ("contiguous", "shifted", "unaligned", "padded", "transposed")

# relative error of one rounding, and the error among subnormal numbers
ROUNDING = {
    torch.float32: (0.0, 0.0),
    torch.bfloat16: (2**-8, 0.0),
    torch.float16: (2**-11, 2**-25),
}


# ---- token_logprobs


def logits_of(layout: str, vocab: int, dtype: torch.dtype) -> Tensor:
    """``[2, 3, vocab]``; "shifted" is a trainer's view without the last token."""
    if layout == "contiguous":
        return (torch.randn(2, 3, vocab) * 3).to(dtype)
    if layout == "shifted":
        return (torch.randn(2, 4, vocab) * 3).to(dtype)[:, :-1]
    if layout == "unaligned":
        return (torch.randn(2, 3, vocab + 5) * 3).to(dtype)[..., 3 : vocab + 3]
    if layout == "padded":  # aligned rows, whose gradient, without the gaps, is not
        return (torch.randn(2, 3, vocab // 16 * 16 + 16) * 3).to(dtype)[..., :vocab]
    return (torch.randn(3, 2, vocab) * 3).to(dtype).transpose(0, 1)


class Scores(NamedTuple):
    """The three results and the gradient of their weighted sum."""

    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor
    gradient: Tensor


def score(logits: Tensor, tokens: Tensor, weights: Tensor, backend: str, **options: Any) -> Scores:
    """Values and gradient on one floor, of the view itself. Infinite results get no weight."""
    leaf = logits.detach().requires_grad_()
    out = token_logprobs(leaf, tokens, backend=backend, **options)
    upstream = [
        torch.where(value.isinf(), 0.0, weight).to(value.dtype)
        for value, weight in zip(out, weights, strict=True)
    ]
    (gradient,) = torch.autograd.grad(out, leaf, upstream)
    return Scores(*(value.detach() for value in out), gradient)


def assert_scores(logits: Tensor, tokens: Tensor, backend: str, **options: Any) -> None:
    """One floor against the reference in float64 on the same, already rounded, logits."""
    weights = torch.randn(3, *tokens.shape, dtype=torch.float64)
    wide = {
        k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in options.items()
    }
    got = score(logits, tokens, weights, backend, **options)
    want = score(logits.double(), tokens, weights, "reference", **wide)
    assert_within(got.logprobs, want.logprobs, 5e-6 + 2e-6 * want.logprobs.abs(), "logprobs")
    assert_within(got.entropy, want.entropy, 2e-5, "entropy")
    assert_within(got.logsumexp, want.logsumexp, 5e-6 + 2e-6 * want.logsumexp.abs(), "logsumexp")
    relative, absolute = ROUNDING[logits.dtype]
    largest = want.gradient.abs().amax(-1, keepdim=True)
    bound = 1e-5 * largest + relative * want.gradient.abs() + absolute
    assert got.gradient.dtype == logits.dtype
    assert_within(got.gradient, want.gradient, bound, "gradient")


def assert_within(got: Tensor, want: Tensor, bound: Tensor | float, what: str) -> None:
    """Equal where infinite or NaN, else within ``bound``."""
    got = got.double()
    same = (got == want) | (got.isnan() & want.isnan())
    wrong = ~(same | ((got - want).abs() <= bound))
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} wrong, the first is {float(got[wrong][0])} "
        f"instead of {float(want[wrong][0])}"
    )


# ---- temperature_softmax


def softmax(
    logits: Tensor, temperature: Tensor, log: bool, dtype: torch.dtype, backend: str
) -> tuple[Tensor, ...]:
    """Result in ``dtype`` and the gradients in logits and temperatures, of the view itself."""
    leaf, learnt = logits.detach().requires_grad_(), temperature.detach().requires_grad_()
    out = temperature_softmax(leaf, learnt, log=log, dtype=dtype, backend=backend)
    return out.detach(), *torch.autograd.grad(out, (leaf, learnt), torch.ones_like(out).cumsum(-1))


# ---- policy_loss

MASKS = ("none", "random", "all false", "one token")
BATCHES = ("padded", "ragged")
OPTIONAL = ("weights", "entropy", "ref_logprobs")
LENGTHS = (0, 7, 1, 0, 12, 0)  # of the ragged batch


def policy_configs() -> list[PolicyLossConfig]:
    """Level x rule and cap x KL x aggregation: 96."""
    rules = (("ppo", None), ("ppo", 2.0), ("cispo", None))
    kls = ("none", "k1", "k2", "k3")
    aggregations = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant")
    return [
        PolicyLossConfig(
            level=level,
            rule=rule,
            cap=cap,
            kl=kl,
            kl_coef=0.0 if kl == "none" else 0.3,
            aggregation=aggregation,
        )
        for level, (rule, cap), kl, aggregation in itertools.product(
            ("token", "sequence"), rules, kls, aggregations
        )
    ]


def config_id(config: PolicyLossConfig) -> str:
    return f"{config.level}-{config.rule}-{config.cap}-{config.kl}-{config.aggregation}"


def policy_inputs(config: PolicyLossConfig) -> Iterator[dict[str, Any]]:
    """Mask x batch x optional tensors: 64, or 32 where the config needs a reference."""
    for mask, batch, *present in itertools.product(
        MASKS, BATCHES, *[(False, True)] * len(OPTIONAL)
    ):
        given = dict(zip(OPTIONAL, present, strict=True))
        if config.kl != "none" and not given["ref_logprobs"]:
            continue
        yield policy_batch(mask, batch, given, per_token=given["weights"])


def policy_batch(mask: str, batch: str, given: dict[str, bool], per_token: bool) -> dict[str, Any]:
    shape = (3, 11) if batch == "padded" else (sum(LENGTHS),)
    sequences = 3 if batch == "padded" else len(LENGTHS)
    logprobs = -2 * torch.rand(shape)
    select = {
        "none": None,
        "random": torch.rand(shape) > 0.3,
        "all false": torch.zeros(shape, dtype=torch.bool),
        "one token": torch.arange(math.prod(shape)).view(shape) == 4,
    }[mask]
    inputs = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + 0.4 * torch.randn(shape),
        "advantages": torch.randn(shape if per_token else (sequences,)),
        "mask": select,
        "weights": torch.rand(shape) * (torch.rand(shape) > 0.2),
        "entropy": torch.rand(shape),
        "ref_logprobs": logprobs + 0.3 * torch.randn(shape),
    }
    if batch == "ragged":
        inputs["cu_seqlens"] = torch.tensor((0, *itertools.accumulate(LENGTHS)))
    absent = [name for name, here in given.items() if not here]
    return {name: value for name, value in inputs.items() if name not in absent}


def run_policy(config: PolicyLossConfig, inputs: dict[str, Any], backend: str, dtype: torch.dtype):
    """Loss, metrics and the gradients in log-probs and entropy."""
    cast = {
        k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    wanted = [cast[name].requires_grad_() for name in ("logprobs", "entropy") if name in cast]
    if config.entropy_coef == 0.0 and "entropy" in cast:
        config = PolicyLossConfig(**{**vars(config), "entropy_coef": 0.05})
    normalizer = 13.0 if config.aggregation == "constant" else None
    out = policy_loss(**cast, config=config, normalizer=normalizer, backend=backend)
    return out.loss.detach(), out.metrics.vector, *torch.autograd.grad(3.0 * out.loss, wanted)


def assert_policy(
    config: PolicyLossConfig,
    inputs: dict[str, Any],
    backend: str,
    truth: torch.dtype = torch.float64,
) -> None:
    """One floor against the reference; ``truth`` is float32 where float32 overflows by design."""
    got = run_policy(config, inputs, backend, torch.float32)
    want = run_policy(config, inputs, "reference", truth)
    for name, value, expected in zip(
        ("loss", "metrics", "grad", "entropy"), got, want, strict=False
    ):
        bound = (
            1e-5 * expected.abs() + 2e-6
        )  # e^r of r rounded to 6e-8; sums of some 30 terms near 1
        if name == "metrics":
            for slot, a, b, limit in zip(SUMS + MAXIMA, value, expected, bound, strict=True):
                assert_within(a[None], b[None], limit, slot)
        else:
            assert_within(value, expected, bound, name)


EXTREME = PolicyLossConfig(kl="k1", kl_coef=0.1, cap=3.0, aggregation="seq-mean-token-sum")


def overflowing() -> dict[str, Any]:
    """Log-ratios of +-200 with advantages of both signs and 0: e^200 is infinite in float32."""
    old = torch.zeros(6, 2)
    logprobs = torch.tensor([200.0, 200.0, 200.0, -200.0, -200.0, -200.0])[:, None].repeat(1, 2)
    advantages = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0, 0.0])
    return {
        "logprobs": logprobs,
        "old_logprobs": old,
        "advantages": advantages,
        "ref_logprobs": logprobs + 1.0,
    }


def assert_silent(level: str, backend: str) -> None:
    """An infinite loss of weight 0 is no loss and has no gradient."""
    config = PolicyLossConfig(level=level)
    inputs = {
        "logprobs": torch.full((1, 2), 200.0),
        "old_logprobs": torch.zeros(1, 2),
        "advantages": torch.tensor([-1.0]),
        "weights": torch.zeros(1, 2),
    }
    loss, _, gradient = run_policy(config, inputs, backend, torch.float32)
    assert loss == 0 and (gradient == 0).all()


def partly_lost() -> dict[str, Any]:
    """Old and reference log-probs that are not finite, under the mask and outside it."""
    inputs = policy_batch("random", "padded", dict.fromkeys(OPTIONAL, True), per_token=True)
    for name, column in (("old_logprobs", 2), ("ref_logprobs", 7)):
        inputs[name][:, column] = torch.tensor([math.nan, math.inf, -math.inf])
    return inputs


# ---- kept_token_logprobs


def kept_sets(rows: int, vocab: int) -> KeptTokens:
    """Random sets; the first is empty, the second everything."""
    mask = torch.rand(rows, vocab) < 0.1
    mask[0], mask[1] = False, True
    return KeptTokens.from_mask(mask)


def kept_results(backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Results and gradient of whole rows and of flat logits, in ``dtype`` or each of a floor's;
    a masked row, an idle one, one whose token is not in its set.
    """
    generator = torch.Generator().manual_seed(3)
    found, tokens = [], torch.randint(0, 300, (6,), generator=generator)
    chosen = torch.rand(6, 300, generator=generator) < 0.4
    kept = KeptTokens.from_mask(chosen & (torch.arange(6) > 0)[:, None])  # the first is empty
    mask, upstream = torch.arange(6) != 2, torch.tensor([1.0, 2.0, 3.0, 0.0, -1.0, 0.5])
    for given in DTYPES:
        whole = (torch.randn(2, 3, 301, generator=generator) * 3).to(given)[..., 1:]
        flat = whole.flatten(0, 1)[kept.rows, kept.token_ids.long()]
        for x in (whole, flat):
            leaf = x.to(dtype or given).requires_grad_()
            out = kept_token_logprobs(leaf, tokens, kept, 0.7, None, mask, backend)
            grads = [torch.where(value.isinf(), 0, upstream.to(value.dtype)) for value in out]
            found += [*(value.detach() for value in out), torch.autograd.grad(out, leaf, grads)[0]]
    return found


def assert_kept(backend: str) -> None:
    """One floor against the reference in float64 on the same, already rounded, logits."""
    pairs = zip(kept_results(backend), kept_results("reference", torch.float64), strict=True)
    for got, want in pairs:
        relative, absolute = ROUNDING[got.dtype]
        same = got.double() == want  # infinities
        bound = 2e-5 + relative * want.abs() + absolute
        assert bool((same | ((got.double() - want).abs() <= bound)).all())


# sets of any size by the kernels, none by matmuls
kept_by_dots = mock.patch.object(kept_logits_dense, "SHARE", 1.0)


@kept_by_dots
def kept_logits_results(backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Logits and both gradients for sizes around a chunk and a block, aligned and not."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for given, size in itertools.product(DTYPES, (3, 128, 1101)):
        hidden, weight = (torch.randn(n, size, generator=generator).to(given) for n in (4, 6))
        chosen = torch.rand(4, 6, generator=generator) < 0.6
        kept = KeptTokens.from_mask(chosen & (torch.arange(4) > 0)[:, None])  # the first is empty
        leaves = [x.to(dtype or given).requires_grad_() for x in (hidden, weight)]
        logits = kept_logits(*leaves, kept, torch.arange(4) != 2, backend)
        upstream = (torch.arange(len(logits)) % 3.0).to(logits.dtype) * (kept.rows != 2)
        found += [logits.detach(), *torch.autograd.grad(logits, leaves, upstream)]
    return found


def assert_kept_logits(backend: str) -> None:
    """One floor against the reference in float64 on the same, already rounded, operands."""
    wanted = kept_logits_results("reference", torch.float64)
    for got, want in zip(kept_logits_results(backend), wanted, strict=True):
        relative, absolute = ROUNDING[got.dtype]
        bound = 2e-6 * want.abs().amax() + relative * want.abs() + absolute
        assert bool(((got.double() - want).abs() <= bound).all())


# ---- gae


def gae_results(backend: str) -> list[Tensor]:
    """A sequence longer than a chunk of CUDA's, an empty one and a short one; every input given."""
    offsets = torch.tensor([0, 1100, 1100, 1107])
    return list(
        gae(
            torch.randn(1107),
            torch.randn(1107),
            torch.rand(1107) > 0.2,
            gamma=torch.rand(3),
            lam=torch.rand(3),
            cu_seqlens=offsets,
            bootstrap=torch.randn(3),
            terminated=torch.rand(1107) > 0.95,
            backend=backend,
        )
    )
