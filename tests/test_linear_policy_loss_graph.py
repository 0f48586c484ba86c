"""linear_policy_loss in graphs: opcheck, gradcheck, compile, retained and checkpointed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyllmtune import PolicyLossConfig, _ops, linear_policy_loss
from pyllmtune.ops import linear_policy_blocks as blocks
from tests import helpers
from tests.linear_policy_cases import batch, leaves_of, run, small_chunks, workspace

CPU = torch.device("cpu")


@pytest.fixture
def chunks(monkeypatch):
    return small_chunks(monkeypatch)


def test_retain_graph_and_checkpointing_give_the_same_gradients():
    data = batch()
    leaves = [data[name].clone().requires_grad_() for name in ("hidden", "weight")]
    rest = {name: value for name, value in data.items() if name not in ("hidden", "weight")}

    def loss(hidden: Tensor) -> Tensor:
        return linear_policy_loss(hidden, leaves[1], **rest).loss

    once = loss(leaves[0])
    first = torch.autograd.grad(once, leaves, retain_graph=True)
    want = [grad.clone() for grad in first]
    for grad in first:
        grad.mul_(100.0)  # whoever got it may do so
    again = torch.autograd.grad(3.0 * once, leaves, retain_graph=True)
    last = torch.autograd.grad(once, leaves)
    kept = torch.autograd.grad(checkpoint(loss, leaves[0], use_reentrant=False), leaves)
    for a, b, c, right in zip(again, last, kept, want, strict=True):
        torch.testing.assert_close(a, 3.0 * right, rtol=1e-6, atol=0)
        assert torch.equal(b, right) and torch.equal(c, right)
    for _ in range(2):
        loss(leaves[0]).backward()  # micro-batches add up
    torch.testing.assert_close(leaves[1].grad, 2.0 * want[1])


def test_autocast_casts_as_a_linear_layer_would():
    data = batch(D=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(data, "auto")
    rounded = {**data, **{name: data[name].bfloat16() for name in ("hidden", "weight")}}
    want = run(rounded, "auto")
    assert torch.equal(got[0], want[0])
    for grad, right in zip(got[2], want[2], strict=True):
        assert grad.dtype == torch.float32 and torch.equal(grad, right.float())


def operator_args(dtype: torch.dtype, rows: int, **changes) -> tuple:
    """Of the operator: 5 rows in chunks of ``rows``."""
    wide = helpers.accumulator(dtype)
    leaf = {name: torch.randn(n, 3, dtype=wide).to(dtype) for name, n in (("x", 5), ("w", 17))}
    x, w = (value.requires_grad_() for value in leaf.values())
    bias = torch.randn(17, dtype=wide).requires_grad_()
    config = PolicyLossConfig(**{"entropy_coef": 0.1, **changes})
    old, advantages = -3 * torch.rand(5, dtype=wide), torch.randn(2, dtype=wide)
    space = rows * blocks.row_bytes(17, CPU, dtype)
    return (
        *(x, w, torch.randint(0, 17, (5,)), bias, 1.0, None, 1.0, 0.0, None, space),
        *(old, advantages, False, torch.tensor([0, 2, 5]), None, None, 0.0, None),
        *(config.choices, config.constants, True, True, True),
    )


@pytest.mark.parametrize("floor", helpers.KERNELS)
@pytest.mark.parametrize("rows", (5, 4), ids=("whole", "chunks"))
def test_opcheck(floor, rows, chunks):
    run = _ops.handle("linear_policy_loss", helpers.use(floor))
    torch.library.opcheck(run, operator_args(torch.float32, rows))
    times = _ops.handle("linear_policy_loss_backward", floor)
    torch.library.opcheck(times, (torch.rand(3, 4).bfloat16(), torch.tensor(0.3), torch.bfloat16))


def test_the_operator_refuses_a_workspace_that_is_too_small():
    args = operator_args(torch.float32, 4, level="sequence")
    with pytest.raises(ValueError, match=r"workspace_bytes=\d+ does not hold the rows"):
        _ops.handle("linear_policy_loss", helpers.use("cpp"))(*args)


@pytest.mark.parametrize("backend", ("reference", "cpp"))
@pytest.mark.parametrize("rows", (None, 4), ids=("whole", "chunks"))
@pytest.mark.parametrize("level", ("token", "sequence"))
def test_gradcheck(backend, rows, level, chunks):
    """Float64 finite differences; no bound is active, for those jump."""
    data = batch(2, 4, 3, 11, torch.float64) | {"bias": torch.randn(11, dtype=torch.float64)}
    data |= {name: value.double() for name, value in data.items() if value.is_floating_point()}
    config = PolicyLossConfig(level=level, rule="unclipped", entropy_coef=0.3, kl="k3", kl_coef=0.2)
    rest = {name: value for name, value in data.items() if name not in leaves_of(data)}
    space = None if rows is None else workspace(data, rows)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        options = {"config": config, "softcap": 3.0, "workspace_bytes": space}
        options["backend"] = helpers.use(backend)
        return linear_policy_loss(hidden, weight, bias=bias, **rest, **options).loss

    leaves = [data[name].requires_grad_() for name in leaves_of(data)]
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.slow
@pytest.mark.parametrize("rows", (None, 4), ids=("whole", "two functions"))
def test_compile_has_no_graph_break_and_no_recompile(rows):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.utils.deterministic.fill_uninitialized_memory = False
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    options = {"config": PolicyLossConfig(level="sequence", entropy_coef=0.1)}
    options |= {"workspace_bytes": 512 * 3 * 4096 * 6} if rows else {}

    def step(hidden, weight, data):
        return linear_policy_loss(hidden, weight, **data, **options).loss

    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for _ in range(3):
        data = batch()
        leaves = [
            [data[name].clone().requires_grad_() for name in ("hidden", "weight")] for _ in range(2)
        ]
        rest = {name: value for name, value in data.items() if name not in ("hidden", "weight")}
        got, want = compiled(*leaves[0], rest), step(*leaves[1], rest)
        torch.testing.assert_close(got, want)
        got.backward(), want.backward()
        for a, b in zip(*leaves, strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]
