"""kept_token_logprobs: the kept set alone gives what the dense op gives on logits that are -inf
outside it; edges, bits, errors.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyllmtune import KeptTokens, TokenLogprobs, sample, token_logprobs
from pyllmtune.ops.kept_token_logprobs import kept_token_logprobs
from tests import helpers

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INF = math.inf


def grad_of(out: TokenLogprobs, logits: Tensor, weights: Tensor) -> Tensor:
    """Gradient of a weighted sum of the three results; infinite results get weight 0."""
    total = sum(
        (torch.where(value.isinf(), 0, value) * weight.to(value.dtype)).sum()
        for value, weight in zip(out, weights, strict=True)
    )
    return torch.autograd.grad(total, logits)[0]


def kept_of(logits: Tensor, share: float) -> KeptTokens:
    """A random set for each row, an empty and a whole one among them."""
    mask = torch.rand(logits.shape) < share
    rows = mask.view(-1, logits.shape[-1])
    rows[:1], rows[1:2] = False, True
    return KeptTokens.from_mask(mask)


def compare(backend: str, logits: Tensor, tokens: Tensor, kept: KeptTokens, **options) -> None:
    """Against the dense op, in float64, on the same logits with -inf outside the set."""
    weights = torch.randn(3, *tokens.shape, dtype=torch.float64)
    weights = weights * (torch.rand(tokens.shape) > 0.3)  # rows without upstream gradient
    ours = logits.detach().requires_grad_()  # the view itself
    truth = logits.detach().double().requires_grad_()
    dense = truth.masked_fill(~kept.to_mask(logits.shape[-1]).view(logits.shape), -INF)
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    got = token_logprobs(ours, tokens, kept=kept, backend=helpers.use(backend), **options)
    want = token_logprobs(dense, tokens, backend="reference", **wide)
    for name, value, expected in zip(got._fields, got, want, strict=True):
        assert value.dtype == helpers.accumulator(logits.dtype)
        helpers.assert_close(value, expected, helpers.FORWARD[logits.dtype], name)
    gradient, expected = grad_of(got, ours, weights), grad_of(want, truth, weights)
    assert gradient.dtype == logits.dtype
    helpers.assert_close(gradient, expected, helpers.BACKWARD[logits.dtype], "gradient")
    outside = ~kept.to_mask(logits.shape[-1]).view(logits.shape)
    assert torch.equal(gradient[outside], torch.zeros_like(gradient[outside]))


def random_case(
    rows: tuple[int, ...], vocab: int, dtype: torch.dtype, share: float = 0.3
) -> tuple[Tensor, Tensor, KeptTokens]:
    logits = (torch.randn(*rows, vocab) * 3).to(dtype)
    return logits, torch.randint(0, vocab, rows), kept_of(logits, share)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=helpers.dtype_id)
@pytest.mark.parametrize("vocab", (1, 2, 17, 300))
def test_dense_op_on_masked_logits(backend, dtype, vocab):
    if not helpers.runs(backend, dtype):
        logits, tokens, kept = random_case((3,), vocab, dtype)
        with pytest.raises(ValueError, match=r"no kernel for torch\.float64"):
            token_logprobs(logits, tokens, kept=kept, backend=helpers.use(backend))
        return
    compare(backend, *random_case((5,), vocab, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=helpers.dtype_id)
@pytest.mark.parametrize("vocab", (4095, 4096, 4097, 20_000, 300_001))
def test_sets_longer_than_a_tile(dtype, vocab):
    """The CPU kernel gathers 4,096 logits at a time. At 300,001 the gradient is fresh memory."""
    compare("cpp", *random_case((3,), vocab, dtype, share=0.7), temperature=0.7)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_leading_shapes_strides_temperature_and_mask(backend):
    for rows in ((), (0,), (4,), (2, 3), (2, 3, 2), (0, 3)):
        compare(backend, *random_case(rows, 33, torch.float32))
    whole = torch.randn(3, 5, 40).bfloat16()
    for logits in (whole[:, :-1], whole[:, 1:, :33], whole.transpose(0, 1)[1:]):
        tokens = torch.randint(0, logits.shape[-1], logits.shape[:-1])
        options = {"temperature": torch.rand(tokens.shape) + 0.2, "mask": tokens % 3 != 0}
        compare(backend, logits, tokens, kept_of(logits, 0.5), **options)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the NaN computed with here
@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("poison", (math.nan, INF), ids=str)
def test_poison_reaches_no_row_but_its_own(backend, poison):
    """Outside the set and in a masked row it is not seen; in a set the row is NaN, alone."""
    logits = torch.randn(4, 50)
    keep = torch.rand(4, 50) < 0.5
    keep[:, 3], keep[:, 4] = True, False
    tokens, mask = torch.tensor([3, 3, 3, -100]), torch.tensor([True, True, True, False])
    logits[0, 4], logits[1, 3], logits[3] = poison, poison, poison
    leaf, kept = logits.clone().requires_grad_(), KeptTokens.from_mask(keep)
    out = token_logprobs(leaf, tokens, mask=mask, kept=kept, backend=helpers.use(backend))
    sum(value.sum() for value in out).backward()
    for value in out:
        assert value.isnan().tolist() == [False, True, False, False] and value[3] == 0
    assert leaf.grad[1, keep[1]].isnan().all() and leaf.grad[[0, 2, 3]].isfinite().all()
    assert torch.equal(leaf.grad[~keep], torch.zeros(int((~keep).sum())))
    assert torch.equal(leaf.grad[3], torch.zeros(50))


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_token_outside_its_set_and_an_empty_set(backend):
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, -INF, 3.0]])
    keep = torch.tensor([[True, True, False], [False, False, False], [True, True, False]])
    kept, tokens = KeptTokens.from_mask(keep), torch.tensor([2, 0, 1])
    out = token_logprobs(logits, tokens, kept=kept, backend=helpers.use(backend))
    assert torch.equal(out.logprobs, torch.full((3,), -INF))
    assert out.logsumexp[1] == -INF and torch.equal(out.entropy[1:], torch.zeros(2))
    torch.testing.assert_close(out.logsumexp[0], logits[0, :2].logsumexp(0))
    assert kept.contains(tokens).tolist() == [False, False, True]
    compare(backend, logits, tokens, kept)


@pytest.mark.parametrize("backend", helpers.KERNELS)
def test_flat_logits_give_the_bits_of_whole_rows(backend):
    """The other form of the operator: one logit for each kept id."""
    logits, tokens, kept = random_case((6,), 130, torch.bfloat16)
    results = []
    for x in (logits[None], logits[kept.rows, kept.token_ids.long()]):
        leaf = x.clone().requires_grad_()
        out = kept_token_logprobs(leaf, tokens, kept, 0.7, None, None, helpers.use(backend))
        upstream = [torch.arange(6.0) % 3 for _ in out]  # two rows without
        (grad,) = torch.autograd.grad(out, leaf, upstream)
        results.append((*out, grad[0][kept.rows, kept.token_ids.long()] if x.dim() == 3 else grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", helpers.KERNELS)
def test_bits_do_not_depend_on_batch_order_or_threads(backend):
    logits, tokens, kept = random_case((9,), 700, torch.float32, share=0.6)
    mask = kept.to_mask(700)

    def run(rows: Tensor) -> list[Tensor]:
        leaf = logits[rows].requires_grad_()
        chosen = KeptTokens.from_mask(mask[rows])
        out = token_logprobs(leaf, tokens[rows], kept=chosen, backend=helpers.use(backend))
        finite = (torch.where(value.isinf(), 0, value).sum() for value in out)
        return [*out, torch.autograd.grad(sum(finite), leaf)[0]]

    want = run(torch.arange(9))
    threads = torch.get_num_threads()
    try:
        for count, rows in ((1, torch.arange(9)), (2, torch.randperm(9)), (2, torch.tensor([4]))):
            torch.set_num_threads(count)
            got = run(rows)
            assert all(torch.equal(a, b[rows]) for a, b in zip(got, want, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_the_samplers_log_prob_is_that_of_the_kept_set():
    """`sample` and the trainer agree on the distribution that was sampled."""
    logits = torch.randn(64, 500) * 4
    filters = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}
    out = sample(logits, **filters, logprobs="processed", return_kept=True, return_stats=True)
    scored = token_logprobs(logits, out.tokens, temperature=0.8, kept=out.kept)
    assert out.kept.contains(out.tokens).all() and out.kept.counts.max() > 5
    torch.testing.assert_close(scored.logprobs, out.logprobs, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(scored.entropy, out.entropy, atol=2e-5, rtol=0)


@pytest.mark.parametrize("backend", ("reference", "cpp"))
def test_gradcheck(backend):
    logits, tokens, kept = random_case((2, 3), 11, torch.float64, share=0.5)
    tokens.view(-1)[1:] = kept.token_ids[kept.offsets[2:] - 1]  # in their sets
    leaf, mask = logits.requires_grad_(), torch.tensor([[False, True, True], [True, True, False]])

    def scores(x: Tensor) -> tuple[Tensor, ...]:
        options = {"temperature": 0.8, "mask": mask, "kept": kept}
        return token_logprobs(x, tokens, **options, backend=helpers.use(backend))

    assert torch.autograd.gradcheck(scores, leaf)


def test_bad_arguments_are_named():
    logits, tokens = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    good = KeptTokens.from_mask(torch.ones(2, 5, dtype=torch.bool))

    def refuses(error: type[Exception], match: str, kept: object, **options) -> None:
        with pytest.raises(error, match=match):
            token_logprobs(logits, tokens, kept=kept, **options)

    refuses(TypeError, "kept must be a KeptTokens, got tuple", tuple(good))
    refuses(ValueError, r"kept\.offsets must be 1-d", good._replace(offsets=good.offsets.int()))
    refuses(ValueError, r"kept\.token_ids must be 1-d", good._replace(token_ids=torch.zeros(10)))
    refuses(ValueError, "a row for each of the 2", good._replace(offsets=torch.tensor([0, 10])))
    refuses(ValueError, "rise from 0 to 10", good._replace(offsets=torch.tensor([0, 12, 10])))
    refuses(ValueError, r"in \[0, 5\), got 1 to 5", good._replace(token_ids=good.token_ids + 1))
    refuses(ValueError, "inplace_backward", good, inplace_backward=True)


def test_steps_of_a_loop_in_the_order_of_a_trainer():
    masks = torch.rand(5, 3, 40) < torch.rand(5, 3, 1)  # [T, B, V]
    masks[1, 2] = False
    kept = KeptTokens.from_steps([KeptTokens.from_mask(mask) for mask in masks])
    assert torch.equal(kept.to_mask(40).view(3, 5, 40), masks.transpose(0, 1))
    parts = kept.split([5, 0, 10])
    assert [part.num_rows for part in parts] == [5, 0, 10]
    for joined, whole in zip(KeptTokens.cat(parts), kept, strict=True):
        assert torch.equal(joined, whole)
    with pytest.raises(ValueError, match="sizes must add up to 15 rows, got 14"):
        kept.split([14])
