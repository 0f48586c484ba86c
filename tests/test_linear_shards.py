"""A vocabulary in shards: joined in one process on every floor, and over gloo's ranks."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import distributed

from pyllmtune import _ops, linear_token_logprobs
from pyllmtune.nn import LogprobHead
from pyllmtune.ops.linear_shards import merge
from pyllmtune.reference import linear_token_logprobs as reference
from tests import helpers, ranks
from tests.test_linear_token_logprobs import head, leaf, run

INF = math.inf


MODULES = ("tests.shard_cases", "tests.training_cases")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The reports of the ranks, started once for each number of them."""
    found = {}

    def report(world: int) -> dict[str, str]:
        if world not in found:
            folder = tmp_path_factory.mktemp(f"ranks{world}")
            found[world] = ranks.run(MODULES, world, folder)
        return found[world]

    return report


@pytest.mark.parametrize(
    ("world", "name"), [(world, name) for world in (2, 4) for name in ranks.cases(MODULES, world)]
)
def test_ranks(reports, name, world):
    helpers.need("cpp")
    report = reports(world)
    assert name in report, f"not every rank came to an end of it:\n{report['log']}"
    assert report[name] == "", report[name]


def test_ranks_that_fail_hang_or_die_are_found_out(tmp_path):
    report = ranks.run(("tests.planted_ranks",), 2, tmp_path)
    said = {name: [f"rank {i}:" in report[name] for i in (0, 1)] for name in report}
    assert said == {
        "log": [True, True],
        "right": [False, False],
        "wrong_on_one": [False, True],
        "waited_for_in_vain": [True, False],
        "after_it": [False, True],  # rank 0 is gone
    }
    late = tmp_path / "late"
    late.mkdir()
    assert ranks.run(("tests.planted_ranks",), 2, late, seconds=0.1).keys() == {"log"}


def shard_by_shard(backend: str, operands: tuple, upstream, cuts: list[int], rest: tuple):
    """Forward and backward of the shards one after the other: what the ranks of a group do."""
    hidden, weight, tokens = operands
    bias, temperature, row_temperature, *options = rest
    words = [f"linear_token_logprobs_{word}" for word in ("stats", "backward")]
    stats, backward = (
        getattr(reference, word) if backend == "reference" else _ops.handle(word, backend)
        for word in words
    )
    heads = [
        (
            *(hidden, weight[a:b], tokens - a, None if bias is None else bias[a:b]),
            *(temperature, row_temperature, *options, 1 << 25),
        )
        for a, b in pairwise(cuts)
    ]
    inverse = 1 / (temperature if row_temperature is None else row_temperature)
    scores, joined = merge([stats(*head) for head in heads], inverse)
    mask = options[-1]
    if mask is not None:
        scores = [torch.where(mask, score, 0) for score in scores]
    wanted = (True, True, bias is not None, True)
    grads = [backward(*head, scores[1], joined, *upstream, *wanted) for head in heads]
    by_hidden = sum(grad[0] for grad in grads)
    assert by_hidden.dtype == torch.float32
    return scores, (by_hidden, *(torch.cat([grad[i] for grad in grads]) for i in (1, 2)))


@pytest.mark.parametrize("optional", (False, True), ids=("plain", "options"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=helpers.dtype_id)
@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_shards_make_the_whole_on_every_floor(backend, dtype, optional):
    helpers.use(backend)
    operands, upstream = head((6,), 9, 300, dtype), torch.randn(3, 6)
    upstream[:, 2] = 0
    bias, rows, mask = torch.randn(300), torch.rand(6) + 0.5, torch.arange(6) != 4
    rest = (bias, 1.0, rows, 0.7, 5.0, mask) if optional else (None, 0.8, None, 1.0, 0.0, None)
    options = {"temperature": 0.8}
    if optional:
        options = {"bias": bias, "temperature": rows, "mask": mask}
        options |= {"logit_scale": 0.7, "softcap": 5.0}
    cuts = [0, 17, 17, 18, 250, 300]
    scores, grads = shard_by_shard(backend, operands, upstream, cuts, rest)
    wide = [value.double() if value.is_floating_point() else value for value in operands]
    options = {
        name: value.double() if name in ("bias", "temperature") and optional else value
        for name, value in options.items()
    }
    want, truth = run("reference", *wide, upstream, **options)
    for got, expected in zip(scores, want, strict=True):
        helpers.assert_close(got, expected, 1e-5, "result")
    for got, expected in zip(grads, truth, strict=False):
        helpers.assert_close(got, expected, 2 * helpers.BACKWARD[dtype], "gradient")
    unrounded = grads[0].bfloat16().float() != grads[0]
    assert dtype == torch.float32 or unrounded.any()  # the sum over shards is rounded once


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_shards_join_in_any_grouping_of_extreme_logits(backend):
    """Logits of +-1e30 side by side, a shard of -inf, a NaN row that stays alone."""
    helpers.use(backend)
    hidden, weight = torch.eye(4), torch.zeros(8, 4)
    weight[3], weight[6], weight[2, 0] = 1e30, -1e30, 50.0
    hidden[3, 3] = math.nan
    bias = torch.zeros(8)
    bias[4:6] = -INF
    operands = (hidden, weight, torch.tensor([3, 6, 4, 1]))
    want, _ = run("reference", *operands, torch.zeros(3, 4), bias=bias)
    rest = (bias, 1.0, None, 1.0, 0.0, None)
    for cuts in ([0, 8], [0, 4, 6, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8]):
        scores, _ = shard_by_shard(backend, operands, torch.zeros(3, 4), cuts, rest)
        for got, expected in zip(scores, want, strict=True):
            helpers.assert_close(got, expected, 2e-6, "result")


def test_a_token_in_no_shard_or_in_two_is_nan_alone():
    hidden, weight, _ = head((3,), 5, 50)
    tokens = torch.tensor([1, 99, 30])
    rest = (None, 1.0, None, 1.0, 0.0, None, 0)
    parts = [
        reference.linear_token_logprobs_stats(hidden, weight[a:b], tokens - a, *rest)
        for a, b in ((0, 35), (25, 50))  # both have token 30
    ]
    scores, _ = merge(parts, 1.0)
    assert all(torch.equal(score.isnan(), torch.tensor([False, True, True])) for score in scores)


@pytest.fixture
def alone(tmp_path):
    """A group of this process alone."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    yield distributed.group.WORLD
    distributed.destroy_process_group()


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_a_group_of_one_is_the_whole(alone, backend):
    operands, upstream = head((5,), 6, 40), torch.randn(3, 5)
    want, truth = run(backend, *operands, upstream)
    got, grads = run(backend, *operands, upstream, process_group=alone)
    for value, expected in zip((*got, *grads), (*want, *truth), strict=True):
        helpers.assert_close(value, expected, 2e-6, "group of one")


def test_gradcheck(alone):
    """Float64 finite differences through the merge and the shard's backward."""
    helpers.need("cpp")
    hidden, weight, tokens = head((3,), 4, 7, torch.float64)
    leaves = [leaf(hidden), leaf(weight), torch.randn(7, dtype=torch.float64, requires_grad=True)]
    options = {"logit_scale": 0.7, "softcap": 3.0, "temperature": 0.9, "process_group": alone}

    for backend in ("cpp", "reference"):

        def scores(x, w, b, backend=backend):
            return linear_token_logprobs(x, w, tokens, bias=b, backend=backend, **options)

        assert torch.autograd.gradcheck(scores, leaves)


def test_autocast(alone):
    hidden, weight, tokens = head((4,), 16, 80)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = linear_token_logprobs(hidden, weight, tokens)
        for backend in ("auto", "reference"):
            options = {"process_group": alone, "backend": backend}
            got = linear_token_logprobs(hidden, weight, tokens, **options)
            for value, expected in zip(got, want, strict=True):
                helpers.assert_close(value, expected, 2e-6, backend)


def test_bad_arguments_are_refused_by_name(alone):
    hidden, weight, tokens = head((2,), 4, 9)
    kept_all = {"kept": object(), "process_group": alone}
    for message, options in {
        "process_group must be a torch.distributed.ProcessGroup": {"process_group": "tp"},
        "vocab_start must be at least 0, got -3": {"process_group": alone, "vocab_start": -3},
        "vocab_start=3 is for a shard; give its process_group": {"vocab_start": 3},
        "kept= needs the whole weight": kept_all,
        "tokens must each be in one rank's shard, got": {"process_group": alone, "vocab_start": 9},
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            linear_token_logprobs(hidden, weight, tokens, **options)
    with pytest.raises(ValueError, match=r"weight must be \[V, 4\]"):
        linear_token_logprobs(hidden, weight[:, :3], tokens, process_group=alone)


def test_head_is_the_op_and_shares_the_parameters():
    linear = torch.nn.Linear(6, 40)
    table = torch.nn.Embedding(40, 6)
    linear.weight = table.weight  # tied
    module = LogprobHead(linear, logit_scale=0.5, softcap=4.0)
    assert module.weight is table.weight and module.bias is linear.bias
    assert set(module.state_dict()) == set(linear.state_dict()) == {"weight", "bias"}
    module.load_state_dict(torch.nn.Linear(6, 40).state_dict())
    hidden, tokens = torch.randn(3, 6), torch.tensor([1, 2, 39])
    out = module(hidden, tokens, temperature=0.7)
    options = {"bias": linear.bias, "logit_scale": 0.5, "softcap": 4.0, "temperature": 0.7}
    want = linear_token_logprobs(hidden, table.weight, tokens, **options)
    assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))
    out.logprobs.sum().backward()
    assert table.weight.grad.any() and linear.bias.grad.any()
    assert "6, 40, bias=True, logit_scale=0.5, softcap=4.0" in repr(module)
    bare = LogprobHead(torch.nn.Linear(6, 40, bias=False))
    assert set(bare.state_dict()) == {"weight"} and len(list(bare.parameters())) == 1
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Linear, got Embedding"):
        LogprobHead(table)
