"""Our class under Liger's name beside Liger's own, eager on the CPU: loss, gradients, metrics."""

from __future__ import annotations

import inspect
import itertools
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from pyllmtune import linear_token_logprobs
from pyllmtune.integrations.liger import LigerFusedLinearGRPOLoss
from tests import helpers, preset_formulas
from tests.linear_policy_cases import VALUES

B, T, D, V = 5, 6, 8, 70
LENGTHS = (6, 3, 1, 0, 5)  # a row without tokens, and padding
PPO = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
OWN_RULE = ("cispo", "sapo", "vespo")
PAIRS = [(name, level) for name in PPO for level in ("token", "sequence")]
PAIRS += [(name, "token") for name in OWN_RULE]
BOUNDS = {"epsilon_low": 0.2, "epsilon_high": 0.28, "max_completion_length": 9}


@pytest.fixture
def liger():
    helpers.need("liger_kernel")
    from liger_kernel.chunked_loss import grpo_loss

    return grpo_loss.LigerFusedLinearGRPOLoss


def batch(
    lengths: tuple[int, ...] = LENGTHS, vocab: int = V, temperature: float = 1.0
) -> dict[str, Tensor]:
    """The call's tensors, with ratios on both sides of every bound; the head has a bias."""
    hidden, weight = torch.randn(B, T, D), torch.randn(vocab, D) / D**0.5
    bias, tokens = 0.3 * torch.randn(vocab), torch.randint(0, vocab, (B, T))
    options = {"bias": bias, "temperature": temperature}
    lp = linear_token_logprobs(hidden, weight, tokens, **options).logprobs
    old = lp + 0.4 * torch.randn(B, T)
    old[2] = lp[2] - 0.5  # above the bounds, with an advantage of 0: not clipped
    return {
        "_input": hidden,
        "lin_weight": weight,
        "selected_token_ids": tokens,
        "attention_mask": (torch.arange(T) < torch.tensor(lengths)[:, None]).long(),
        "advantages": torch.tensor([1.0, -0.6, 0.0, 0.7, -1.3]),
        "bias": bias,
        "ref_per_token_logps": lp + 0.3 * torch.randn(B, T),
        "old_per_token_logps": old,
    }


def options_of(loss_type: str, level: str = "token", **changes) -> dict:
    made = {**BOUNDS, "loss_type": loss_type, "importance_sampling_level": level, **changes}
    if loss_type == "cispo":
        made["epsilon_high"] = 1.4  # the ratio's own bound; the usual 5 would bind nowhere here
    return made


def run(kind, options: dict, data: dict[str, Tensor]):
    """Loss, metrics, and the gradients of 1.5 times the loss."""
    names = [n for n in ("_input", "lin_weight", "bias") if data.get(n) is not None]
    leaves = {name: data[name].detach().clone().requires_grad_() for name in names}
    loss, metrics = kind(**options)(**{**data, **leaves})
    assert isinstance(metrics, tuple)
    return loss.detach(), metrics, torch.autograd.grad(1.5 * loss, list(leaves.values()))


def assert_close(got, want) -> None:
    """Two results in float32, each with that error."""
    assert got[0].dtype == want[0].dtype and got[0].dim() == 0
    helpers.assert_close(got[0], want[0], VALUES[torch.float32], "loss")
    assert len(got[1]) == len(want[1])
    for a, b in zip(got[1], want[1], strict=True):
        assert a.dtype == b.dtype
        helpers.assert_close(a, b, VALUES[torch.float32], "metric")
    for a, b in zip(got[2], want[2], strict=True):
        assert a.dtype == b.dtype
        size = b.abs().max().clamp(min=1e-300)
        helpers.assert_close(a / size, b / size, 2 * helpers.BACKWARD[torch.float32], "gradient")


def assert_same(liger, options: dict, data: dict[str, Tensor]) -> None:
    want = run(liger, {**options, "compiled": False}, data)
    assert any(grad.abs().max() > 1e-3 for grad in want[2])
    assert_close(run(LigerFusedLinearGRPOLoss, options, data), want)


def test_signatures_are_ligers(liger):
    ours = inspect.signature(LigerFusedLinearGRPOLoss).parameters.values()
    theirs = inspect.signature(liger).parameters.values()
    positional = [(p.name, p.default) for p in ours if p.kind != p.KEYWORD_ONLY]
    assert positional == [(p.name, p.default) for p in theirs]
    call, expected = (
        [(p.name, p.default) for p in inspect.signature(kind.forward).parameters.values()]
        for kind in (LigerFusedLinearGRPOLoss, liger)
    )
    assert call == expected
    assert vars(liger()).keys() <= vars(LigerFusedLinearGRPOLoss()).keys()


@pytest.mark.parametrize(("loss_type", "level"), PAIRS)
def test_equals_liger(liger, loss_type, level):
    """With and without a penalty, a bias, old log-probs; the reference as log-probs and as a head.

    Liger's luspo is compared without padding; a test of its own has that.
    """
    lengths = (T,) * B if loss_type == "luspo" else LENGTHS
    for beta, biased, with_old in itertools.product((0.0, 0.04), (True, False), (True, False)):
        data = batch(lengths, temperature=1.7)
        if not biased:
            data["bias"] = None
        if not with_old:
            data["old_per_token_logps"] = None
        options = options_of(loss_type, level, beta=beta, temperature=1.7)
        assert_same(liger, options, data)
        hidden, weight = torch.randn(B, T, D + 3), torch.randn(V, D + 3)
        data |= {"ref_per_token_logps": None, "ref_input": hidden, "ref_weight": weight}
        data["ref_bias"] = torch.randn(V) if biased else None
        assert_same(liger, options, data)


OPTIONS = {
    "two-sided clip": ({"delta": 1.5}, PPO),
    "narrow": ({"epsilon_low": 0.05, "epsilon_high": 0.0}, PPO),
    "no lower bound": ({"epsilon_low": 3.0}, PPO),
    "corrected penalty": ({"beta": 0.3, "use_bias_correction_kl": True}, (*PPO, "cispo", "sapo")),
    "no reference": ({"use_ref_model": False}, (*PPO, *OWN_RULE)),
    "chunks": ({"chunk_size": 2}, (*PPO, *OWN_RULE)),
    "sapo": ({"sapo_temperature_pos": 0.7, "sapo_temperature_neg": 2.5}, ("sapo",)),
    "vespo": ({"vespo_k_pos": 1.1, "vespo_lambda_pos": 0.9, "vespo_lambda_neg": 0.0}, ("vespo",)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_equal_liger(liger, name):
    changes, loss_types = OPTIONS[name]
    for loss_type, level in PAIRS:
        if loss_type in loss_types:
            data = batch((T,) * B if loss_type == "luspo" else LENGTHS)
            assert_same(liger, options_of(loss_type, level, **changes), data)


@pytest.mark.parametrize(("loss_type", "level"), PAIRS)
@pytest.mark.parametrize("shape", ((B,), (B, 1), (B, T)), ids=str)
def test_importance_ratios_equal_liger(liger, loss_type, level, shape):
    data = batch((T,) * B if loss_type == "luspo" else LENGTHS)
    ratio = 0.3 + torch.rand(shape)
    ratio[1] = 0.0
    if shape == (B, T) and loss_type == "vespo":  # Liger takes those of padding too
        ratio = torch.where(data["attention_mask"] > 0, ratio, 1.0)
    assert_same(liger, options_of(loss_type, level, beta=0.1), {**data, "vllm_is_ratio": ratio})


@pytest.mark.parametrize("loss_type", (*PPO, *OWN_RULE))
@pytest.mark.parametrize("items", (37, 0, torch.tensor(37), torch.tensor(0)), ids=str)
def test_number_of_items_equals_liger(liger, loss_type, items):
    data = batch((T,) * B if loss_type == "luspo" else LENGTHS)
    assert_same(liger, options_of(loss_type), {**data, "num_items_in_batch": items})


@pytest.mark.parametrize("items", (None, 37, torch.tensor(37.0)), ids=("counted", "37", "tensor"))
def test_divisor_of_several_ranks_equals_liger(liger, items, monkeypatch):
    """The collectives of three ranks, played by one that knows what the others would send."""
    sent = []

    def all_reduce(value: Tensor, op=torch.distributed.ReduceOp.SUM) -> None:
        sent.append(op)
        value += 22.0

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    for loss_type in ("dapo", "cispo", "vespo"):
        data = {**batch(), "num_items_in_batch": items}
        sent.clear()
        run(LigerFusedLinearGRPOLoss, options_of(loss_type), data)
        assert sent == ([torch.distributed.ReduceOp.SUM] if items is None else [])
        assert_same(liger, options_of(loss_type), data)


def test_vocabulary_of_several_tiles_equals_liger(liger):
    assert_same(liger, options_of("dapo"), batch(vocab=9001))


@pytest.mark.parametrize("dtype", (torch.bool, torch.int32, torch.float32), ids=helpers.dtype_id)
def test_dtypes_of_the_mask_equal_liger(liger, dtype):
    data = batch()
    data["attention_mask"] = data["attention_mask"].to(dtype)
    assert_same(liger, options_of("grpo"), data)


def test_advantages_per_token_equal_liger(liger):
    """Which Liger takes with its default of one row at a time."""
    for loss_type in ("dapo", "cispo"):
        data = {**batch(), "advantages": torch.randn(B, T)}
        assert_same(liger, options_of(loss_type), data)


def test_head_of_another_dtype_equals_liger(liger):
    """float32 weights under bfloat16 states; Liger's logits are exact here, powers of two."""
    data = batch()
    data["_input"] = torch.randint(-1, 2, (B, T, D)).bfloat16()
    data["lin_weight"] = torch.randint(-1, 2, (V, D)).float()
    data["bias"] = data["bias"] * 0
    got, want = (
        run(kind, {**options_of("dapo"), "compiled": False}, data)
        for kind in (LigerFusedLinearGRPOLoss, liger)
    )
    helpers.assert_close(got[0], want[0], VALUES[torch.bfloat16], "loss")
    for a, b in zip(got[2], want[2], strict=True):
        assert a.dtype == b.dtype
        bound = 2 * helpers.BACKWARD[torch.bfloat16]  # of dz, then of the sum
        helpers.assert_close(a / b.abs().max(), b / b.abs().max(), bound, "gradient")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=helpers.dtype_id)
def test_half_precision_equals_liger_in_float32(liger, dtype):
    """Of the same numbers: our logits are not rounded."""
    data = batch()
    rounded = {name: data[name].to(dtype) for name in ("_input", "lin_weight")}
    got = run(LigerFusedLinearGRPOLoss, options_of("dapo"), {**data, **rounded})
    exact = {**data, **{name: value.float() for name, value in rounded.items()}}
    want = run(liger, {**options_of("dapo"), "compiled": False}, exact)
    helpers.assert_close(got[0], want[0], VALUES[dtype], "loss")
    for a, b in zip(got[2], want[2], strict=True):
        bound = 2 * helpers.BACKWARD[dtype]  # of dz, then of the sum
        helpers.assert_close(a / b.abs().max(), b / b.abs().max(), bound, "gradient")


@pytest.mark.parametrize("level", ("token", "sequence"))
def test_luspo_is_trls_where_there_is_padding(liger, level):
    """Liger divides by the padded length, and its penalty counts the padding."""
    options, data = options_of("luspo", level, beta=2.0), batch()
    m = data["attention_mask"].double()
    hidden, weight, bias = (data[n].double() for n in ("_input", "lin_weight", "bias"))
    logprobs = (hidden @ weight.T + bias).log_softmax(-1)
    lp = logprobs.gather(-1, data["selected_token_ids"][..., None])[..., 0]
    old, ref = (data[f"{name}_per_token_logps"].double() for name in ("old", "ref"))
    s = lp - old
    if level == "sequence":
        s = ((s * m).sum(-1) / m.sum(-1).clamp(min=1))[:, None]
    A = data["advantages"].double()[:, None]
    per_token = preset_formulas.clipped(s.exp(), A, 0.2, 0.28) + 2.0 * preset_formulas.k3(lp, ref)
    want = (per_token * m).sum(-1).mean()
    got = run(LigerFusedLinearGRPOLoss, options, data)
    theirs = run(liger, {**options, "compiled": False}, data)
    helpers.assert_close(got[0], want, VALUES[torch.float32], "loss")
    assert (theirs[0] - want).abs() > 1e-2
    for a, b in zip(got[1], theirs[1], strict=True):
        helpers.assert_close(a, b, VALUES[torch.float32], "metric")
    if level == "sequence":  # where nothing is per token, padding has no say in Liger either
        assert_same(liger, {**options, "beta": 0.0}, data)


@pytest.mark.parametrize(("loss_type", "level"), PAIRS)
def test_padding_may_hold_anything(loss_type, level):
    data = {**batch(), "vllm_is_ratio": 0.5 + torch.rand(B, T)}
    options = options_of(loss_type, level)
    want = run(LigerFusedLinearGRPOLoss, options, data)
    padding, spoiled = data["attention_mask"] == 0, dict(data)
    for name in ("_input", "ref_per_token_logps", "old_per_token_logps", "vllm_is_ratio"):
        spoiled[name] = data[name].clone()
        spoiled[name][padding] = math.nan
    spoiled["selected_token_ids"] = data["selected_token_ids"].masked_fill(padding, -100)
    got = run(LigerFusedLinearGRPOLoss, options, spoiled)
    assert_close(got, want)
    assert torch.equal(got[2][0][padding], torch.zeros_like(got[2][0][padding]))


def test_frozen_head_and_attributes_changed_between_calls(liger):
    data, losses = batch(), []
    for kind in (LigerFusedLinearGRPOLoss, liger):
        module = kind(**options_of("dapo"), compiled=False)
        module.beta, module.temperature, module.loss_type = 0.5, 0.8, "grpo"
        hidden = data["_input"].clone().requires_grad_()
        loss, metrics = module(**{**data, "_input": hidden})
        losses.append((loss.detach(), metrics, torch.autograd.grad(loss, [hidden])))
    assert_close(*losses)


def test_nothing_selected():
    data = {**batch((0,) * B), "num_items_in_batch": 0}
    for loss_type, level in PAIRS:
        loss, metrics, grads = run(LigerFusedLinearGRPOLoss, options_of(loss_type, level), data)
        assert loss == 0 and all(metric == 0 for metric in metrics) and len(metrics) == 2
        assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_two_references_warn():
    data = batch()
    want = run(LigerFusedLinearGRPOLoss, {}, data)
    data |= {"ref_input": torch.randn(B, T, D), "ref_weight": torch.randn(V, D)}
    with pytest.warns(UserWarning, match="ref_input is not read"):
        assert_close(run(LigerFusedLinearGRPOLoss, {}, data), want)


REFUSED = {
    "loss_type must be one of grpo, .*got 'ppo'": {"loss_type": "ppo"},
    "importance_sampling_level must be one of token, sequence, got 'seq'": {
        "importance_sampling_level": "seq"
    },
    "importance_sampling_level='sequence' .*'sapo'; set it to 'token'": {
        "loss_type": "sapo",
        "importance_sampling_level": "sequence",
    },
    r"delta must be greater than 1 \+ epsilon_high = 1.2, got 1.1; None": {"delta": 1.1},
    "delta=3.0 has no effect on loss_type='vespo'; leave": {"loss_type": "vespo", "delta": 3.0},
    "epsilon_high must be at least 1 .*got 0.2; 5 is usual": {"loss_type": "cispo"},
    "epsilon_low must be at least 0, got -0.1": {"epsilon_low": -0.1},
    r"sapo_temperature_neg must be in \(0, 80\], got 0.0": {"sapo_temperature_neg": 0.0},
    "max_completion_length must be given .*got None": {"loss_type": "dr_grpo"},
    "use_bias_correction_kl .*'vespo' .*set it to False": {
        "loss_type": "vespo",
        "use_bias_correction_kl": True,
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_options_that_are_refused(message):
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearGRPOLoss(**REFUSED[message])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    (
        ({"ref_per_token_logps": None}, ValueError, "needs ref_per_token_logps, or ref_input"),
        ({"_input": torch.zeros(B * T, D)}, ValueError, r"_input must be \[B, T, D\]"),
        ({"attention_mask": None}, TypeError, "attention_mask must be a torch.Tensor"),
        (
            {"old_per_token_logps": torch.zeros(B, 1)},
            ValueError,
            r"old_per_token_logps must have shape \[5, 6\]",
        ),
        ({"vllm_is_ratio": torch.zeros(T)}, ValueError, r"vllm_is_ratio must be \[5\], \[5, 1\]"),
    ),
)
def test_tensors_that_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        LigerFusedLinearGRPOLoss()(**{**batch(), **changes})


def test_liger_need_not_be_installed():
    code = (
        "import sys; sys.modules['liger_kernel'] = None\n"
        "from pyllmtune.integrations.liger import LigerFusedLinearGRPOLoss\n"
        "print(LigerFusedLinearGRPOLoss(beta=0.1).beta)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "0.1", done.stderr
