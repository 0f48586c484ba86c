"""What ``tests/test_linear_shards.py`` runs on every rank: a vocabulary in shards and whole."""

from __future__ import annotations

import math
from itertools import pairwise
from unittest import mock

import torch
from torch import Tensor, distributed
from torch.utils.checkpoint import checkpoint

from pyllmtune import PolicyLossMetrics, linear_token_logprobs, policy_loss
from tests.ranks import Case
from tests.test_linear_token_logprobs import head, leaf

N, D, V = 33, 20, 5003
# of the largest value. bfloat16: results as in float32, their operands are the same; a logit's
# gradient is rounded to bfloat16, where 1e-7 can decide between neighbours, and so is the sum: 2^-8
TOLERANCE = {torch.float32: (1e-6, 1e-6), torch.bfloat16: (1e-6, 2**-8)}
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def cuts(world: int, vocab: int = V) -> list[tuple[int, int]]:
    """Unequal shards of more than one tile and less; of four, one is empty and one a single row."""
    ends = {2: [0, 2100, vocab], 4: [0, 1, 1, 2900, vocab]}[world]
    return list(pairwise(ends))


def close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, what
    special = ~want.isfinite()
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: NaN elsewhere"
    assert torch.equal(got[special].nan_to_num(7), want[special].nan_to_num(7)), what
    error, size = ((got - want)[~special].abs(), want[~special].abs())
    worst = float(error.max()) if error.numel() else 0.0
    assert error.numel() == 0 or worst <= tolerance * float(size.max()), f"{what}: {worst:.3e}"


def options(bias: Tensor) -> dict[str, dict]:
    mask, temperature = torch.rand(N) > 0.3, torch.rand(N) + 0.5
    return {
        "plain": {},
        "mask": {"mask": mask},
        "row temperature": {"temperature": temperature},
        "bias": {"bias": bias},
        "softcap": {"softcap": 4.0, "logit_scale": -0.7},
        "all": {
            "mask": mask,
            "temperature": temperature,
            "bias": bias,
            "softcap": 5.0,
            "logit_scale": 0.9,
        },
    }


def results(operands: tuple, upstream: Tensor, **rest) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and gradients of hidden, weight and bias. Infinite results get no weight."""
    hidden, weight, tokens = operands
    leaves = [leaf(hidden), leaf(weight)]
    if rest.get("bias") is not None:
        leaves.append(leaf(rest["bias"]))
        rest["bias"] = leaves[-1]
    out = linear_token_logprobs(leaves[0], leaves[1], tokens, **rest)
    grads = [torch.where(value.isinf(), 0, grad) for value, grad in zip(out, upstream, strict=True)]
    return [value.detach() for value in out], list(torch.autograd.grad(out, leaves, grads))


def shard(operands: tuple, upstream: Tensor, begin: int, end: int, **rest):
    """``results`` over the rows begin:end of the head, in the default group."""
    hidden, weight, tokens = operands
    if rest.get("bias") is not None:
        rest["bias"] = rest["bias"][begin:end]
    group = {"process_group": distributed.group.WORLD, "vocab_start": begin}
    return results((hidden, weight[begin:end], tokens), upstream, **group, **rest)


def compare(operands: tuple, bounds: tuple[int, int], upstream: Tensor, **rest) -> None:
    got, grads = shard(operands, upstream, *bounds, **rest)
    want, truth = results(operands, upstream, **rest)
    forward, backward = TOLERANCE[operands[0].dtype]
    for value, expected, name in zip(got, want, ("logprobs", "entropy", "logsumexp"), strict=True):
        close(value, expected, forward, name)
    close(grads[0], truth[0], backward, "gradient of hidden")
    for grad, expected, name in zip(grads[1:], truth[1:], ("weight", "bias"), strict=False):
        # of the largest of the whole gradient: a shard without a target has small ones alone
        scale = backward * float(expected.abs().nan_to_num(0).max())
        part = expected[slice(*bounds)]
        assert grad.dtype == part.dtype and grad.shape == part.shape
        assert torch.equal(grad.isnan(), part.isnan()), name
        assert part.numel() == 0 or (grad - part).abs().nan_to_num(0).max() <= scale, name


def equals_one_process(backend: str, dtype: torch.dtype) -> Case:
    def run(rank: int, world: int) -> None:
        operands, upstream = head((N,), D, V, dtype), torch.randn(3, N)
        upstream *= torch.rand(N) > 0.3  # some rows have no gradient
        for name, chosen in options(torch.randn(V)).items():
            try:
                compare(operands, cuts(world)[rank], upstream, backend=backend, **chosen)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error

    return run


for backend in ("cpp", "reference"):
    for dtype in TOLERANCE:
        CASES[f"equals_one_process {backend} {dtype}"] = equals_one_process(backend, dtype)


@case
def each_output_alone_has_its_gradient(rank, world):
    operands = head((N,), D, V)
    for upstream in torch.eye(3)[..., None].expand(3, 3, N):
        compare(operands, cuts(world)[rank], upstream)


@case
def leading_shapes_and_no_rows(rank, world):
    for rows in ((), (0,), (2, 3), (0, 3)):
        compare(head(rows, D, V), cuts(world)[rank], torch.randn(3, *rows))


@case
def shards_lie_where_vocab_start_says(rank, world):
    """The last rank holds the first tokens."""
    compare(head((N,), D, V), cuts(world)[world - 1 - rank], torch.randn(3, N))


@case
def forbidden_tokens_and_invalid_rows(rank, world):
    """A shard, or all, forbidden by the bias; a forbidden target; a row of NaN, and of inf."""
    operands, upstream = head((N,), D, V), torch.randn(3, N)
    bias = torch.randn(V)
    bias[slice(*cuts(world)[-1])] = -math.inf
    operands[2][:3] = torch.tensor([V - 1, V - 2, 0])
    compare(operands, cuts(world)[rank], upstream, bias=bias)
    compare(operands, cuts(world)[rank], upstream, bias=torch.full((V,), -math.inf))
    operands[0][2], operands[0][4, 1] = math.nan, math.inf
    upstream[:, [2, 4]] = 0  # or all of the weight's gradient is NaN
    got, grads = shard(operands, upstream, *cuts(world)[rank])
    want, truth = results(operands, upstream)
    for value, expected in zip(got, want, strict=True):
        close(value, expected, 1e-6, "results")
        assert value[2].isnan() and value[4].isnan()
    close(grads[0], truth[0], 1e-6, "gradient of hidden")
    compare(operands, cuts(world)[rank], torch.ones(3, N))


@case
def masked_rows_are_exactly_zero(rank, world):
    hidden, weight, tokens = head((N,), D, V)
    hidden[1], tokens[1] = math.nan, -100
    for mask in (torch.arange(N) % 2 == 0, torch.zeros(N, dtype=torch.bool)):
        got, grads = shard(
            (hidden, weight, tokens), torch.ones(3, N), *cuts(world)[rank], mask=mask
        )
        for value in (*got, grads[0]):
            assert not value[~mask].any() and value.isfinite().all()
        assert grads[1].isfinite().all() and grads[1].any() == (mask.any() and grads[1].numel() > 0)


@case
def the_same_bits_on_every_rank_every_time_and_in_any_batch(rank, world):
    operands, upstream = head((200,), D, V, torch.bfloat16), torch.randn(3, 200)
    temperature = torch.rand(200) + 0.5
    bounds = cuts(world)[rank]
    got, grads = shard(operands, upstream, *bounds, temperature=temperature)
    again, grads_again = shard(operands, upstream, *bounds, temperature=temperature)
    mine = torch.stack([*got, grads[0].float().sum(1)])
    every = [torch.empty_like(mine) for _ in range(world)]
    distributed.all_gather(every, mine)
    rows = torch.randperm(200)[:13]
    part = (operands[0][rows], operands[1], operands[2][rows])
    few, few_grads = shard(part, upstream[:, rows], *bounds, temperature=temperature[rows])
    assert all(torch.equal(other, mine) for other in every)
    assert all(
        torch.equal(a, b) for a, b in zip((*got, *grads), (*again, *grads_again), strict=True)
    )
    assert all(torch.equal(a[rows], b) for a, b in zip(got, few, strict=True))
    # gloo's order of addition depends on a number's place in the tensor; two numbers have one order
    assert world > 2 or torch.equal(grads[0][rows], few_grads[0])


@case
def one_all_gather_of_four_floats_and_one_all_reduce(rank, world):
    operands = head((N,), D, V, torch.bfloat16)
    calls = []

    def counted(name: str):
        function = getattr(distributed, name)

        def call(*args, **kwargs):
            tensor = args[1] if name == "all_gather" else args[0]
            calls.append((name, tuple(tensor.shape), tensor.dtype))
            return function(*args, **kwargs)

        return mock.patch.object(distributed, name, call)

    with counted("all_gather"), counted("all_reduce"):
        shard(operands, torch.ones(3, N), *cuts(world)[rank])
    wanted = [("all_gather", (4, N + 1), torch.float32), ("all_reduce", (N, D), torch.float32)]
    assert calls == wanted, calls


@case
def frozen_operands_and_checkpointing(rank, world):
    hidden, weight, tokens = head((N,), D, V)
    begin, end = cuts(world)[rank]
    _, want = shard((hidden, weight, tokens), torch.eye(3)[0, :, None].expand(3, N), begin, end)
    group = {"process_group": distributed.group.WORLD, "vocab_start": begin}

    def score(x: Tensor, w: Tensor) -> Tensor:
        return linear_token_logprobs(x, w, tokens, **group).logprobs.sum()

    part = weight[begin:end]
    moving = leaf(hidden), leaf(part)
    (by_hidden,) = torch.autograd.grad(score(moving[0], part), moving[0])
    (by_weight,) = torch.autograd.grad(score(hidden, moving[1]), moving[1])
    again = torch.autograd.grad(checkpoint(score, *moving, use_reentrant=False), moving)
    for got in ((by_hidden, by_weight), again):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@case
def a_token_outside_every_shard_is_refused_by_all_ranks(rank, world):
    hidden, weight, _ = head((3,), D, V)
    begin, end = cuts(world)[rank]
    part, group = weight[begin:end], distributed.group.WORLD

    def refusal(token: int, start: int, **rest) -> str:
        ids = torch.tensor([7, token, 9])
        try:
            linear_token_logprobs(hidden, part, ids, process_group=group, vocab_start=start, **rest)
        except ValueError as error:
            return str(error)
        return ""

    said = [refusal(token, begin) for token in (-1, V, 2**40)]
    overlapping = refusal(0, 0)  # every rank with a token claims the first
    masked = refusal(-100, begin, mask=torch.tensor([True, False, True]))
    assert all(f"got {token}" in text for token, text in zip((-1, V, 2**40), said, strict=True))
    assert f"[{begin}, {end})" in said[0] and "in none or in several" in overlapping
    assert masked == ""


@case
def other_tokens_on_some_rank_are_refused_by_all_ranks(rank, world):
    """As when a data-parallel trainer hands over FSDP2's shards: same shapes, other data."""
    hidden, weight, tokens = head((6,), D, V)
    begin, end = cuts(world)[rank]
    group = {"process_group": distributed.group.WORLD, "vocab_start": begin}
    said = []
    for other in (tokens.roll(1), tokens.where(torch.arange(6) > 0, (tokens + 1) % V)):
        ids = other if rank == 1 else tokens
        try:
            linear_token_logprobs(hidden, weight[begin:end], ids, **group)
        except ValueError as error:
            said.append(str(error))
    assert len(said) == 2 and all("must be the same on every rank" in text for text in said)


@case
def policy_metrics_are_reduced_by_one_sum_and_one_max(rank, world):
    logprobs, old, ref = (-torch.rand(4 * world, 6) for _ in range(3))
    advantages, mask = torch.randn(4 * world), torch.rand(4 * world, 6) > 0.2
    tensors = (logprobs, old, advantages, mask)
    want = policy_loss(*tensors, ref_logprobs=ref).metrics
    mine = slice(4 * rank, 4 * rank + 4)
    part: PolicyLossMetrics = policy_loss(
        *(value[mine] for value in tensors), ref_logprobs=ref[mine]
    ).metrics
    with mock.patch.object(
        distributed, "all_reduce", side_effect=distributed.all_reduce
    ) as reductions:
        got = part.all_reduce()
    kinds = [call.args[1] for call in reductions.call_args_list]
    assert kinds == [distributed.ReduceOp.SUM, distributed.ReduceOp.MAX]
    torch.testing.assert_close(got.vector, want.vector)
    assert set(got.to_dict()) == set(want.to_dict()) and got.to_dict()["tokens"] == mask.sum()


def compiles_without_a_graph_break(rank, world):
    group, begin = distributed.group.WORLD, 30 * rank

    def step(hidden: Tensor, weight: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        out = linear_token_logprobs(
            torch.tanh(hidden),
            weight,
            tokens,
            mask=mask,
            softcap=9.0,
            process_group=group,
            vocab_start=begin,
        )
        return (out.logprobs - 0.1 * out.entropy).sum()

    pairs = []
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        hidden, weight, tokens = head((rows,), 6, 30 * world)
        mask = torch.arange(rows) > 0
        for function in (compiled, step):
            leaves = leaf(hidden), leaf(weight[begin : begin + 30])
            loss = function(*leaves, tokens, mask)
            pairs.append((loss, *torch.autograd.grad(loss, leaves)))
    for got, want in zip(pairs[::2], pairs[1::2], strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


SLOW_CASES = {f.__name__: f for f in (compiles_without_a_graph_break,)}
