"""The TRL presets against TRL's own loss: ``_compute_loss`` of its trainers, called on a stub that
has what it reads.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from pyllmtune import PolicyLossConfig, policy_loss
from pyllmtune.losses.off_policy import off_policy_sequence_mask, top_entropy_mask
from tests import helpers

B, T, MAX_LENGTH = 4, 7, 10
ACCUMULATION, PER_GENERATION, ITEMS = 2, 4, 61
EPS = {"eps_low": 0.2, "eps_high": 0.28}
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


@pytest.fixture(autouse=True)
def _trl():
    helpers.need("trl")


class Accelerator:
    """One process at the end of an accumulation."""

    num_processes, sync_gradients = 1, True

    def gather(self, value: Tensor) -> Tensor:
        return value

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        return value

    def pad_across_processes(self, value: Tensor, **_: object) -> Tensor:
        return value


def batch() -> dict[str, Tensor]:
    """Rows of different lengths, log-ratios on both sides of the bounds."""
    lp = -3 * torch.rand(B, T)
    mask = torch.arange(T) < torch.tensor([7, 3, 1, 5])[:, None]
    return {
        "lp": lp,
        "old": lp + 0.4 * torch.randn(B, T),
        "ref": lp + 0.3 * torch.randn(B, T),
        "rollout": lp + 0.4 * torch.randn(B, T),
        "entropy": torch.rand(B, T),
        "advantages": torch.tensor([1.0, -0.6, 0.4, -1.3]),
        "mask": mask,
        "weights": torch.where(mask, 0.3 + torch.rand(B, T), 1.0),
    }


def stub_trainer(
    loss_type: str, level: str, options: dict, x: dict[str, Tensor]
) -> SimpleNamespace:
    """What ``GRPOTrainer._compute_loss`` reads of its trainer."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (x["lp"], x["entropy"], None),
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(
            use_bias_correction_kl=options["corrected"],
            delta=options["delta"],
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            vespo_k_pos=2.0,
            vespo_lambda_pos=3.0,
            vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
            steps_per_generation=PER_GENERATION,
        ),
        aux_loss_enabled=False,
        top_entropy_quantile=options["top_entropy"],
        off_policy_mask_threshold=options["off_policy"],
        importance_sampling_level=level,
        beta=options["beta"],
        loss_type=loss_type,
        epsilon_low=EPS["eps_low"],
        epsilon_high=5.0 if loss_type == "cispo" else EPS["eps_high"],
        use_vllm=options["weighted"],
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=ACCUMULATION,
        max_completion_length=MAX_LENGTH,
        _entropy_bonus_enabled=options["bonus"] != 0.0,
        use_adaptive_entropy=False,
        entropy_coef=options["bonus"],
        _metrics={"train": defaultdict(list)},
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
    )
    trainer.get_high_entropy_mask = MethodType(GRPOTrainer.get_high_entropy_mask, trainer)
    return trainer


def trainer_inputs(options: dict, x: dict[str, Tensor]) -> dict[str, Tensor]:
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.long),
        "prompt_mask": torch.ones(B, 1, dtype=torch.long),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        "completion_mask": x["mask"].long(),
        "advantages": x["advantages"],
        "old_per_token_logps": x["old"],
        "ref_per_token_logps": x["ref"],
        "sampling_per_token_logps": x["rollout"],
        "num_items_in_batch": torch.tensor(float(ITEMS)),
    }
    if options["weighted"]:
        inputs["importance_sampling_ratio"] = x["weights"]
    return inputs


def trl_loss(loss_type: str, level: str, options: dict, x: dict[str, Tensor]) -> Tensor:
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer = stub_trainer(loss_type, level, options, x)
    return GRPOTrainer._compute_loss(trainer, None, trainer_inputs(options, x))


def our_loss(loss_type: str, level: str, options: dict, x: dict[str, Tensor]) -> Tensor:
    changes = {} if loss_type in ("cispo", "sapo", "vespo") else {**EPS, "cap": options["delta"]}
    if loss_type != "vespo":  # whose ratio is always that of the sequence
        changes["level"] = level
    if options["beta"]:
        changes |= {"kl": "k3", "kl_coef": options["beta"]}
        changes["kl_gradient"] = "ratio" if options["corrected"] else "plain"
    tokens = float(x["mask"].sum())
    normalizer = {
        "bnpo": tokens * ACCUMULATION,
        "dr_grpo": B * MAX_LENGTH * ACCUMULATION,
        **dict.fromkeys(("dapo", "cispo", "vespo"), ITEMS * ACCUMULATION / PER_GENERATION),
    }.get(loss_type, B * ACCUMULATION)
    weights, bonus_mask = torch.ones(B, T), x["mask"]
    if options["weighted"]:
        weights = x["weights"]
    if options["off_policy"] is not None:
        weights = weights * off_policy_sequence_mask(
            x["lp"], x["rollout"], x["advantages"], x["mask"], threshold=options["off_policy"]
        )
    if options["top_entropy"] < 1.0:
        bonus_mask = top_entropy_mask(x["entropy"], x["mask"], fraction=options["top_entropy"])
        weights = weights * bonus_mask
    loss = policy_loss(
        x["lp"],
        x["old"],
        x["advantages"],
        x["mask"],
        ref_logprobs=x["ref"] if options["beta"] else None,
        weights=weights,
        normalizer=normalizer,
        config=PolicyLossConfig.preset(f"trl.{loss_type}", **changes),
    ).loss
    if options["bonus"]:  # TRL's bonus is a mean over tokens, whatever the loss
        mean = torch.where(bonus_mask, x["entropy"], 0.0).sum() / bonus_mask.sum()
        loss = loss - options["bonus"] * mean / ACCUMULATION
    return loss


PLAIN = {
    "beta": 0.0,
    "corrected": False,
    "weighted": False,
    "bonus": 0.0,
    "delta": None,
    "off_policy": None,
    "top_entropy": 1.0,
}


def assert_same(loss_type: str, level: str, options: dict) -> None:
    x = batch()
    leaves = [x[name].requires_grad_() for name in ("lp", "entropy")]
    results = []
    for function in (trl_loss, our_loss):
        loss = function(loss_type, level, {**PLAIN, **options}, x)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append((loss.detach(), [torch.zeros(B, T) if g is None else g for g in grads]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("level", ("token", "sequence"))
def test_preset_equals_grpo_trainer(loss_type, level):
    for beta, weighted, bonus in itertools.product((0.0, 0.04), (False, True), (0.0, 0.02)):
        assert_same(loss_type, level, {"beta": beta, "weighted": weighted, "bonus": bonus})


@pytest.mark.parametrize("loss_type", LOSSES)
def test_corrected_kl_two_sided_clip_and_masks(loss_type):
    """OPSM and the entropy mask multiply the policy term before the KL is added: as weights do."""
    if loss_type == "vespo":  # folds weights into its ratio: masks multiply elsewhere in TRL
        return
    for level in ("token", "sequence"):
        assert_same(loss_type, level, {"beta": 0.04, "corrected": True, "delta": 1.5})
        assert_same(
            loss_type,
            level,
            {"beta": 0.04, "off_policy": 0.05, "top_entropy": 0.5, "bonus": 0.02},
        )


def test_rloo_preset_equals_rloo_trainer():
    from trl.trainer.rloo_trainer import RLOOTrainer

    x = batch()
    x["lp"].requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (x["lp"], x["entropy"], None),
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        epsilon_low=0.2,
        epsilon_high=0.2,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.long),
        "prompt_mask": torch.ones(B, 1, dtype=torch.long),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        "completion_mask": x["mask"].long(),
        "advantages": x["advantages"],
        "old_logps": (x["old"] * x["mask"]).sum(1),
    }
    want = RLOOTrainer._compute_loss(trainer, None, inputs)
    config = PolicyLossConfig.preset("trl.rloo")
    got = policy_loss(x["lp"], x["old"], x["advantages"], x["mask"], normalizer=B, config=config)
    pairs = [(loss, *torch.autograd.grad(loss, x["lp"])) for loss in (got.loss, want)]
    torch.testing.assert_close(*pairs, rtol=1e-5, atol=1e-7)
