"""The decoding operators under opcheck; torch.compile without a break or a recompile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyllmtune import _ops, beam_step, filter_logits, greedy, sample
from tests import helpers

LOGITS = torch.randn(2, 3, 17, generator=torch.Generator().manual_seed(1))
CHECKED = {"filter_logits", "filter_logits_out", "filter_logits_backward", "sample", "beam_step"}


def filters(per_row: bool) -> tuple:
    if not per_row:
        return (0.7, None, 5, None, 0.9, None, 0.01, None, 0)
    rows = torch.rand(6)
    values = (rows + 0.5, (rows * 9).long(), rows.double(), rows / 9)
    return (1.0, values[0], 0, values[1], 1.0, values[2], 0.0, values[3], 3)


def sample_args(per_row: bool) -> tuple:
    seeds = torch.arange(6)
    draw = (0, seeds, 0, seeds) if per_row else (5, None, 7, None)
    allowed = torch.rand(6, 17) < 0.9 if per_row else None
    indices = torch.arange(6).flip(0) if per_row else None
    return (LOGITS, *filters(per_row), allowed, indices, 2, *draw, *[per_row] * 4)


def beam_args(per_row: bool) -> tuple:
    if not per_row:
        return (LOGITS, torch.zeros(2, 3), 0.7, None, None, True, None, None, 6, 3, 0.5)
    allowed, widths = torch.rand(6, 17) < 0.9, torch.tensor([3, 1])
    rows, eos = torch.rand(2, 3) + 0.5, torch.tensor([1, 2])
    return (LOGITS, torch.zeros(2, 3), 1.0, rows, allowed, False, widths, eos, 9, 1, 0.0)


@pytest.mark.parametrize("floor", helpers.KERNELS)
@pytest.mark.parametrize("per_row", (False, True))
def test_opcheck(floor, per_row):
    helpers.use(floor)
    leaf = LOGITS.clone().requires_grad_()
    torch.library.opcheck(_ops.handle("filter_logits", floor), (leaf, *filters(per_row)))
    out = torch.zeros(2, 3, 17)
    arguments = (LOGITS[:, :, :], *filters(per_row), out)
    torch.library.opcheck(_ops.handle("filter_logits_out", floor), arguments)
    temperature = filters(per_row)[:2]
    output = _ops.handle("filter_logits", floor)(LOGITS, *filters(per_row))
    backward = (torch.randn(2, 3, 17), output, *temperature)
    torch.library.opcheck(_ops.handle("filter_logits_backward", floor), backward)
    torch.library.opcheck(_ops.handle("sample", floor), sample_args(per_row))
    torch.library.opcheck(_ops.handle("beam_step", floor), beam_args(per_row))


def step(logits: Tensor, seeds: Tensor, backend: str) -> tuple[Tensor, ...]:
    out = sample(
        logits,
        temperature=0.8,
        top_k=7,
        top_p=0.9,
        seed=seeds,
        logprobs="processed",
        return_stats=True,
        backend=backend,
    )
    kept = filter_logits(logits, top_p=0.9, backend=backend)
    beams = torch.stack([logits, logits.flip(-1)], 1)
    scores = torch.stack([seeds, seeds + 1], 1) * 0.1
    best = beam_step(beams, scores, num_beams=2, eos_token_id=3, backend=backend)
    return *best, out.tokens, out.logprobs, out.rank, greedy(logits, backend=backend).tokens, kept


@pytest.mark.slow
@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_compile_has_no_graph_break_and_no_recompile(backend):
    """A decoding step as one graph; a second call and other batch sizes compile nothing new, and
    give the same tokens.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.utils.deterministic.fill_uninitialized_memory = False
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    first = 0
    for rows in (3, 3, 5, 8):
        arguments = (torch.randn(rows, 40), torch.arange(rows), backend)
        for got, want in zip(compiled(*arguments), step(*arguments), strict=True):
            assert torch.equal(got, want)
        # tracing starts again once where it meets a scalar argument, before the first call returns
        first = first or counter.frame_count
    assert counter.frame_count == first <= 2


def test_kept_tokens_under_compile():
    """The number of kept tokens is a size that tracing does not know."""
    helpers.need("cpp")
    torch._dynamo.reset()

    def kept(logits: Tensor, seeds: Tensor) -> Tensor:
        return sample(logits, top_k=4, seed=seeds, return_kept=True).kept.token_ids

    compiled = torch.compile(kept, fullgraph=True, backend="aot_eager")
    z, seeds = torch.randn(3, 40), torch.arange(3)
    assert torch.equal(compiled(z, seeds), kept(z, seeds))
