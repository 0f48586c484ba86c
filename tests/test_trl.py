"""TRL's trainers with and without the patch: the same numbers at every step."""

from __future__ import annotations

import itertools
import sys
import types

import pytest
import torch

from tests import helpers, trl_runs

helpers.need("trl")
trl_integration = pytest.importorskip("pyllmtune.integrations.trl")

COMPARED = 1e-5  # relative, as the contract has it: float32 sums in another order
TIMES = ("runtime", "per_second", "step_time", "total_flos")


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """No hub, and one thread: the models are so small that waking a second one costs more."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    trl_integration.unpatch()


def assert_same_log(got: list[dict], want: list[dict]) -> None:
    assert len(got) == len(want) > 1
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.keys() == b.keys()
        for key in b:
            if not any(word in key for word in TIMES):
                # a loss of 0 is a sum of advantages that cancel: compared on the advantages' scale
                near = pytest.approx(b[key], rel=COMPARED, abs=2e-6, nan_ok=True)
                assert a[key] == near, f"{key} at step {step}"


def native_and_patched(run, *, policy_loss=False, **settings) -> trl_integration.Patch:
    """Compares the logs; with the policy loss replaced too, once more."""
    want = run(**settings)
    for ours in (False, True) if policy_loss else (False,):
        with trl_integration.patch(policy_loss=ours) as patched:
            assert_same_log(run(**settings), want)
    return patched


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
# every loss with every beta and level; accumulation and iterations take turns, so that each of
# their four pairs meets every loss, every beta and every level
GRPO = [
    (loss_type, *((1, 1), (1, 2), (2, 1), (2, 2))[(i + j) % 4], beta, level)
    for i, loss_type in enumerate(LOSSES)
    for j, (beta, level) in enumerate(itertools.product((0.0, 0.04), ("token", "sequence")))
]


@pytest.mark.parametrize("loss_type, accumulation, iterations, beta, level", GRPO)
def test_grpo_trains_the_same(loss_type, accumulation, iterations, beta, level):
    patched = native_and_patched(
        trl_runs.grpo,
        policy_loss=True,
        loss_type=loss_type,
        gradient_accumulation_steps=accumulation,
        beta=beta,
        importance_sampling_level=level,
        num_iterations=iterations,
        # of cispo the bound of the ratio itself: below 1, its default, it is none
        **({"epsilon_high": 5.0} if loss_type == "cispo" else {}),
    )
    assert patched.calls["_ChunkedLogProbFunction"] >= 2 * accumulation
    assert patched.calls["GRPOTrainer._compute_loss"] == 2 * accumulation


@pytest.mark.parametrize("loss_type", ("sigmoid", "ipo", "hinge", "apo_zero"))
def test_dpo_trains_the_same(loss_type):
    patched = native_and_patched(trl_runs.dpo, loss_type=loss_type)
    assert patched.calls["_ChunkedLogProbFunction"] == 2 * 2  # policy and reference, two steps


def test_dpo_with_the_wpo_weight_falls_back_to_trl():
    native_and_patched(trl_runs.dpo, use_weighting=True)


def test_sft_trains_the_same():
    patched = native_and_patched(trl_runs.sft)
    assert patched.calls["_ChunkedLogProbFunction"] == 2


def test_functions_of_logits():
    import trl.trainer.utils as utils

    torch.manual_seed(0)
    logits, index = torch.randn(3, 5, 97), torch.randint(97, (3, 5))
    mask = torch.rand(3, 5) < 0.7
    want = utils.selective_log_softmax_and_entropy(logits, index, temperature=0.7, row_mask=mask)
    several = utils.selective_log_softmax(logits, index[..., None].expand(3, 5, 2))
    with trl_integration.patch() as patched:
        got = utils.selective_log_softmax_and_entropy(logits, index, temperature=0.7, row_mask=mask)
        torch.testing.assert_close(got, want)
        plain = utils.selective_log_softmax(logits, index)
        torch.testing.assert_close(plain, several[..., 0])
        torch.testing.assert_close(
            utils.selective_log_softmax(logits, index[..., None].expand(3, 5, 2)), several
        )
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(utils.entropy_from_logits(logits), entropy)
    assert patched.calls["selective_log_softmax"] == 2


def test_every_binding_is_replaced_and_restored():
    import trl.trainer.utils as utils

    elsewhere = types.ModuleType("trl.bound_it_earlier")
    elsewhere.selective_log_softmax = original = utils.selective_log_softmax
    sys.modules[elsewhere.__name__] = elsewhere
    try:
        patched = trl_integration.patch()
        assert trl_integration.patch() is patched  # twice is harmless
        assert elsewhere.selective_log_softmax is utils.selective_log_softmax is not original
        assert "trl.bound_it_earlier.selective_log_softmax" in patched.changed
        trl_integration.unpatch()
        assert elsewhere.selective_log_softmax is utils.selective_log_softmax is original
        trl_integration.unpatch()
    finally:
        del sys.modules[elsewhere.__name__]


def test_the_policy_loss_is_added_and_restored():
    from trl import GRPOTrainer

    original = GRPOTrainer._compute_loss
    patched = trl_integration.patch()
    assert GRPOTrainer._compute_loss is original
    assert trl_integration.patch(policy_loss=True) is patched
    assert GRPOTrainer._compute_loss is not original
    assert "trl.trainer.grpo_trainer.GRPOTrainer._compute_loss" in patched.changed
    trl_integration.unpatch()
    assert GRPOTrainer._compute_loss is original


def test_an_unknown_version_changes_nothing(monkeypatch):
    import trl.trainer.utils as utils

    original = utils.selective_log_softmax
    monkeypatch.setattr(trl_integration, "version", lambda _: "1.99.0")
    with pytest.raises(
        RuntimeError, match=r"TRL 1\.99\.0 is not among the versions tested \(1\.16\)"
    ):
        trl_integration.patch()
    assert utils.selective_log_softmax is original
    with trl_integration.patch(allow_untested=True) as patched:
        assert patched.active


def test_a_moved_name_changes_nothing(monkeypatch):
    import trl.trainer.utils as utils

    original = utils.selective_log_softmax
    monkeypatch.setattr(utils, "entropy_from_logits", lambda logits, chunks: logits)
    with pytest.raises(
        RuntimeError,
        match=r"expected .*entropy_from_logits\(logits, chunk_size\), found .*\(logits, chunks\)",
    ):
        trl_integration.patch()
    assert utils.selective_log_softmax is original
    monkeypatch.delattr(utils, "entropy_from_logits")
    with pytest.raises(RuntimeError, match="has no entropy_from_logits"):
        trl_integration.patch()
    assert utils.selective_log_softmax is original
