"""temperature_softmax: same bits whatever the batch, results written into given memory, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pyllmtune import temperature_softmax
from tests import helpers
from tests.test_temperature_softmax import random_logits


@pytest.mark.parametrize("backend", helpers.KERNELS)
@pytest.mark.parametrize("log", (False, True), ids=("softmax", "log"))
def test_bits_do_not_depend_on_batch_order_stride_or_threads(backend, log):
    """Nine rows are done whole by a thread, one or two are cut into stripes for all threads."""
    vocab = 70_001 if backend == "cpp" else 1200
    logits = random_logits(9, vocab)
    temperature = torch.tensor([0.7, 1.0, 0.0, 2.0, 0.3, 1.0, 5.0, 0.9, 1e-3])
    upstream = torch.randn(9, vocab)

    def run(x: Tensor, rows: Tensor) -> list[Tensor]:
        leaf, learnt = x.detach().requires_grad_(), temperature[rows].requires_grad_()
        out = temperature_softmax(leaf, learnt, log=log, backend=helpers.use(backend))
        return [out.detach(), *torch.autograd.grad(out, (leaf, learnt), upstream[rows])]

    everything = torch.arange(9)
    want = run(logits, everything)
    order = torch.tensor([3, 0, 8, 1, 4, 2, 7, 6, 5])
    gapped = torch.empty(9, vocab + 3)
    gapped[:, 1 : vocab + 1] = logits
    runs = [(run(logits[order], order), order)]
    if backend != "triton":  # on a GPU its bits depend on the alignment of a tensor
        runs.append((run(gapped[:, 1 : vocab + 1], everything), everything))
    runs += [(run(logits[i : i + 2], everything[i : i + 2]), everything[i : i + 2]) for i in (0, 4)]
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        runs.append((run(logits, everything), everything))
    torch.set_num_threads(threads)
    for got, rows in runs:
        for value, expected in zip(got, want, strict=True):
            assert torch.equal(value, expected[rows])


@pytest.mark.parametrize("log", (False, True), ids=("softmax", "log"))
def test_results_past_the_cache_have_the_same_bits(log):
    """From 32 MiB on, the CPU kernel writes around the cache, in whole lines."""
    helpers.need("cpp")
    logits = random_logits(70, 130_003)
    want = torch.cat([temperature_softmax(part, 0.7, log=log) for part in logits.split(20)])
    assert torch.equal(temperature_softmax(logits, 0.7, log=log), want)
    whole = torch.empty(70 * 130_003 + 70 * 5 + 1)
    out = whole[1:].view(70, 130_008)[:, :130_003]  # rows that begin anywhere
    temperature_softmax(logits, 0.7, log=log, out=out)
    assert torch.equal(out, want)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=helpers.dtype_id)
def test_out_is_written_and_returned(backend, dtype):
    logits, temperature = random_logits(2, 3, 301, dtype=dtype), torch.rand(2, 3) + 0.3
    temperature[1, 1] = 0
    for log in (False, True):
        for result in (dtype, torch.float32, torch.float16):
            options = {"log": log, "backend": helpers.use(backend)}
            want = temperature_softmax(logits, temperature, dtype=result, **options)
            whole = torch.full((3, 4, 310), 7.0, dtype=result)
            out = whole.transpose(0, 1)[1:3, :, 3:304]  # strided rows, not aligned
            version = out._version
            got = temperature_softmax(logits, temperature, out=out, dtype=result, **options)
            assert got is out and torch.equal(out, want) and out._version > version
            out.fill_(7.0)
            assert (whole == 7.0).all()  # the gaps were left alone


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("shape", ((301,), (0, 301), (4, 301), (2, 2, 3, 301)), ids=str)
def test_in_place(backend, shape):
    for dtype in (torch.float32, torch.bfloat16):
        for log in (False, True):
            logits = random_logits(*shape, dtype=dtype)
            temperature = torch.tensor(0.7)
            want = temperature_softmax(
                logits, temperature, log=log, backend=helpers.use(backend)
            ).clone()
            got = temperature_softmax(logits, temperature, log=log, out=logits, backend=backend)
            assert got is logits and torch.equal(logits, want)


def test_in_place_of_strided_rows_and_stripes():
    helpers.need("cpp")
    whole = random_logits(3, 70_010)
    view = whole[:, 5:70_006]
    want = temperature_softmax(view, 0.7)
    temperature_softmax(view, 0.7, out=view)
    assert torch.equal(view, want)


def test_a_graph_that_holds_the_old_values_refuses():
    helpers.need("cpp")
    logits, out = random_logits(2, 20), torch.ones(2, 20)
    loss = (torch.ones(2, 20, requires_grad=True) * out).sum()
    temperature_softmax(logits, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", helpers.KERNELS)
def test_row_offsets_beyond_2_to_the_31(backend):
    """Rows 2^30 elements apart: the third lies past 2^31. Memory that is not touched is not
    there.
    """
    far = torch.from_numpy(np.empty(2**31 + 300, dtype=np.uint16)).view(torch.bfloat16)
    rows = far.as_strided((3, 300), (2**30, 1))
    near = random_logits(3, 300, dtype=torch.bfloat16)
    rows.copy_(near)
    want = temperature_softmax(near, 0.7, backend=helpers.use(backend))
    temperature_softmax(rows, 0.7, out=rows, backend=backend)
    assert torch.equal(rows, want)


def learnt(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


ROWS, SHARED = torch.randn(2, 9), torch.zeros(40)
BAD = {
    "logits must be a torch.Tensor": lambda: ([1.0], {}),
    "logits must be one of float32": lambda: (ROWS.int(), {}),
    "logits must be \\[..., V\\], got a 0-d": lambda: (torch.tensor(1.0), {}),
    "vocabulary axis of at least 1": lambda: (ROWS[:, :0], {}),
    "contiguous along its last axis": lambda: (torch.randn(9, 2).T, {}),
    "dtype must be float32": lambda: (ROWS, {"dtype": torch.int32}),
    "temperature must be at least 0 and finite, got -1.0": lambda: (ROWS, {"temperature": -1}),
    "temperature must be at least 0 and finite, got nan": lambda: (
        ROWS,
        {"temperature": math.nan},
    ),
    "temperature must be at least 0 and finite, got inf": lambda: (
        ROWS,
        {"temperature": math.inf},
    ),
    "in every row, got nan": lambda: (ROWS, {"temperature": torch.tensor([1.0, math.nan])}),
    "in every row, got -2": lambda: (ROWS, {"temperature": torch.tensor([1.0, -2.0])}),
    "temperature must have shape": lambda: (ROWS, {"temperature": torch.ones(3)}),
    "temperature must be one of": lambda: (ROWS, {"temperature": torch.tensor(1)}),
    "backend must be one of": lambda: (ROWS, {"backend": "cudnn"}),
    "backend='cuda' was asked for, but the tensors are on cpu": lambda: (ROWS, {"backend": "cuda"}),
    "out must be a torch.Tensor": lambda: (ROWS, {"out": [1.0]}),
    "out must be one of float32": lambda: (ROWS, {"out": ROWS.int()}),
    "out must have shape \\[2, 9\\]": lambda: (ROWS, {"out": torch.empty(2, 8)}),
    "out must have dtype=torch.float32": lambda: (
        ROWS,
        {"dtype": torch.float32, "out": ROWS.half()},
    ),
    "out is on meta": lambda: (ROWS, {"out": torch.empty(2, 9, device="meta")}),
    "out must be contiguous along its last axis": lambda: (ROWS, {"out": torch.empty(9, 2).T}),
    "out must not overlap itself": lambda: (ROWS, {"out": torch.empty(1, 9).expand(2, 9)}),
    "but out requires grad": lambda: (ROWS, {"out": learnt(torch.empty(2, 9))}),
    "but logits or temperature requires grad": lambda: (
        learnt(ROWS),
        {"out": torch.empty(2, 9)},
    ),
    "temperature requires grad; leave": lambda: (
        ROWS,
        {"temperature": learnt(torch.ones(2)), "out": torch.empty(2, 9)},
    ),
    "out overlaps logits": lambda: (SHARED[:18].view(2, 9), {"out": SHARED[4:22].view(2, 9)}),
    "out overlaps logits; pass logits itself": lambda: (
        SHARED.view(torch.bfloat16)[:18].view(2, 9),
        {"out": SHARED[:18].view(2, 9)},
    ),
    "at most two leading axes of any stride": lambda: (
        torch.randn(3, 2, 2, 9),
        {"out": torch.empty(3, 5, 2, 9)[:, :2]},
    ),
}


@pytest.mark.parametrize("message", BAD, ids=lambda message: message[:40])
@pytest.mark.parametrize("backend", ("reference", "cpp"))
def test_bad_input_is_refused_by_name(message, backend):
    logits, options = BAD[message]()
    with pytest.raises((TypeError, ValueError), match=message):
        temperature_softmax(logits, **{"backend": backend, **options})


def test_out_with_grad_is_allowed_where_nothing_is_recorded():
    logits, out = learnt(ROWS), torch.empty(2, 9)
    with torch.no_grad():
        temperature_softmax(logits, out=out)
    with torch.inference_mode():
        assert torch.equal(temperature_softmax(logits, out=torch.empty(2, 9)), out)


def test_the_kernel_guards_itself_where_python_cannot_look():
    """Under torch.compile nothing is checked in Python; the C++ kernel still refuses before it
    reads.
    """
    helpers.need("cpp")
    softmax = torch.ops.pyllmtune.temperature_softmax
    logits = torch.randn(1, 2, 9)
    with pytest.raises(RuntimeError, match="temperature must be at least 0"):
        softmax(logits, -1.0, None, False, torch.float32)
    with pytest.raises(RuntimeError, match="temperature must be at least 0"):
        softmax(logits, 1.0, torch.tensor([[1.0, math.nan]]), False, torch.float32)
    with pytest.raises(RuntimeError, match="row_temperature must be"):
        softmax(logits, 1.0, torch.ones(1, 3), False, torch.float32)
    with pytest.raises(RuntimeError, match="must have the dtype of the logits or float32"):
        softmax(logits, 1.0, None, False, torch.float16)
    with pytest.raises(RuntimeError, match="out must have the shape"):
        torch.ops.pyllmtune.temperature_softmax_out(logits, 1.0, None, False, torch.empty(1, 2, 8))
    with pytest.raises(RuntimeError, match="grad must have the"):
        torch.ops.pyllmtune.temperature_softmax_backward(
            torch.empty(1, 1, 9), logits, 1.0, None, False, torch.float32, False
        )


def test_a_temperature_of_another_dtype():
    logits = random_logits(3, 40)
    for dtype in (torch.float64, torch.bfloat16):
        temperature = torch.tensor([0.5, 1.0, 2.0], dtype=dtype)
        got = temperature_softmax(logits, temperature)
        assert torch.equal(got, temperature_softmax(logits, temperature.float()))


def test_autocast_changes_nothing():
    logits = random_logits(3, 40, dtype=torch.bfloat16)
    want = temperature_softmax(logits, 0.7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = temperature_softmax(logits, 0.7)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)


def step(logits: Tensor, temperature: float | Tensor, backend: str) -> Tensor:
    p = temperature_softmax(logits, temperature, backend=backend)
    log_p = temperature_softmax(logits * 0.5, temperature, log=True, backend=backend)
    return (p * log_p).sum()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize("kind", ("number", "0-d", "per row"))
def test_compile_has_no_graph_break_and_no_recompile(backend, kind):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.utils.deterministic.fill_uninitialized_memory = False
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for rows in (3, 3, 5, 8):
        logits = torch.randn(2, rows, 30)
        shape = {"number": None, "0-d": (), "per row": (2, rows)}[kind]
        results = []
        for run in (compiled, step):
            temperature = 0.7 if shape is None else torch.full(shape, 0.7, requires_grad=True)
            leaf = learnt(logits)
            loss = run(leaf, temperature, backend)
            loss.backward()
            results.append((loss.detach(), leaf.grad, getattr(temperature, "grad", None)))
        torch.testing.assert_close(*results)
        frames.append(counter.frame_count)
    # of a Python number dynamo compiles once more, before it settles for its value
    assert frames[0] == (2 if kind == "number" else 1) and set(frames) == {frames[0]}


@pytest.mark.slow
def test_compile_writes_into_out():
    """Inductor; into other memory and in place; the second call compiles nothing."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch._dynamo.reset()

    def into(logits: Tensor, out: Tensor) -> Tensor:
        temperature_softmax(logits + 1.0, 0.7, out=out)
        return temperature_softmax(out, 0.5, log=True, out=out)

    compiled = torch.compile(into, fullgraph=True)
    for attempt in range(2):
        logits, out, want = random_logits(3, 40), torch.empty(3, 40), torch.empty(3, 40)
        with torch.compiler.set_stance("fail_on_recompile" if attempt else "default"):
            compiled(logits, out)
        into(logits, want)
        torch.testing.assert_close(out, want)
