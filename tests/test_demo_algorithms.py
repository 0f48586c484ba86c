"""The demo's algorithms: ours against eager PyTorch, what gets credit, and that each learns."""

from __future__ import annotations

import pytest
import torch

import pyllmtune
from pyllmtune.demo import dpo, eager_dpo, eager_ppo, ppo, settings
from pyllmtune.demo.algorithms import NAMES, algorithm
from pyllmtune.demo.lockstep import Lockstep
from pyllmtune.demo.loop import Run, RunSettings, rewards
from pyllmtune.demo.losses import Objective, Sampled
from pyllmtune.demo.model import ModelConfig, Transformer
from pyllmtune.demo.rollout import Outputs, answer_outputs, answer_seeds, generate, pad_left
from pyllmtune.demo.task import make_split, zero_shot
from pyllmtune.demo.vocabulary import PAD, decode_rows

SMALL = ModelConfig(width=32, layers=1, heads=2, max_length=64)
SPLIT = make_split(validation=16, held_out=16)


def run_of(name: str, library: int = 0, **options: object) -> Run:
    torch.manual_seed(5)
    objective, libraries = algorithm(name, "grpo", kl_coef=0.02, entropy_coef=0.01)
    shared = RunSettings(objective, seed=0, keyword_weight=1.0, top_p=0.8, **options)
    return Run(Transformer(SMALL), libraries[library], shared, SPLIT.train)


def sampled() -> Sampled:
    """Answers of 1 to 6 tokens in groups of 4; some rewards of a group are equal."""
    rows, length = 12, 6
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1))
    tokens = torch.where(mask, torch.randint(2, 18, (rows, length)), PAD)
    old, ref = (-torch.rand(rows, length) * mask for _ in range(2))
    values = torch.randn(rows, length)
    return Sampled(tokens, mask, old, ref, None, torch.randint(3, (rows,)).float(), 4, values)


def test_an_answer_is_paid_once_at_its_last_token():
    rollout = sampled()
    paid = rollout.token_rewards
    assert torch.equal(paid.sum(1), rollout.reward)
    last = rollout.mask.sum(1) - 1
    assert torch.equal(paid[torch.arange(12), last], rollout.reward)


def test_eager_credit_equals_ours():
    rollout = sampled()
    ours, other = (side.credit(rollout, Objective()) for side in (ppo, eager_ppo))
    for name in ("advantages", "returns"):
        torch.testing.assert_close(getattr(ours, name), getattr(other, name), rtol=1e-5, atol=1e-6)
    pairs = [
        set(zip(*(rows.tolist() for rows in side.credit(rollout, Objective()).pairs), strict=True))
        for side in (dpo, eager_dpo)
    ]
    assert pairs[0] == pairs[1] and len(pairs[0]) > 5
    assert all(rollout.reward[i] > rollout.reward[j] and i // 4 == j // 4 for i, j in pairs[0])


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_eager_pytorchs(name):
    run = run_of(name, steps=9, questions=4, group_size=4)
    watch = Lockstep(*algorithm(name, "grpo", 0.02, 0.01).libraries, run.settings.objective)
    record = run.step(1, watch)
    assert watch.updates == run.settings.objective.updates
    assert watch.passed and watch.gradient_difference > 0  # two programs, not one twice
    other = run_of(name, library=1, steps=9, questions=4, group_size=4).step(1)
    assert record == pytest.approx(other, rel=1e-4, abs=1e-6, nan_ok=True)


def test_reinforce_is_reinforce_loss():
    objective, (library, _) = algorithm("reinforce", "grpo", kl_coef=0.0, entropy_coef=0.0)
    rollout = sampled()
    batch = library.credit(rollout, objective)._replace(old_logprobs=None)
    logits = torch.randn(12, 6, 18)
    grads, values = [], []
    for ours in (True, False):
        leaf = logits.clone().requires_grad_()
        if ours:
            scored = pyllmtune.token_logprobs(leaf, batch.tokens, mask=batch.mask).logprobs
            value = pyllmtune.reinforce_loss(scored, batch.advantages, batch.mask).loss
        else:
            value = library.loss(Outputs(leaf, None), batch, objective).value
        value.backward()
        grads.append(leaf.grad)
        values.append(value.detach())
    assert torch.equal(*values) and torch.equal(*grads) and grads[0].any()


def score_of(run: Run) -> float:
    """Mean reward of 128 answers that the policy samples, always with the same random numbers."""
    questions = SPLIT.train[:16]
    asked = pad_left([zero_shot(question) for question in questions])
    seeds = answer_seeds(9, 9, 128)
    tokens = generate(run.policy, asked, 24, copies=8, seeds=seeds).tokens
    right, keywords = rewards(questions, decode_rows(tokens.tolist()))
    return (right + keywords).mean().item()


@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name):
    """From random weights, the keywords: the policy that was trained writes more of them."""
    run = run_of(name, steps=12, questions=8, group_size=8, learning_rate=1e-2)
    before = score_of(run)
    for step in range(1, 13):
        run.step(step)
    after = score_of(run)
    assert after > before + 0.2, f"{before} to {after}"
    if name == "dpo":
        first, *_, last = run.records
        assert last.preferred > 0.6 and first.kl < last.kl
    if name == "ppo":
        assert run.policy.critic.bias.item() > 0.05  # rewards are positive


def test_the_critic_begins_at_zero_and_leaves_the_policy_alone():
    torch.manual_seed(0)
    model = Transformer(SMALL)
    prompts, answers = pad_left(["\n47+38=", "\n72-38="]), torch.full((2, 3), 5)
    before = answer_outputs(model, prompts, answers)
    model.add_critic()
    after = answer_outputs(model, prompts, answers)
    assert before.values is None and torch.equal(after.values, torch.zeros(2, 3))
    assert torch.equal(before.logits, after.logits)


def test_options(capsys):
    assert settings.parse(["--algorithm", "ppo"]).title == "PPO"
    assert settings.parse(["--loss", "gspo"]).algorithm == "grpo"
    with pytest.raises(SystemExit):
        settings.parse(["--algorithm", "dpo", "--loss", "gspo"])
    assert "--loss belongs to --algorithm grpo, got dpo" in capsys.readouterr().err
