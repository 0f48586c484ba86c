"""The operators of kl_divergence under torch's checks: opcheck, gradcheck, compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyllmtune import _ops, kl_divergence
from tests import helpers
from tests.test_kl_divergence import KINDS, kinds

CHECKED = {"kl_divergence", "kl_divergence_backward"}
LOGITS, REF_LOGITS = torch.randn(2, 2, 3, 17, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[True, False, True], [True, True, True]])


@pytest.mark.parametrize("floor", helpers.KERNELS)
@pytest.mark.parametrize("js_weight", (0.0, 0.3))
def test_opcheck(floor, js_weight):
    helpers.use(floor)
    rows = torch.rand(2, 3) + 0.5
    leaf, ref_leaf = LOGITS.clone().requires_grad_(), REF_LOGITS.clone().requires_grad_()
    for args in (
        (leaf, ref_leaf, 0.7, None, None, js_weight),
        (leaf, REF_LOGITS, 1.0, rows, MASK, js_weight),
        (LOGITS.bfloat16()[:, :-1], ref_leaf.bfloat16()[:, 1:], 1.0, None, None, js_weight),
    ):
        torch.library.opcheck(_ops.handle("kl_divergence", floor), args)
    head = (LOGITS, REF_LOGITS, 1.0, rows, MASK, js_weight)
    _, stats = _ops.handle("kl_divergence", floor)(*head)
    for wanted in ((True, True), (True, False), (False, True)):
        backward = (*head, stats, torch.rand(2, 3), *wanted)
        torch.library.opcheck(_ops.handle("kl_divergence_backward", floor), backward)


@pytest.mark.parametrize("backend", ("reference", "cpp"))
@kinds
@pytest.mark.parametrize("distance", (1.0, 0.05))
def test_gradcheck(backend, kind, distance):
    """Float64 finite differences in both arguments; far rows and close ones, whose formulas
    differ.
    """
    helpers.use(backend)
    few = LOGITS[..., :6].double()
    first = few.clone().requires_grad_()
    second = (few + distance * REF_LOGITS[..., :6]).requires_grad_()
    temperature = torch.rand(2, 3, dtype=torch.float64) + 0.5

    def divergence(x: Tensor, y: Tensor) -> Tensor:
        return kl_divergence(
            x, y, temperature=temperature, mask=MASK, backend=backend, **KINDS[kind]
        )

    assert torch.autograd.gradcheck(divergence, (first, second))


def test_double_backward_is_refused_clearly():
    helpers.need("cpp")
    leaf = LOGITS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(kl_divergence(leaf, REF_LOGITS).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_compile_has_no_graph_break_and_no_recompile(backend):
    """Forward and backward as one graph; another batch size compiles nothing new."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
        options = {"temperature": 0.9, "backend": backend}
        kl = kl_divergence(logits, ref_logits, mask=mask, **options)
        return (kl + kl_divergence(logits, ref_logits, js_weight=0.5, **options)).sum()

    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    for rows in (3, 3, 5, 8):
        first, second = (torch.randn(2, rows, 30) for _ in range(2))
        leaves = [first.clone().requires_grad_() for _ in range(2)]
        mask = torch.rand(2, rows) > 0.2
        got, want = compiled(leaves[0], second, mask), step(leaves[1], second, mask)
        torch.testing.assert_close(got, want)
        got.backward(), want.backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    assert counter.frame_count == 1
