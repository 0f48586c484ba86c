"""value_loss against its formula token by token, and at its edges."""

from __future__ import annotations

import math

import pytest
import torch

from pyllmtune import value_loss
from pyllmtune.losses.value import Aggregation


def batch(batch: int = 4, length: int = 9) -> dict[str, torch.Tensor]:
    old = torch.randn(batch, length, dtype=torch.float64)
    return {
        "values": old + 0.4 * torch.randn(batch, length, dtype=torch.float64),
        "returns": torch.randn(batch, length, dtype=torch.float64),
        "mask": torch.rand(batch, length) > 0.3,
        "old_values": old,
    }


def loop(values, returns, mask, old_values=None, clip=None, aggregation="token-mean", normalizer=0):
    """Loss and gradient, one token at a time, in Python floats."""
    rows, columns = values.shape
    count = [int(mask[i].sum()) for i in range(rows)]
    total, gradient = 0.0, torch.zeros_like(values)
    for i in range(rows):
        share = 1 / max(count[i], 1) if aggregation == "seq-mean-token-mean" else 1.0
        for t in range(columns):
            if not mask[i, t]:
                continue
            v, r = values[i, t].item(), returns[i, t].item()
            error, slope = (v - r) ** 2 / 2, v - r
            if clip is not None:
                o = old_values[i, t].item()
                near = min(max(v, o - clip), o + clip)
                if (near - r) ** 2 / 2 > error:
                    error, slope = (near - r) ** 2 / 2, 0.0  # only a moved value has another error
            total += share * error
            gradient[i, t] = share * slope
    counted = sum(count) if aggregation == "token-mean" else sum(n > 0 for n in count)
    divisor = normalizer or counted
    return total / divisor, gradient / divisor


@pytest.mark.parametrize("clip", (None, 0.2))
@pytest.mark.parametrize("aggregation", Aggregation.__args__)
@pytest.mark.parametrize("as_tensor", (False, True))
def test_loss_and_gradient_against_a_loop(clip, aggregation, as_tensor):
    data = batch()
    data["mask"][2] = False
    if clip is None:
        del data["old_values"]
    number = 7.0 if aggregation == "constant" or as_tensor else 0
    want, gradient = loop(**data, clip=clip, aggregation=aggregation, normalizer=number)
    normalizer = torch.tensor(number) if as_tensor else number or None
    values = data.pop("values").requires_grad_()
    out = value_loss(values, **data, clip=clip, aggregation=aggregation, normalizer=normalizer)
    (got,) = torch.autograd.grad(out.loss, values)
    assert out.loss.item() == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(got, gradient)


def test_by_hand():
    """Old 0, clip 0.5, return 0: the value 1 counts as 0.5, whose error is smaller, so as 1."""
    values = torch.tensor([[1.0, 1.0, -1.0]], requires_grad=True)
    returns = torch.tensor([[0.0, 2.0, 2.0]])
    out = value_loss(values, returns, old_values=torch.zeros(1, 3), clip=0.5)
    assert out.loss.item() == pytest.approx((1.0 + 1.5**2 + 3.0**2) / 6)
    out.loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[1.0, 0.0, -3.0]]) / 3)
    assert out.clip_fraction.item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("clip", (None, 0.3))
def test_gradcheck(clip):
    data = batch(2, 5)
    values = data.pop("values").requires_grad_()
    if clip is None:
        del data["old_values"]
    assert torch.autograd.gradcheck(lambda v: value_loss(v, **data, clip=clip).loss, values)


@pytest.mark.parametrize("aggregation", Aggregation.__args__)
def test_packed_is_padded_and_micro_batches_add_up(aggregation):
    data = batch(4, 9)
    lengths = torch.tensor([9, 2, 0, 5])
    inside = torch.arange(9) < lengths[:, None]
    data["mask"] &= inside
    number = {"token-mean": float(data["mask"].sum()), "constant": 50.0}.get(
        aggregation, float(data["mask"].any(-1).sum())
    )
    options = {"clip": 0.2, "aggregation": aggregation, "normalizer": number}
    whole = value_loss(**data, **options)
    ends = torch.cat((torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()))
    packed = value_loss(**{k: v[inside] for k, v in data.items()}, **options, cu_seqlens=ends)
    torch.testing.assert_close(packed, whole)
    parts = [
        value_loss(**{k: v[rows] for k, v in data.items()}, **options).loss
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole.loss)
    if aggregation != "constant":
        torch.testing.assert_close(value_loss(**data, **(options | {"normalizer": None})), whole)


@pytest.mark.parametrize("bad", (math.nan, math.inf), ids=str)
@pytest.mark.parametrize("where", ("mask", "returns", "old_values"))
def test_masked_and_dropped_tokens_have_no_share(bad, where):
    """Whatever they hold, in every argument; a target that is not finite drops its token."""
    data = batch()
    data["mask"][1, 3] = False
    want = value_loss(**data, clip=0.2)
    if where == "mask":
        for name in ("values", "returns", "old_values"):
            data[name][~data["mask"]] = bad
    else:
        data["mask"][1, 3] = True
        data[where][1, 3] = bad
    values = data.pop("values").requires_grad_()
    out = value_loss(values, **data, clip=0.2)
    torch.testing.assert_close(out, want)
    (gradient,) = torch.autograd.grad(out.loss, values)
    assert gradient[1, 3] == 0 and gradient.isfinite().all()


@pytest.mark.parametrize("aggregation", Aggregation.__args__)
@pytest.mark.parametrize("normalizer", (None, torch.zeros(())), ids=("counted", "zero"))
def test_nothing_selected_is_zero_with_a_connected_graph(aggregation, normalizer):
    if aggregation == "constant" and normalizer is None:
        normalizer = 3.0
    values = torch.full((2, 3), math.nan, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    out = value_loss(values, values.detach(), mask, aggregation=aggregation, normalizer=normalizer)
    out.loss.backward()
    assert out.loss == 0 and out.clip_fraction == 0 and torch.equal(values.grad, torch.zeros(2, 3))
    empty = torch.zeros(0, 4, requires_grad=True)
    assert value_loss(empty, empty, normalizer=1.0).loss == 0


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    data = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch().items()}
    values = data.pop("values").requires_grad_()
    out = value_loss(values, **data, clip=0.2)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in data.items()}
    assert out.loss.dtype == torch.float32
    assert torch.equal(out.loss, value_loss(values.float(), **wide, clip=0.2).loss)
    out.loss.backward()
    assert values.grad.dtype == dtype


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    data = batch()
    compiled = torch.compile(value_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**data, clip=0.2), value_loss(**data, clip=0.2))


X = torch.zeros(2, 3)
BAD = {
    "values must be \\[B, T\\], got \\[6\\]": ((X.flatten(), X.flatten()), {}),
    "values must be one of float32": ((X.long(), X), {}),
    "returns must have shape \\[2, 3\\], the shape of values": ((X, X[:, :2]), {}),
    "old_values must have shape": ((X, X), {"old_values": X[:1], "clip": 0.1}),
    "clip= and old_values= belong together": ((X, X), {"clip": 0.1}),
    "old_values= belong together": ((X, X), {"old_values": X}),
    "clip must be positive and finite, got 0.0": ((X, X), {"old_values": X, "clip": 0.0}),
    "mask must have shape \\[2, 3\\]": ((X, X, X[0]), {}),
    "aggregation must be one of token-mean": ((X, X), {"aggregation": "mean"}),
    "aggregation='constant' needs normalizer=": ((X, X), {"aggregation": "constant"}),
    "normalizer must be positive and finite, got -1": ((X, X), {"normalizer": -1}),
    "normalizer must be a number or a 0-d tensor": ((X, X), {"normalizer": torch.ones(2)}),
}


@pytest.mark.parametrize("message", BAD, ids=lambda message: message[:40])
def test_bad_input_is_refused_by_name(message):
    arguments, options = BAD[message]
    with pytest.raises((TypeError, ValueError), match=message):
        value_loss(*arguments, **options)
