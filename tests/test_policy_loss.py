"""policy_loss on every backend present against the float64 reference, hand-computed cases,
invariances and errors.
"""

from __future__ import annotations

import math

import pytest
import torch

from pyllmtune import PolicyLossConfig, grpo_loss, policy_loss, ppo_clip_loss
from pyllmtune.losses.config import Aggregation
from pyllmtune.losses.metrics import SUMS
from tests import helpers
from tests.policy_cases import LEVELS, NORMALIZED, batch, compare, config_of, run

TENSORS = ("ref_logprobs", "entropy", "weights")


@pytest.mark.parametrize("backend", helpers.KERNELS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("absent", (*TENSORS, "mask", "all"))
@pytest.mark.parametrize("per_token", (False, True))
def test_optional_inputs(backend, level, absent, per_token):
    data = batch(3, 20, per_token=per_token)
    for name in (*TENSORS, "mask") if absent == "all" else (absent,):
        del data[name]
    kl = {"kl": "k3", "kl_coef": 0.2} if "ref_logprobs" in data else {}
    bonus = {"entropy_coef": 0.05} if "entropy" in data else {}
    compare(
        data,
        config_of(level, aggregation="seq-mean-token-mean", **kl, **bonus),
        backend,
    )


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize(
    "shape", ((1, 1), (5, 1), (1, 700), (3, 16), (2, 17), (0, 4), (3, 0)), ids=str
)
@pytest.mark.parametrize("level", LEVELS)
def test_shapes(backend, shape, level):
    compare(batch(*shape), config_of(level, aggregation="seq-mean-token-sum"), backend)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("aggregation", Aggregation.__args__)
@pytest.mark.parametrize("level", LEVELS)
def test_all_masked_is_zero_with_a_connected_graph(backend, aggregation, level):
    data = batch(3, 8)
    data["mask"][:] = False
    for name in ("logprobs", "old_logprobs", "advantages", "ref_logprobs", "entropy", "weights"):
        data[name][:] = math.nan
    config = config_of(level, kl="k3", kl_coef=0.1, entropy_coef=0.1, aggregation=aggregation)
    loss, metrics, *grads = run(
        data, config, helpers.use(backend), torch.float32, normalizer=torch.zeros(())
    )
    assert loss == 0 and metrics[0] == 0
    assert all(torch.equal(grad, torch.zeros(3, 8)) for grad in grads)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf), ids=str)
@pytest.mark.parametrize("where", ("old_logprobs", "ref_logprobs"))
def test_non_finite_old_or_reference_is_dropped_and_counted(backend, bad, where):
    data = batch(2, 9)
    data["mask"][:] = True
    config = PolicyLossConfig(
        level="sequence", kl="k3", kl_coef=0.1, aggregation="seq-mean-token-mean"
    )
    without = {k: v.clone() for k, v in data.items()}
    without["mask"][1, 4] = False
    data[where][1, 4] = bad
    got = run(data, config, helpers.use(backend), torch.float32)
    want = run(without, config, backend, torch.float32)
    assert got[1][SUMS.index("dropped")] == 1 and want[1][SUMS.index("dropped")] == 0
    assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2])


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("level", LEVELS[:4])
def test_overflowing_ratios(backend, level):
    """log-ratios of +-200: where a bound binds the gradient is exactly 0, an advantage or weight of
    0 silences all.
    """
    old = torch.tensor([[0.0], [0.0], [0.0], [0.0], [0.0]])
    logprobs = torch.tensor([[200.0], [-200.0], [-200.0], [200.0], [200.0]])
    advantages = torch.tensor([1.0, -1.0, 1.0, 0.0, -1.0])
    data = {"logprobs": logprobs, "old_logprobs": old, "advantages": advantages}
    capped = config_of(level, cap=3.0, aggregation="seq-mean-token-sum")
    loss, _, grad = run(data, capped, helpers.use(backend), torch.float32)
    torch.testing.assert_close(loss, torch.tensor((-1.2 + 0.8 + 0.0 + 0.0 + 3.0) / 5))
    assert torch.equal(grad, torch.zeros(5, 1))
    data["weights"] = torch.tensor([[1.0], [1.0], [1.0], [1.0], [0.0]])
    loss, _, grad = run(data, config_of(level), helpers.use(backend), torch.float32)
    torch.testing.assert_close(loss, torch.tensor((-1.2 + 0.8) / 5))
    assert torch.equal(grad, torch.zeros(5, 1))


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_rules_by_hand(backend):
    """w = 1.5: A = 1 clips to 1.2 with gradient 0; A = -1 gives 1.5 and keeps its gradient; CISPO
    always keeps it.
    """
    helpers.use(backend)
    old = torch.log(torch.tensor([[0.10]]))

    def one(advantage: float, **options) -> tuple[float, float]:
        logprobs = torch.log(torch.tensor([[0.15]])).requires_grad_()
        out = grpo_loss(logprobs, old, torch.tensor([advantage]), backend=backend, **options)
        return out.loss.item(), torch.autograd.grad(out.loss, logprobs)[0].item()

    assert one(1.0) == pytest.approx((-1.2, 0.0), abs=1e-6)
    assert one(-1.0) == pytest.approx((1.5, 1.5), rel=1e-6)
    assert one(-1.0, delta=1.4) == pytest.approx((1.4, 0.0), abs=1e-6)
    config = PolicyLossConfig(rule="cispo", eps_low=1.0, eps_high=0.3)
    logprobs = torch.log(torch.tensor([[0.15]])).requires_grad_()
    loss = policy_loss(logprobs, old, torch.tensor([2.0]), config=config, backend=backend).loss
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert loss.item() == pytest.approx(-1.3 * 2.0 * math.log(0.15), rel=1e-6)
    assert grad.item() == pytest.approx(-1.3 * 2.0, rel=1e-6)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("level", ("token", "sequence"))
def test_without_an_advantage_nothing_is_clipped(backend, level):
    """As TRL, verl and Liger count: ratios on both sides of the bounds, above, below, and at 1."""
    old = torch.zeros(3, 1)
    logprobs = torch.tensor([[1.0], [-1.0], [0.0]])
    config = PolicyLossConfig(level=level, cap=3.0)
    for advantages, low, high in (
        (torch.zeros(3), 0, 0),
        (torch.tensor([0.0, -1.0, 0.0]), 1, 0),
        (torch.tensor([1.0, 0.0, 0.0]), 0, 1),
    ):
        floor = helpers.use(backend)
        out = policy_loss(logprobs, old, advantages, config=config, backend=floor)
        sums = dict(zip(SUMS, out.metrics.vector.tolist(), strict=False))
        found = (sums["clipped_low"], sums["clipped_high"], sums["clipped_cap"])
        assert found == (low, high, 0)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_sequence_level_by_hand(backend):
    """GSPO: ratio e^mean(0.2, 0.4) = e^0.3, each token gets w A / n."""
    helpers.use(backend)
    old = torch.tensor([[-1.0, -2.0, math.nan]])
    logprobs = torch.tensor([[-0.8, -1.6, 7.0]]).requires_grad_()
    mask = torch.tensor([[1, 1, 0]])
    out = grpo_loss(logprobs, old, torch.tensor([-2.0]), mask, level="sequence", backend=backend)
    (grad,) = torch.autograd.grad(out.loss, logprobs)
    assert out.loss.item() == pytest.approx(2 * math.exp(0.3), rel=1e-6)
    torch.testing.assert_close(grad, torch.tensor([[1.0, 1.0, 0.0]]) * math.exp(0.3))


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("aggregation", Aggregation.__args__)
def test_packed_equals_padded_and_order_does_not_matter(backend, level, aggregation):
    helpers.use(backend)
    data = batch(4, 11)
    lengths = torch.tensor([11, 3, 0, 7])
    data["mask"] = torch.arange(11) < lengths[:, None]
    config = config_of(level, kl="k2", kl_coef=0.1, entropy_coef=0.02, aggregation=aggregation)
    padded = run(data, config, backend, torch.float32)
    inside = data["mask"]
    packed = {k: v if k == "advantages" else v[inside] for k, v in data.items() if k != "mask"}
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()))
    got = run(packed, config, backend, torch.float32, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(got[0], padded[0])
    torch.testing.assert_close(got[1], padded[1])
    torch.testing.assert_close(got[2], padded[2][inside])
    torch.testing.assert_close(got[3], padded[3][inside])
    order = torch.tensor([2, 0, 3, 1])
    turned = run({k: v[order] for k, v in data.items()}, config, backend, torch.float32)
    torch.testing.assert_close(turned[0], padded[0])
    assert torch.equal(turned[2], padded[2][order])
    wider = {
        k: v if k == "advantages" else torch.nn.functional.pad(v, (0, 6), value=0)
        for k, v in data.items()
    }
    assert torch.equal(run(wider, config, backend, torch.float32)[2][:, :11], padded[2])


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("aggregation", Aggregation.__args__)
@pytest.mark.parametrize("as_tensor", (False, True))
def test_micro_batches_add_up_to_the_large_batch(backend, aggregation, as_tensor):
    helpers.use(backend)
    data = batch(6, 13)
    config = PolicyLossConfig(kl="k3", kl_coef=0.1, entropy_coef=0.02, aggregation=aggregation)
    number = {"token-mean": float(data["mask"].sum()), "constant": 6 * 13.0}.get(aggregation, 6.0)
    normalizer = torch.tensor(number) if as_tensor else number
    whole = run(data, config, backend, torch.float32, normalizer=normalizer)
    if aggregation not in NORMALIZED:
        torch.testing.assert_close(run(data, config, backend, torch.float32)[0], whole[0])
    parts = [
        run(
            {k: v[i : i + 2] for k, v in data.items()},
            config,
            backend,
            torch.float32,
            normalizer=normalizer,
        )
        for i in (0, 2, 4)
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), whole[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.cat([part[2] for part in parts]), whole[2], rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("backend", helpers.KERNELS)
def test_bits_do_not_depend_on_threads(backend):
    data = batch(9, 400)
    config = PolicyLossConfig(
        level="sequence", kl="k3", kl_coef=0.1, aggregation="seq-mean-token-mean"
    )
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(data, config, helpers.use(backend), torch.float32))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_backward_again(backend):
    """A retained graph gives the same gradients at every backward, one or several at a time."""
    data = {k: v.float() if v.is_floating_point() else v for k, v in batch(3, 40).items()}
    leaves = [data[name].requires_grad_() for name in ("logprobs", "entropy")]
    config = PolicyLossConfig(entropy_coef=0.1)
    loss = policy_loss(**data, config=config, backend=helpers.use(backend)).loss

    def grads(factor: float, **options) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, leaves, torch.tensor(factor), **options)

    first = grads(1.0, retain_graph=True)
    kept = [grad.clone() for grad in first]
    batched = torch.autograd.grad(
        loss, leaves, torch.tensor([4.0, 0.0]), retain_graph=True, is_grads_batched=True
    )
    second, last = grads(-2.0, retain_graph=True), grads(3.0)
    for i in range(2):
        assert torch.equal(first[i], kept[i]) and kept[i].abs().sum() > 0
        torch.testing.assert_close(batched[i], torch.stack((4 * kept[i], 0 * kept[i])))
        torch.testing.assert_close(second[i], -2 * kept[i])
        torch.testing.assert_close(last[i], 3 * kept[i])
    with pytest.raises(RuntimeError, match="second time"):
        grads(1.0)
    loss = policy_loss(**data, config=config, backend=backend).loss
    batched = torch.autograd.grad(loss, leaves, torch.tensor([2.0, 5.0]), is_grads_batched=True)
    policy_loss(**data, config=config, backend=backend).loss.backward()
    for i in range(2):
        torch.testing.assert_close(batched[i], torch.stack((2 * kept[i], 5 * kept[i])))
        torch.testing.assert_close(leaves[i].grad, kept[i])


def test_metrics_by_hand():
    old = torch.zeros(2, 3)
    logprobs = torch.log(torch.tensor([[1.5, 1.0, 0.5], [0.5, 2.0, 1.0]]))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    out = ppo_clip_loss(
        logprobs,
        old,
        torch.tensor([1.0, -1.0]),
        mask,
        dual_clip=1.8,
        entropy=torch.full((2, 3), 0.25),
    )
    shown = out.metrics.to_dict()
    expected = {
        "tokens": 5,
        "sequences": 2,
        "dropped": 0,
        "loss_sum": -(1.2 + 1.0 + 0.5) + 0.8 + 1.8,
        "clip_high_fraction": 1 / 5,
        "clip_low_fraction": 1 / 5,
        "clip_cap_fraction": 1 / 5,
        "ratio_mean": 5.5 / 5,
        "ratio_min": 0.5,
        "ratio_max": 2.0,
        "entropy": 0.25,
        "weight_mean": 1.0,
        "effective_sample_size": 5.5**2 / (5 * (1.5**2 + 1 + 0.25 + 0.25 + 4)),
        "approx_kl": -math.log(1.5 * 0.5 * 0.5 * 2.0) / 5,
    }
    for name, value in expected.items():
        assert shown[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name


def test_metrics_merge_like_one_batch():
    data = batch(4, 10)
    config = PolicyLossConfig()
    whole = policy_loss(**data, config=config).metrics
    first, second = (
        policy_loss(**{k: v[part] for k, v in data.items()}, config=config).metrics
        for part in (slice(0, 2), slice(2, 4))
    )
    torch.testing.assert_close(first.merge(second).vector, whole.vector)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=helpers.dtype_id)
def test_half_precision_inputs_are_computed_in_float32(dtype):
    data = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch(2, 6).items()}
    logprobs = data.pop("logprobs").requires_grad_()
    out = policy_loss(logprobs, **data)
    assert out.loss.dtype == torch.float32
    wide = {k: v.float() if v.is_floating_point() else v for k, v in data.items()}
    assert torch.equal(out.loss, policy_loss(logprobs.float(), **wide).loss)
    out.loss.backward()
    assert logprobs.grad.dtype == dtype


def test_weights_broadcast_per_sequence():
    data = batch(3, 5)
    per_sequence = torch.rand(3, 1, dtype=torch.float64)
    data["weights"] = per_sequence.expand(3, 5).clone()
    want = policy_loss(**data).loss
    data["weights"] = per_sequence
    assert torch.equal(policy_loss(**data).loss, want)
