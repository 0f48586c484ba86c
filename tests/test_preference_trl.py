"""Preference losses and rewards against the code of TRL's own trainers, called with log-probs."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pyllmtune import cpo_loss, dpo_loss, kto_loss, orpo_loss, preference_loss, simpo_loss
from pyllmtune.losses.dpo_types import SCORED, TYPES
from pyllmtune.rewards import overlong_penalty, regex_reward
from tests import helpers

B, T = 5, 7
BETA, SMOOTHING, TAU, ALPHA = 0.4, 0.1, 0.5, 1.6


@pytest.fixture(autouse=True)
def _trl():
    helpers.need("trl")


class Accelerator:
    """One process."""

    device = torch.device("cpu")

    def gather(self, value: Tensor) -> Tensor:
        return value

    gather_for_metrics = gather


def answers() -> tuple[Tensor, Tensor]:
    """Log-probs of 2B answers after a prompt of one token, ``[2B, T]``, and their mask."""
    mask = torch.arange(T) < torch.randint(1, T + 1, (2 * B, 1))
    return torch.where(mask, -2 * torch.rand(2 * B, T), 0.0), mask


def model_of(logprobs: Tensor) -> object:
    """A model whose fused head found these log-probs."""
    zeros = torch.zeros_like(logprobs)
    output = SimpleNamespace(
        log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )

    class Model:
        training = True

        def __call__(self, **_: object) -> object:
            return output

    return Model()


def trl_dpo(options: dict, logprobs: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer = SimpleNamespace(
        model=model_of(logprobs),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type=options["f_divergence"],
        f_alpha_divergence_coef=options["alpha"],
        loss_types=[options["loss_type"]],
        loss_weights=[1.0],
        beta=options["beta"],
        label_smoothing=options["label_smoothing"],
        args=SimpleNamespace(discopop_tau=options["discopop_tau"]),
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen, rejected = ref.sum(-1).chunk(2)
    inputs = {
        "input_ids": torch.zeros(2 * B, T + 1, dtype=torch.long),
        "completion_mask": torch.cat((torch.zeros(2 * B, 1), mask), dim=1).long(),
        "attention_mask": torch.ones(2 * B, T + 1),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    return DPOTrainer._compute_loss(trainer, trainer.model, inputs, return_outputs=False)


def cases() -> list[tuple[str, str]]:
    divergences = ("forward_kl", "js_divergence", "alpha_divergence")
    return [(name, "reverse_kl") for name in TYPES] + [
        (name, divergence) for name in TYPES if name in SCORED for divergence in divergences
    ]


@pytest.mark.parametrize("case", cases(), ids="-".join)
def test_dpo_is_trls(case):
    (logprobs, mask), ref = answers(), answers()[0]
    ref = torch.where(mask, ref - 0.5, 0.0)
    # TRL reads label_smoothing in these alone: its sigmoid ignores it
    smoothed = case[0] in ("exo_pair", "robust", "aot", "aot_unpaired")
    options = {
        "loss_type": case[0],
        "f_divergence": case[1],
        "beta": BETA,
        "alpha": ALPHA,
        "label_smoothing": SMOOTHING if smoothed else 0.0,
        "discopop_tau": TAU,
    }
    theirs, ours = (logprobs.clone().requires_grad_() for _ in range(2))
    want = trl_dpo(options, theirs, ref, mask)
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), mask.sum(-1).chunk(2), strict=True))
    got = dpo_loss(*ours.sum(-1).chunk(2), *ref.sum(-1).chunk(2), **options, **lengths)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    got.backward()
    want.backward()
    selected = mask if case[0] != "sft" else mask & (torch.arange(2 * B) < B)[:, None]
    torch.testing.assert_close(ours.grad[selected], theirs.grad[selected], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("shift", [0.3, -0.8], ids=["kl", "kl-below-0"])
def test_kto_is_trls(loss_type, shift):
    from trl.trainer.kto_trainer import KTOTrainer

    (logprobs, mask), (ref, _) = answers(), answers()
    ref = torch.where(mask, ref, 0.0)
    labels = torch.tensor([True, False] * B)
    ref_kl = torch.randn(2 * B)
    kl = ref_kl + shift + 0.1 * torch.randn(2 * B)
    theirs, ours = (logprobs.clone().requires_grad_() for _ in range(2))
    trainer = SimpleNamespace(
        model=model_of(theirs),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        beta=BETA,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        _compute_kl_logps=lambda *_: kl,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "label": labels,
        "input_ids": torch.zeros(2 * B, T + 1, dtype=torch.long),
        "completion_mask": torch.cat((torch.zeros(2 * B, 1), mask), dim=1).long(),
        "attention_mask": torch.ones(2 * B, T + 1),
        "ref_logps": ref.sum(-1),
        "ref_KL_logps": ref_kl,
    }
    want = KTOTrainer._compute_loss(trainer, trainer.model, inputs, return_outputs=False)
    got = kto_loss(
        ours.sum(-1),
        labels,
        ref.sum(-1),
        mismatched_logratios=kl - ref_kl if loss_type == "kto" else None,
        beta=BETA,
        desirable_weight=1.5,
        undesirable_weight=0.5,
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    got.backward()
    want.backward()
    torch.testing.assert_close(ours.grad[mask], theirs.grad[mask], rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore")  # the experimental trainers announce themselves
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo", "alphapo"])
def test_cpo_and_simpo_are_trls(loss_type):
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    logprobs, mask = answers()
    (chosen, rejected), lengths = logprobs.sum(-1).chunk(2), mask.sum(-1).chunk(2)
    preferred = loss_type in ("simpo", "alphapo")
    trainer = SimpleNamespace(
        accelerator=Accelerator(),
        alpha=0.25 if loss_type == "alphapo" else 0.0,
        loss_type="simpo" if preferred else loss_type,
        simpo_gamma=0.6,
        beta=1.7,
        label_smoothing=SMOOTHING if loss_type in ("sigmoid", "simpo") else 0.0,
    )
    smoothing = {"label_smoothing": trainer.label_smoothing}
    if preferred:
        means = chosen / lengths[0], rejected / lengths[1]
        options = {"beta": 1.7, "gamma": 0.6, "alpha": trainer.alpha, **smoothing}
        got = simpo_loss(chosen, rejected, *lengths, **options, reduction="none")
    else:
        means = chosen, rejected
        options = {"beta": 1.7, "loss_type": loss_type, "nll_coef": 0.0, **smoothing}
        got = cpo_loss(chosen, rejected, lengths[0], **options, reduction="none")
    want = CPOTrainer.cpo_loss(trainer, *means)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_orpo_is_trls():
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    logprobs, mask = answers()
    (chosen, rejected), lengths = logprobs.sum(-1).chunk(2), mask.sum(-1).chunk(2)
    trainer = SimpleNamespace(accelerator=Accelerator(), beta=0.3)
    means = (total / n for total, n in zip((chosen, rejected), lengths, strict=True))
    want = -ORPOTrainer.odds_ratio_loss(trainer, *means)[0]
    got = orpo_loss(chosen, rejected, *lengths, beta=0.3, nll_coef=0.0, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_reward_model_loss_is_trls():
    """RewardTrainer: with a margin and centring."""
    from trl.trainer.reward_trainer import RewardTrainer

    rewards, margin = torch.randn(2 * B), torch.rand(B)
    output = SimpleNamespace(logits=rewards[:, None])
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(),
        args=SimpleNamespace(center_rewards_coefficient=0.05),
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(2 * B, 3), "margin": margin}
    want = RewardTrainer.compute_loss(trainer, lambda **_: output, inputs)
    got = preference_loss(*rewards.chunk(2), margin=margin, center=0.05)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_rewards_are_trls():
    from trl.rewards import get_soft_overlong_punishment, think_format_reward

    lengths = [1, 79, 80, 81, 90, 100, 101, 500]
    for buffer in (20, 100, 0):
        theirs = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=buffer)
        want = torch.tensor(theirs([[0] * n for n in lengths]))
        torch.testing.assert_close(overlong_penalty(torch.tensor(lengths), 100, buffer), want)
    texts = [
        "<think>\na\n</think>\nb",
        "<think>a</think>",
        "<think>a",
        "x<think>a</think>",
        "<think>a<think>b</think>c",
        "",
    ]
    want = torch.tensor(think_format_reward([[{"content": text}] for text in texts]))
    assert torch.equal(regex_reward(texts, r"<think>(?!.*<think>).*?</think>.*"), want)
    assert want.tolist() == [1, 1, 0, 0, 0, 0]
