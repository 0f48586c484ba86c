"""token_logprobs: same bits whatever the batch, memory that is not touched, threads, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pyllmtune import token_logprobs
from tests import helpers
from tests.test_token_logprobs import grads_of, random_case


@pytest.mark.parametrize("backend", helpers.KERNELS)
@pytest.mark.parametrize("inplace", (False, True))
def test_rows_without_upstream_gradient_are_not_read(backend, inplace):
    """After forward the idle rows become NaN; had backward read them, the gradient would be NaN."""
    storage, tokens = random_case((2, 4), 600, torch.float32)
    logits = storage.clone().requires_grad_()
    work = logits * 1.0
    out = token_logprobs(work, tokens, inplace_backward=inplace, backend=helpers.use(backend))
    active = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    work.detach().numpy()[active.numpy() == 0] = math.nan  # through numpy: autograd does not notice
    (grad,) = torch.autograd.grad((out.logprobs * active).sum(), work)
    assert torch.equal(grad[active == 0], torch.zeros_like(grad[active == 0]))
    assert grad[active == 1].isfinite().all() and (grad[active == 1] != 0).any()


@pytest.mark.parametrize("backend", helpers.KERNELS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=helpers.dtype_id)
def test_inplace_backward_writes_over_the_logits(backend, dtype):
    """Same bits as the fresh gradient, in the memory of the logits; strided rows leave the gaps
    alone.
    """
    whole, _ = random_case((2, 4), 300, dtype)
    tokens = torch.randint(0, 300, (2, 3))
    weights = torch.randn(3, 2, 3)
    weights[:, 0, 1] = 0
    grads = []
    for inplace in (False, True):
        base = whole.clone().requires_grad_()
        view = (base * 1.0)[:, :-1]
        out = token_logprobs(
            view, tokens, temperature=0.9, inplace_backward=inplace, backend=helpers.use(backend)
        )
        grads.append(grads_of(out, view, weights))
        assert (grads[-1].data_ptr() == view.data_ptr()) == inplace
    assert torch.equal(grads[0], grads[1])


def test_inplace_backward_refuses_a_leaf_and_a_second_backward():
    logits, tokens = random_case((2,), 20, torch.float32)
    leaf = logits.requires_grad_()
    with pytest.raises(
        ValueError, match="inplace_backward=True would write the gradient over a leaf"
    ):
        token_logprobs(leaf, tokens, inplace_backward=True)
    out = token_logprobs(leaf * 1.0, tokens, inplace_backward=True).logprobs.sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("backend", helpers.KERNELS)
def test_bits_do_not_depend_on_batch_order_stride_or_threads(backend):
    vocab = 70_001 if backend == "cpp" else 1500
    logits, tokens = random_case((6,), vocab, torch.float32)
    temperature = torch.rand(6) + 0.5

    def run(x: Tensor, rows: Tensor) -> list[Tensor]:
        leaf = x.requires_grad_()
        out = token_logprobs(
            leaf, tokens[rows], temperature=temperature[rows], backend=helpers.use(backend)
        )
        return [*out, torch.autograd.grad(out.logprobs.sum() - 0.3 * out.entropy.sum(), leaf)[0]]

    everything = torch.arange(6)
    want = run(logits.clone(), everything)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    gapped = torch.empty(6, vocab + 3)
    gapped[:, 1 : vocab + 1] = logits
    runs = [
        (run(logits[order].clone(), order), order),
        (run(gapped[:, 1 : vocab + 1].detach(), everything), everything),
        *(
            (run(logits[i : i + 1].clone(), everything[i : i + 1]), everything[i : i + 1])
            for i in (0, 4)
        ),
    ]
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        runs.append((run(logits.clone(), everything), everything))
    torch.set_num_threads(threads)
    for got, rows in runs:
        for value, expected in zip(got, want, strict=True):
            assert torch.equal(value, expected[rows])


@pytest.mark.slow
def test_error_at_a_real_vocabulary():
    """V = 151,936: float32 log-prob below 5e-6 and entropy below 2e-5; bf16 as exact as its bits
    allow.
    """
    helpers.need("cpp")
    logits = torch.randn(6, 151_936) * torch.tensor([0.5, 1.0, 2.0, 3.0, 5.0, 8.0])[:, None]
    logits[2:4, :40] += 12
    tokens = torch.tensor([0, 77, 5, 151_935, 1000, 99_999])
    for dtype in (torch.float32, torch.bfloat16):
        x = logits.to(dtype)
        got = token_logprobs(x, tokens, backend="cpp")
        want = token_logprobs(x.double(), tokens, backend="reference")
        assert float((got.logprobs - want.logprobs).abs().max()) < 5e-6
        assert float((got.entropy - want.entropy).abs().max()) < 2e-5
        assert float((got.logsumexp - want.logsumexp).abs().max()) < 5e-6


@pytest.mark.parametrize("backend", helpers.KERNELS)
def test_row_offsets_beyond_2_to_the_31(backend):
    """Rows 2^30 elements apart: the third lies past 2^31. Memory that is not touched is not
    there.
    """
    far = torch.from_numpy(np.empty(2**31 + 300, dtype=np.uint16)).view(torch.bfloat16)
    rows = far.as_strided((3, 300), (2**30, 1))
    near, tokens = random_case((3,), 300, torch.bfloat16)
    rows.copy_(near)
    got = token_logprobs(rows, tokens, backend=helpers.use(backend))
    want = token_logprobs(near, tokens, backend=backend)
    # compiled Triton orders a sum by how rows are aligned, and the two differ in that
    tolerance = helpers.FORWARD[torch.float32] if backend == "triton" else 0.0
    for name, value, expected in zip(got._fields, got, want, strict=True):
        helpers.assert_close(value, expected, tolerance, f"far rows, {name}")


BAD = {
    "logits must be a torch.Tensor": lambda x, t: ([1.0], t, {}),
    "logits must be one of float32": lambda x, t: (x.int(), t, {}),
    "logits must be \\[..., V\\], got a 0-d": lambda x, t: (torch.tensor(1.0), torch.tensor(0), {}),
    "vocabulary axis of at least 1": lambda x, t: (x[:, :0], t, {}),
    "contiguous along its last axis": lambda x, t: (torch.randn(9, 2).T, t, {}),
    "tokens must be one of int64": lambda x, t: (x, t.float(), {}),
    "tokens must have shape \\[2\\]": lambda x, t: (x, t[:1], {}),
    "tokens must be in \\[0, 9\\), got 9": lambda x, t: (x, torch.tensor([0, 9]), {}),
    "tokens must be in \\[0, 9\\), got -1": lambda x, t: (x, torch.tensor([-1, 0]), {}),
    "mask must have shape": lambda x, t: (x, t, {"mask": torch.ones(3, dtype=torch.bool)}),
    "mask must be a torch.Tensor": lambda x, t: (x, t, {"mask": [True, False]}),
    "temperature must be positive and finite, got 0.0": lambda x, t: (x, t, {"temperature": 0.0}),
    "temperature must be positive and finite, got -1.0": lambda x, t: (x, t, {"temperature": -1}),
    "temperature must be positive and finite, got nan": lambda x, t: (
        x,
        t,
        {"temperature": math.nan},
    ),
    "in every row, got nan": lambda x, t: (x, t, {"temperature": torch.tensor([1.0, math.nan])}),
    "in every row, got -2": lambda x, t: (x, t, {"temperature": torch.tensor([1.0, -2.0])}),
    "temperature must have shape": lambda x, t: (x, t, {"temperature": torch.ones(3)}),
    "has no gradient in it": lambda x, t: (
        x,
        t,
        {"temperature": torch.ones(2, requires_grad=True)},
    ),
    "backend must be one of": lambda x, t: (x, t, {"backend": "cudnn"}),
    "backend='cuda' was asked for, but the tensors are on cpu": lambda x, t: (
        x,
        t,
        {"backend": "cuda"},
    ),
    "tokens is on meta": lambda x, t: (x, t.to("meta"), {}),
}


@pytest.mark.parametrize("message", BAD, ids=lambda message: message[:40])
@pytest.mark.parametrize("backend", ("reference", "cpp"))
def test_bad_input_is_refused_by_name(message, backend):
    logits, tokens, options = BAD[message](torch.randn(2, 9), torch.tensor([0, 8]))
    with pytest.raises((TypeError, ValueError), match=message):
        token_logprobs(logits, tokens, **{"backend": backend, **options})


def test_the_kernel_guards_itself_where_python_cannot_look():
    """Under torch.compile nothing is checked in Python; the C++ kernel still refuses before it
    reads.
    """
    helpers.need("cpp")
    args = (torch.randn(1, 2, 9), torch.tensor([[0, 9]]), 1.0, None, None, False)
    with pytest.raises(RuntimeError, match="tokens must be in"):
        torch.ops.pyllmtune.token_logprobs(*args)
    bad_temperature = (
        args[0],
        torch.tensor([[0, 1]]),
        1.0,
        torch.tensor([[1.0, -1.0]]),
        None,
        False,
    )
    with pytest.raises(RuntimeError, match="temperature must be positive"):
        torch.ops.pyllmtune.token_logprobs(*bad_temperature)


@pytest.mark.parametrize("backend", ("triton", "emulated"))
def test_token_out_of_range_on_a_gpu_poisons_its_row(backend):
    """No host sync on a GPU: the row becomes NaN and its neighbours stay."""
    from pyllmtune import _ops

    helpers.use(backend)
    logits = torch.randn(1, 3, 50).requires_grad_()
    for bad in (-1, 50, 2**40):
        out = _ops.handle("token_logprobs", backend)(
            logits, torch.tensor([[1, bad, 2]]), 1.0, None, None, False
        )
        for value in out[:3]:
            assert value[0, 1].isnan() and value[0, [0, 2]].isfinite().all()
        (grad,) = torch.autograd.grad(out[0].sum(), logits)
        assert grad[0, 1].isnan().all() and grad[0, [0, 2]].isfinite().all()


def test_inference_mode_and_no_grad():
    logits, tokens = random_case((3,), 40, torch.float32)
    want = token_logprobs(logits, tokens)
    with torch.inference_mode():
        for value, expected in zip(token_logprobs(logits, tokens), want, strict=True):
            assert torch.equal(value, expected)


def test_autocast_changes_nothing():
    """Logits are read as they are and results are float32, inside autocast or not."""
    logits, tokens = random_case((3,), 40, torch.bfloat16)
    want = token_logprobs(logits, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_logprobs(logits, tokens)
    for value, expected in zip(got, want, strict=True):
        assert value.dtype == torch.float32 and torch.equal(value, expected)


def test_several_python_threads_at_once():
    from concurrent.futures import ThreadPoolExecutor

    cases = [random_case((5,), 20_000, torch.float32) for _ in range(8)]
    want = [token_logprobs(*case).logprobs for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            got = list(pool.map(lambda case: token_logprobs(*case).logprobs, cases))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
