"""linear_token_logprobs: bits, errors beside eager, memory, registration; and its matmul."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyllmtune import _ops, linear_token_logprobs
from pyllmtune.ops import linear_tiles
from tests import helpers
from tests.test_linear_token_logprobs import head, leaf, run

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("layout", ("a b", "a.T b", "a b.T", "strided"))
@pytest.mark.parametrize("dtype", DTYPES, ids=helpers.dtype_id)
@pytest.mark.parametrize(
    ("rows", "inner", "columns"), ((1, 1, 1), (13, 7, 33), (97, 1030, 41), (400, 33, 530)), ids=str
)
def test_matmul(rows, inner, columns, dtype, layout):
    """The CPU's own product, into new memory and added to old, beyond one block in each axis."""
    helpers.need("cpp")
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
    if layout == "a.T b":
        a = a.T.contiguous().T
    if layout == "a b.T":
        b = b.T.contiguous().T
    if layout == "strided":
        a, b = a.repeat_interleave(2, 1)[:, ::2], b.repeat_interleave(2, 1)[:, ::2]
    want = a.double() @ b.double()
    space = torch.ones(rows, columns + 5, dtype=helpers.accumulator(dtype))
    for add in (False, True):
        torch.ops.pyllmtune.matmul(a, b, add, space[:, :columns])
        bound = 1e-12 if dtype == torch.float64 else 4e-7 * inner**0.5
        helpers.assert_close(space[:, :columns], want * (1 + add), bound, "product")
    assert torch.equal(space[:, columns:], torch.ones_like(space[:, columns:]))


@pytest.mark.slow
def test_matmul_without_tile_registers():
    """On a CPU with AMX the path of those without it; on others the test above ran that."""
    helpers.need("cpp")
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "amx_bf16" not in cpuinfo.read_text():
        return
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            f"{__file__}::test_matmul",
        ],
        env=os.environ | {"PYLLMTUNE_AMX": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_matmul_refuses_what_does_not_fit():
    helpers.need("cpp")
    a, b = torch.zeros(2, 3), torch.zeros(3, 4)
    for arguments in (
        (a, b, False, torch.zeros(2, 3)),
        (a, b.bfloat16(), False, torch.zeros(2, 4)),
        (a, b, False, torch.zeros(2, 4).double()),
        (a, b, False, torch.zeros(4, 2).T),
    ):
        with pytest.raises(RuntimeError, match="must"):
            torch.ops.pyllmtune.matmul(*arguments)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=helpers.dtype_id)
def test_bits_do_not_depend_on_workspace_or_threads(dtype):
    """1,100 rows are three chunks in the least workspace and one in the default."""
    case = (*head((1100,), 40, 2500, dtype), torch.randn(3, 1100))
    least = 512 * linear_tiles.row_bytes(torch.device("cpu"), dtype)
    want = run("cpp", *case)
    threads = torch.get_num_threads()
    try:
        for count, workspace in ((1, None), (2, least), (3, 2 * least), (1, 1 << 30)):
            torch.set_num_threads(count)
            got = run("cpp", *case, workspace_bytes=workspace)
            for values, expected in zip(got, want, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=helpers.dtype_id)
@pytest.mark.parametrize("kind", ("all rows", "masked", "idle", "masked and idle", "no product"))
def test_logits_kept_for_backward_have_the_bits_of_logits_made_again(monkeypatch, kind, dtype):
    """No column kept, the first of three tiles, all of them; and with that fewer matmuls."""
    rows, vocab = 40, 4500
    hidden, weight, tokens = head((rows,), 24, vocab, dtype)
    upstream = torch.randn(3, rows)
    options = {"mask": torch.rand(rows) > 0.4} if "masked" in kind else {}
    if kind == "no product":  # but what bias, scale and cap make of it
        options = {"bias": torch.randn(vocab), "logit_scale": 0.7, "softcap": 3.0}
    if "idle" in kind:
        upstream[:, torch.rand(rows) > 0.5] = 0.0
    made = []
    product = linear_tiles.Head.logits

    def counted(self, x, first, last, space):
        made.append(first)
        return product(self, x, first, last, space)

    monkeypatch.setattr(linear_tiles.Head, "logits", counted)
    found = {}
    for kept, columns in ((0, 0), (1, 2048), (3, 4512)):
        made.clear()
        monkeypatch.setattr(linear_tiles, "kept_columns", lambda *_, width=columns: width)
        found[kept] = run("cpp", hidden, weight, tokens, upstream, **options)
        assert made == [0, 2048, 4096, *(0, 2048, 4096)[kept:]]
    for kept in (1, 3):
        for values, expected in zip(found[kept], found[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))


def test_how_much_of_the_logits_a_workspace_has_room_for():
    like, mib = torch.empty(0, dtype=torch.bfloat16), 1 << 20
    sizes = (6, 32, 302, 303)  # a tile of 512 rows takes 6 MiB, all their logits 296.75 MiB
    room = [linear_tiles.kept_columns(512, 151_936, size * mib, like) for size in sizes]
    assert room == [0, 6 * 2048, 151_552, 151_936]
    assert linear_tiles.kept_columns(8192, 151_936, 32 * mib, like) == 0
    assert linear_tiles.kept_columns(0, 5, 32 * mib, like) == 0
    assert linear_tiles.kept_columns(3, 5, 32 * mib, like) == 16  # rows begin aligned


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=helpers.dtype_id)
def test_bits_of_a_row_do_not_depend_on_the_batch(dtype):
    hidden, weight, tokens = head((60,), 300, 2500, dtype)
    upstream, temperature = torch.randn(3, 60), torch.rand(60) + 0.5
    want, (by_hidden, _) = run("cpp", hidden, weight, tokens, upstream, temperature=temperature)
    order = torch.randperm(60)
    for rows in (order, order[:1], order[7:20]):
        part = (hidden[rows], weight, tokens[rows], upstream[:, rows])
        got, (grad, _) = run("cpp", *part, temperature=temperature[rows])
        assert torch.equal(grad, by_hidden[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(got, want, strict=True))
    mask = torch.rand(60) > 0.5
    case = (hidden, weight, tokens, upstream)
    got, (grad, _) = run("cpp", *case, temperature=temperature, mask=mask)
    assert torch.equal(grad[mask], by_hidden[mask])
    assert all(torch.equal(a[mask], b[mask]) for a, b in zip(got, want, strict=True))


def eager(hidden: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = (hidden @ weight.T).float().log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, tokens[:, None])[:, 0], entropy


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=helpers.dtype_id)
@pytest.mark.parametrize("backend", ("reference", "cpp"))
def test_errors_are_those_of_float32_and_gradients_no_worse_than_eager(backend, dtype):
    """Log-prob below 1e-5 in float32, 2e-5 with bfloat16 operands; each gradient's error, as a
    norm, at most 1.05 times eager's in the same dtype.
    """
    hidden, weight, tokens = head((96,), 256, 5000, dtype)
    upstream = torch.randn(96)

    def gradients(score, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = leaf(hidden, dtype), leaf(weight, dtype)
        logprobs, entropy = score(*leaves, tokens)[:2]
        loss = (upstream * logprobs - 0.1 * entropy).sum()
        return logprobs, *torch.autograd.grad(loss, leaves)

    def ours(*arguments: Tensor):
        return linear_token_logprobs(*arguments, backend=helpers.use(backend))

    truth = gradients(eager64, torch.float64)
    got, theirs = gradients(ours, dtype), gradients(eager, dtype)
    limit = 1e-5 if dtype == torch.float32 else 2e-5
    assert (got[0] - truth[0]).abs().max() < limit
    for mine, other, exact in zip(got[1:], theirs[1:], truth[1:], strict=True):
        assert (mine - exact).norm() <= 1.05 * (other - exact).norm()


def eager64(hidden: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    return linear_token_logprobs(hidden, weight, tokens, backend="reference")[:2]


MEMORY = """
import resource, torch
from pyllmtune import linear_token_logprobs
torch.set_num_threads(2)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
rows, width, vocab = 2048, 8, 65536
def step(rows):
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    linear_token_logprobs(hidden, weight, torch.zeros(rows).long()).logprobs.sum().backward()
step(1)
before = peak()
step(rows)
print((peak() - before) / (2 * rows * vocab * 4))
"""


def test_peak_memory_is_under_5_percent_of_eager():
    """High-water of a process, over the logits and their gradient, which eager holds at least."""
    helpers.need("cpp")
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.05


def operator_args(optional: bool) -> tuple:
    hidden, weight, tokens = head((4,), 5, 32)  # no columns for alignment, which hold anything
    numbers = (0.7, torch.rand(4) + 0.5, 0.5, 4.0) if optional else (0.7, None, 1.0, 0.0)
    bias = torch.randn(32).requires_grad_() if optional else None
    mask = torch.tensor([True, False, True, True]) if optional else None
    return (leaf(hidden), leaf(weight), tokens, bias, *numbers, mask, 1 << 25)


@pytest.mark.parametrize(
    ("floor", "optional"), (("cpp", False), ("cpp", True), ("triton", True), ("emulated", True))
)
def test_opcheck(floor, optional):
    helpers.use(floor)
    args = operator_args(optional)
    check = torch.library.opcheck
    check(_ops.handle("linear_token_logprobs", floor), (*args, False))
    plain = [x.detach() if isinstance(x, Tensor) else x for x in args]
    mask_at = 8  # rows of logits that it leaves out are never written: not to be compared
    check(_ops.handle("linear_token_logprobs", floor), (*args[:mask_at], None, args[-1], True))
    _, entropy, _, stats, logits = _ops.handle("linear_token_logprobs", floor)(*plain, True)
    assert logits.shape[1] == 32
    upstream = [torch.randn(4) for _ in range(3)]
    check(_ops.handle("linear_token_logprobs_stats", floor), plain)
    for wanted in ((True, True, optional), (True, False, False, True), (False, True, False)):
        backward = (*plain, entropy, stats, *upstream, *wanted)
        check(_ops.handle("linear_token_logprobs_backward", floor), backward)
    check(
        _ops.handle("linear_token_logprobs_backward", floor),
        (*plain, entropy, stats, *upstream, True, True, False),
        {"logits": logits},
    )
    bias = torch.randn(32) if optional else None
    tile = (torch.randn(4, 32), 0, 0.5, 4.0, bias, plain[2], 0.7, None)
    running = torch.zeros(4, 4)
    check(_ops.handle("linear_token_logprobs_tile", floor), (*tile, running, torch.zeros(3, 4)))
    grad = torch.zeros(4, 32)
    check(
        _ops.handle("linear_token_logprobs_tile_backward", floor),
        (*tile, torch.ones(3, 4), torch.ones(3, 4), grad),
    )


def test_opcheck_matmul():
    helpers.need("cpp")
    args = (torch.randn(3, 4), torch.randn(4, 5), True, torch.zeros(3, 5))
    torch.library.opcheck(torch.ops.pyllmtune.matmul.default, args)


@pytest.mark.parametrize("backend", ("reference", "cpp"))
def test_gradcheck(backend):
    """Float64 finite differences of all three results in hidden, weight and bias."""
    hidden, weight, tokens = head((3,), 4, 7, torch.float64)
    leaves = [leaf(hidden), leaf(weight), torch.randn(7, dtype=torch.float64, requires_grad=True)]
    mask = torch.tensor([True, True, False])

    def scores(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        options = {"logit_scale": 0.7, "softcap": 3.0, "temperature": 0.9, "mask": mask}
        return linear_token_logprobs(x, w, tokens, bias=b, backend=helpers.use(backend), **options)

    assert torch.autograd.gradcheck(scores, leaves)


def test_double_backward_is_refused_clearly():
    helpers.need("cpp")
    hidden, weight, tokens = head((3,), 4, 7)
    hidden = leaf(hidden)
    loss = linear_token_logprobs(hidden, weight, tokens).logprobs.sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_compile_has_no_graph_break_and_no_recompile(backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    def step(hidden: Tensor, weight: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        out = linear_token_logprobs(
            torch.tanh(hidden), weight, tokens, mask=mask, softcap=9.0, backend=backend
        )
        return (out.logprobs - 0.1 * out.entropy).sum()

    torch.utils.deterministic.fill_uninitialized_memory = False
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    first = 0
    for rows in (3, 3, 5, 8):
        hidden, weight, tokens = head((rows,), 6, 30)
        twins = [(leaf(hidden), leaf(weight)) for _ in range(2)]
        mask = torch.rand(rows) > 0.2
        grads = []
        for function, leaves in zip((compiled, step), twins, strict=True):
            loss = function(*leaves, tokens, mask)
            grads.append((loss, *torch.autograd.grad(loss, leaves)))
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want)
        # tracing starts again once where it meets a scalar argument, before the first call returns
        first = first or counter.frame_count
    assert counter.frame_count == first
