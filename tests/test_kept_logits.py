"""kept_logits: the logits of a matmul at the kept ids, and the gradients of that; bits, edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyllmtune import KeptTokens, linear_token_logprobs, sample, token_logprobs
from pyllmtune.ops import kept_logits_dense, linear_tiles
from pyllmtune.ops.kept_logits import kept_logits
from tests import helpers

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def _never_by_matmul(monkeypatch):
    """However large the sets of a test are."""
    monkeypatch.setattr(kept_logits_dense, "SHARE", 1.0)


@pytest.fixture
def always_by_matmul(monkeypatch, _never_by_matmul):
    monkeypatch.setattr(kept_logits_dense, "SHARE", -1.0)


def random_case(
    rows: int, size: int, vocab: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, KeptTokens]:
    """Hidden states and a weight; the first row keeps nothing, the second everything, and every
    other row the id 0.
    """
    hidden, weight = (torch.randn(n, size).to(dtype) for n in (rows, vocab))
    mask = torch.rand(rows, vocab) < 0.3
    mask[:, 0], mask[:1], mask[1:2] = True, False, True
    return hidden, weight, KeptTokens.from_mask(mask)


def compare(
    backend: str, hidden: Tensor, weight: Tensor, kept: KeptTokens, mask=None, roundings: int = 1
) -> None:
    """Against the whole matmul in float64 on the same operands."""
    dtype = hidden.dtype
    upstream = torch.randn(kept.token_ids.shape) * (torch.rand(kept.token_ids.shape) > 0.3)
    if mask is not None:
        upstream = upstream * mask[kept.rows]
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    got = kept_logits(*leaves, kept, mask, helpers.use(backend))
    want = (wide[0] @ wide[1].T)[kept.rows, kept.token_ids.long()]
    if mask is not None:
        want = torch.where(mask[kept.rows], want, 0)
    assert got.dtype == helpers.accumulator(dtype)
    helpers.assert_close(got, want, helpers.FORWARD[dtype], "logits")
    grads = torch.autograd.grad(got, leaves, upstream.to(got.dtype))
    wanted = torch.autograd.grad(want, wide, upstream.double())
    for name, grad, expected in zip(("hidden", "weight"), grads, wanted, strict=True):
        assert grad.dtype == dtype
        tolerance = roundings * helpers.BACKWARD[dtype]
        helpers.assert_close(grad, expected, tolerance, f"gradient of {name}")


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=helpers.dtype_id)
@pytest.mark.parametrize("size", (1, 7, 64, 521))
def test_matmul_at_the_kept_ids(backend, dtype, size):
    if helpers.runs(backend, dtype):
        compare(backend, *random_case(5, size, 11, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=helpers.dtype_id)
@pytest.mark.parametrize("size", (15, 16, 17, 63, 65, 128, 300))
def test_lengths_around_vectors(dtype, size):
    compare("cpp", *random_case(9, size, 30, dtype))


def test_a_large_weight_has_a_gradient_in_fresh_memory():
    compare("cpp", *random_case(4, 300, 2000, torch.float32))


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("shape", ((0, 4, 3), (1, 4, 1), (3, 4, 1)), ids=str)
def test_no_rows_and_no_entries(backend, shape):
    compare(backend, *random_case(*shape, torch.float32))
    hidden, weight, _ = random_case(*shape, torch.float32)
    compare(backend, hidden, weight, KeptTokens.from_mask(torch.zeros(shape[0], 3) > 0))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the NaN in the masked row
@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_masked_rows_are_zero_and_reach_no_gradient(backend):
    hidden, weight, kept = random_case(5, 20, 11, torch.float32)
    mask = torch.tensor([True, True, False, True, False])
    compare(backend, hidden, weight, kept, mask)
    hidden[~mask] = math.nan
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    logits = kept_logits(*leaves, kept, mask, helpers.use(backend))
    assert torch.equal(logits[~mask[kept.rows]], torch.zeros(int((~mask[kept.rows]).sum())))
    by_hidden, by_weight = torch.autograd.grad(logits, leaves, mask[kept.rows].float())
    assert torch.equal(by_hidden[~mask], torch.zeros(2, 20)) and by_weight.isfinite().all()


@pytest.mark.parametrize("backend", helpers.KERNELS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=helpers.dtype_id)
def test_bits_do_not_depend_on_batch_order_or_threads(backend, dtype):
    """A row alone has the bits it has in a batch; the weight's gradient those of any threads."""
    hidden, weight, kept = random_case(7, 133, 40, dtype)
    keep = kept.to_mask(40)

    def run(rows: Tensor) -> tuple[Tensor, ...]:
        chosen = KeptTokens.from_mask(keep[rows])
        leaves = [x.clone().requires_grad_() for x in (hidden[rows], weight)]
        logits = kept_logits(*leaves, chosen, None, helpers.use(backend))
        grads = torch.autograd.grad(logits, leaves, logits.detach())
        table = torch.zeros(len(rows), 40)
        table[chosen.rows, chosen.token_ids.long()] = logits.detach()
        return (table, *grads)

    table, by_hidden, by_weight = run(torch.arange(7))
    threads = torch.get_num_threads()
    try:
        for count, rows in ((1, torch.arange(7)), (2, torch.randperm(7)), (2, torch.tensor([4]))):
            torch.set_num_threads(count)
            got = run(rows)
            assert torch.equal(got[0], table[rows]) and torch.equal(got[1], by_hidden[rows])
            if count == 1:
                assert torch.equal(got[2], by_weight)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", helpers.KERNELS)
def test_a_frozen_operand_has_no_gradient(backend):
    hidden, weight, kept = random_case(4, 20, 11, torch.float32)
    for leaf, frozen in ((hidden, weight), (weight, hidden)):
        leaf = leaf.clone().requires_grad_()
        pair = (leaf, frozen) if leaf.shape == hidden.shape else (frozen, leaf)
        kept_logits(*pair, kept, None, helpers.use(backend)).sum().backward()
        assert leaf.grad is not None and frozen.grad is None


@pytest.mark.parametrize("backend", ("reference", "cpp"))
def test_gradcheck(backend):
    hidden, weight, kept = random_case(4, 3, 6, torch.float64)
    mask = torch.tensor([True, True, False, True])
    assert torch.autograd.gradcheck(
        lambda *x: kept_logits(*x, kept, mask, helpers.use(backend)),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


def test_the_kernel_checks_what_leads_outside():
    """What ``torch.compile`` cannot look at is looked at before a pointer is followed."""
    helpers.need("cpp")
    hidden, weight, kept = random_case(3, 4, 5, torch.float32)
    for bad, match in (
        (kept._replace(token_ids=kept.token_ids + 1), r"in \[0, 5\)"),
        (kept._replace(offsets=kept.offsets.flip(0)), "lead from 0"),
    ):
        with pytest.raises(RuntimeError, match=match):
            kept_logits(hidden, weight, bad, None, "cpp")


@pytest.mark.usefixtures("always_by_matmul")
@pytest.mark.parametrize("dtype", DTYPES, ids=helpers.dtype_id)
@pytest.mark.parametrize("vocab", (11, 2048, 4100))
def test_large_sets_by_matmul(dtype, vocab):
    """Tiles of 2,048 columns: a part of one, a whole one, several; one of them without entries."""
    hidden, weight, kept = random_case(5, 33, vocab, dtype)
    mask = torch.tensor([True, True, False, True, True])
    compare("cpp", hidden, weight, kept, roundings=2)  # the gradient is an operand of a matmul
    hidden[2] = math.nan
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    logits = kept_logits(*leaves, kept, mask, "cpp")
    by_hidden, by_weight = torch.autograd.grad(logits.sum(), leaves)
    assert torch.equal(by_hidden[2], torch.zeros_like(by_hidden[2]))
    assert logits.isfinite().all() and by_weight.isfinite().all()


HEADS = {
    "plain": {},
    "everything": {"temperature": 0.7, "logit_scale": 0.5, "softcap": 3.0},
}


def compare_heads(backend: str, dtype: torch.dtype, head: str, mask: Tensor | None) -> None:
    """linear_token_logprobs of kept sets against whole logits, -inf outside, in float64."""
    hidden, weight, kept = random_case(6, 24, 17, dtype)
    hidden, bias = hidden.view(2, 3, 24), torch.randn(17)
    tokens = torch.randint(17, (2, 3))
    options = {**HEADS[head], "mask": None if mask is None else mask.view(2, 3)}
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    backend = helpers.use(backend)
    got = linear_token_logprobs(
        *leaves[:2], tokens, bias=leaves[2], kept=kept, backend=backend, **options
    )
    z = (wide[0] @ wide[1].T + wide[2]) * options.pop("logit_scale", 1.0)
    cap = options.pop("softcap", None)
    z = z if cap is None else cap * torch.tanh(z / cap)
    z = z.masked_fill(~kept.to_mask(17).view(2, 3, 17), -math.inf)
    want = token_logprobs(z, tokens, backend="reference", **options)
    for name, value, expected in zip(got._fields, got, want, strict=True):
        helpers.assert_close(value, expected, helpers.FORWARD[dtype], name)
    upstream = torch.randn(3, 2, 3)
    grads, wanted = (
        torch.autograd.grad(
            sum(
                (torch.where(x.isinf(), 0, x) * g).sum() for x, g in zip(out, upstream, strict=True)
            ),
            inputs,
        )
        for out, inputs in ((got, leaves), (want, wide))
    )
    for name, grad, expected in zip(("hidden", "weight", "bias"), grads, wanted, strict=True):
        helpers.assert_close(grad, expected, helpers.BACKWARD[grad.dtype], f"gradient of {name}")


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=helpers.dtype_id)
@pytest.mark.parametrize("head", HEADS)
def test_heads_over_kept_sets(backend, dtype, head):
    compare_heads(backend, dtype, head, None)
    compare_heads(backend, dtype, head, torch.rand(6) > 0.3)


@pytest.mark.usefixtures("always_by_matmul")
@pytest.mark.parametrize("head", HEADS)
def test_heads_over_large_kept_sets(head):
    compare_heads("cpp", torch.float32, head, torch.rand(6) > 0.3)


def test_the_samplers_log_prob_from_hidden_states():
    hidden, weight = torch.randn(32, 40), torch.randn(3000, 40)
    out = sample(hidden @ weight.T, top_p=0.8, logprobs="processed", return_kept=True)
    scored = linear_token_logprobs(hidden, weight, out.tokens, kept=out.kept)
    torch.testing.assert_close(scored.logprobs, out.logprobs, atol=1e-5, rtol=1e-5)


def test_bad_arguments_are_named():
    hidden, weight, kept = random_case(3, 4, 5, torch.float32)
    tokens = torch.zeros(3, dtype=torch.int64)
    for bad, options, match in (
        (kept._replace(token_ids=kept.token_ids + 1), {}, r"kept\.token_ids must be in \[0, 5\)"),
        (kept, {"workspace_bytes": 1 << 30}, "workspace_bytes"),
    ):
        with pytest.raises(ValueError, match=match):
            linear_token_logprobs(hidden, weight, tokens, kept=bad, **options)


def test_autocast_does_not_round_the_matmul(always_by_matmul, monkeypatch):
    """Of a floor that multiplies by torch.mm."""
    helpers.need("cpp")
    hidden, weight, kept = random_case(5, 30, 40, torch.bfloat16)
    monkeypatch.setattr(linear_tiles._backend, "why_not", lambda *_: "here it is torch's")
    want = kept_logits(hidden, weight, kept, None, "cpp")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = kept_logits(hidden, weight, kept, None, "cpp")
    assert torch.equal(got, want)
