"""kl_divergence: same bits whatever the batch, work that is not done, its bounds, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pyllmtune import kl_divergence
from tests import helpers
from tests.test_kl_divergence import KINDS, both, pair, run

kernels = pytest.mark.parametrize("backend", helpers.KERNELS)


@kernels
@both
def test_rows_without_upstream_gradient_are_not_read(backend, kind):
    """After forward the idle rows become NaN; had backward read them, the gradient would be NaN."""
    leaves = [x.requires_grad_() for x in pair((2, 4), 300)]
    work = [x * 1.0 for x in leaves]
    out = kl_divergence(*work, backend=helpers.use(backend), **KINDS[kind])
    active = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    for x in work:  # through numpy: autograd does not notice
        x.detach().numpy()[active.numpy() == 0] = math.nan
    for grad in torch.autograd.grad((out * active).sum(), work):
        assert torch.equal(grad[active == 0], torch.zeros_like(grad[active == 0]))
        assert grad[active == 1].isfinite().all() and (grad[active == 1] != 0).any()


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@both
@pytest.mark.parametrize("frozen", (0, 1))
def test_a_frozen_argument_gets_no_gradient(backend, kind, frozen):
    rows = pair((3,), 130)
    want = run(*rows, torch.ones(3), helpers.use(backend), **KINDS[kind])[2 - frozen]
    rows = [x.clone().requires_grad_(side != frozen) for side, x in enumerate(rows)]
    kl_divergence(*rows, backend=backend, **KINDS[kind]).sum().backward()
    assert rows[frozen].grad is None and torch.equal(rows[1 - frozen].grad, want)


@both
def test_one_gradient_is_half_of_the_memory(kind):
    """The operator returns nothing for a gradient that is not wanted."""
    helpers.need("cpp")
    first, second = pair((3,), 50)
    out, stats = torch.ops.pyllmtune.kl_divergence(first[None], second[None], 1.0, None, None, 0.0)
    for wanted in ((True, False), (False, True), (False, False)):
        grads = torch.ops.pyllmtune.kl_divergence_backward(
            first[None], second[None], 1.0, None, None, 0.0, stats, torch.ones_like(out), *wanted
        )
        assert [bool(grad.numel()) for grad in grads] == list(wanted)


@kernels
@both
def test_bits_do_not_depend_on_batch_order_stride_or_threads(backend, kind):
    vocab = 70_001 if backend == "cpp" else 700
    rows = pair((6,), vocab)
    temperature, upstream = torch.rand(6) + 0.5, torch.randn(6)

    def results(first: Tensor, second: Tensor, chosen: Tensor) -> tuple[Tensor, ...]:
        options = KINDS[kind] | {"temperature": temperature[chosen]}
        return run(first, second, upstream[chosen], helpers.use(backend), **options)

    everything, order = torch.arange(6), torch.tensor([3, 0, 5, 1, 4, 2])
    want = results(*rows, everything)
    gapped = torch.empty(6, vocab + 3)[:, 1 : vocab + 1].copy_(rows[1])
    runs = [
        (results(*(x[order].clone() for x in rows), order), order),
        (results(rows[0], gapped, everything), everything),
        (results(*(x[4:5].clone() for x in rows), everything[4:5]), everything[4:5]),
    ]
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        runs.append((results(*rows, everything), everything))
    torch.set_num_threads(threads)
    for got, chosen in runs:
        for value, expected in zip(got, want, strict=True):
            assert torch.equal(value, expected[chosen])


@kernels
def test_reverse_exchanges_the_arguments_and_js_is_symmetric(backend):
    first, second = pair((4,), 90)
    run_here = helpers.use(backend)
    there = kl_divergence(first, second, reverse=True, backend=run_here)
    assert torch.equal(there, kl_divergence(second, first, backend=run_here))
    for weight in (0.5, 0.2):
        js = kl_divergence(first, second, js_weight=weight, backend=run_here)
        mirrored = kl_divergence(second, first, js_weight=1 - weight, backend=run_here)
        torch.testing.assert_close(js, mirrored)
        assert (js > 0).all() and (js < math.log(2)).all()
    apart = torch.eye(2) * 200
    js = kl_divergence(apart[:1], apart[1:], js_weight=0.5, backend=run_here)
    torch.testing.assert_close(js, torch.tensor([math.log(2)]))
    # divided by its weight it tends to the reverse divergence, and the forward one at the other end
    near = kl_divergence(first, second, js_weight=1e-4, backend=run_here) / 1e-4
    torch.testing.assert_close(near, there, rtol=2e-2, atol=0.0)  # first order in the weight


def test_error_when_only_the_top_of_a_flat_row_moves():
    """The one weakness: error below 3e-6 / (probability of the highest token), as the page says."""
    helpers.need("cpp")
    for vocab in (100, 1000, 10_000):
        first = torch.randn(1, vocab) * 0.01
        second = first.clone()
        second[0, first.argmax()] += 0.2
        got = kl_divergence(first, second, backend="cpp").double()
        want = kl_divergence(first.double(), second.double(), backend="reference")
        assert float((got / want - 1).abs()) < 3e-6 * vocab


@pytest.mark.slow
def test_error_at_a_real_vocabulary():
    """V = 151,936, policies that drift from their reference: relative error below 1e-5."""
    helpers.need("cpp")
    first = torch.randn(6, 151_936) * torch.tensor([0.5, 1.0, 2.0, 3.0, 5.0, 8.0])[:, None]
    first[2:4, :40] += 12
    for distance in (1e-4, 1e-3, 1e-2, 0.1, 1.0):
        second = first + distance * torch.randn(6, 151_936)
        for options in KINDS.values():
            got = kl_divergence(first, second, backend="cpp", **options).double()
            want = kl_divergence(first.double(), second.double(), backend="reference", **options)
            assert float((got / want - 1).abs().max()) < 1e-5


@kernels
def test_row_offsets_beyond_2_to_the_31(backend):
    """Rows 2^30 elements apart: the third lies past 2^31. Memory that is not touched is not
    there.
    """
    far = torch.from_numpy(np.empty(2**31 + 300, dtype=np.uint16)).view(torch.bfloat16)
    rows = far.as_strided((3, 300), (2**30, 1))
    first, second = pair((3,), 300, torch.bfloat16)
    rows.copy_(second)
    for options in KINDS.values():
        got = kl_divergence(first, rows, backend=helpers.use(backend), **options)
        want = kl_divergence(first, second, backend=backend, **options)
        # compiled Triton orders a sum by how rows are aligned, and the two differ in that
        tolerance = helpers.FORWARD[torch.float32] if backend == "triton" else 0.0
        helpers.assert_close(got, want, tolerance, f"far rows, {options}")


BAD = {
    r"logits must be a torch\.Tensor": lambda x: (([1.0], x), {}),
    r"ref_logits must be a torch\.Tensor": lambda x: ((x, None), {}),
    "logits must be one of float32": lambda x: ((x.int(), x), {}),
    r"logits must be \[\.\.\., V\], got a 0-d": lambda x: ((x[0, 0], x[0, 0]), {}),
    "vocabulary axis of at least 1": lambda x: ((x[:, :0], x[:, :0]), {}),
    "contiguous along its last axis": lambda x: ((x, torch.randn(9, 2).T), {}),
    r"ref_logits must have shape \[2, 9\]": lambda x: ((x, x[:1]), {}),
    r"ref_logits must have the dtype of logits, torch\.float32": lambda x: ((x, x.double()), {}),
    r"mask must have shape \[2\]": lambda x: ((x, x), {"mask": torch.ones(3)}),
    "mask must be a torch.Tensor": lambda x: ((x, x), {"mask": [True, False]}),
    "temperature must be positive and finite, got 0.0": lambda x: ((x, x), {"temperature": 0.0}),
    "temperature must be positive and finite in every row": lambda x: (
        (x, x),
        {"temperature": torch.tensor([1.0, -1.0])},
    ),
    "temperature requires grad": lambda x: (
        (x, x),
        {"temperature": torch.ones(2, requires_grad=True)},
    ),
    r"js_weight must be in \(0, 1\), got 1\.0": lambda x: ((x, x), {"js_weight": 1.0}),
    r"js_weight must be in \(0, 1\), got 0\.0": lambda x: ((x, x), {"js_weight": 0.0}),
    r"js_weight must be in \(0, 1\), got nan": lambda x: ((x, x), {"js_weight": math.nan}),
    "exchange the roles by js_weight=1 - W": lambda x: (
        (x, x),
        {"js_weight": 0.3, "reverse": True},
    ),
    "backend must be one of": lambda x: ((x, x), {"backend": "gpu"}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_argument_value_and_remedy(message):
    arguments, options = BAD[message](torch.randn(2, 9))
    with pytest.raises((TypeError, ValueError), match=message):
        kl_divergence(*arguments, **options)


def test_the_operator_checks_what_python_did_not():
    helpers.need("cpp")
    op = torch.ops.pyllmtune.kl_divergence
    first, second = (x[None] for x in pair((2,), 9))
    with pytest.raises(RuntimeError, match="the dtype and the shape of logits"):
        op(first, second[:, :1], 1.0, None, None, 0.0)
    with pytest.raises(RuntimeError, match="temperature must be positive"):
        op(first, second, 0.0, None, None, 0.0)
    with pytest.raises(RuntimeError, match=r"js_weight must be in \[0, 1\)"):
        op(first, second, 1.0, None, None, 1.0)
