"""Every formula of the lecture with its worked example, on every backend that has the op.

The names say which section; ``docs/lecture.md`` is the same as a tour.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyllmtune import (
    beam_search,
    beam_step,
    dpo_loss,
    filter_logits,
    gae,
    greedy,
    group_advantages,
    grpo_loss,
    keyword_reward,
    kl_divergence,
    ppo_clip_loss,
    preference_loss,
    preference_pairs,
    reinforce_loss,
    sample,
    score_answers,
    temperature_softmax,
    token_logprobs,
)
from pyllmtune.demo import lecture_pictures
from tests.helpers import BACKENDS, use

E = math.e


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return use(request.param)


def close(got: Tensor, want: object) -> None:
    """To six digits, those of the lecture's numbers."""
    want = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.detach().double(), want, rtol=1e-6, atol=1e-6)


# 2.1  zero-shot and few-shot: P(y|x) = exp(logit(y|x)) / sum over y' of exp(logit(y'|x))


def test_2_1_the_probability_of_an_answer(backend):
    close(
        temperature_softmax(torch.tensor([[3.0, 1.0]]), backend=backend),
        [[E**3 / (E**3 + E), E / (E**3 + E)]],
    )
    close(temperature_softmax(torch.tensor([[3.0, 1.0]]), backend=backend)[0, 0], 0.880797)


def test_2_1_few_shot_is_the_same_score_after_examples(backend):
    """A model that repeats the answer shown last: alone it cannot tell, after examples it can."""
    yes, no, ask = 1, 2, 3

    def model(tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 4)
        for row, ids in enumerate(tokens.tolist()):
            for t in range(len(ids)):
                shown = [token for token in ids[: t + 1] if token in (yes, no)]
                if shown:
                    logits[row, t, shown[-1]] = 2.0
        return logits

    answers = [torch.tensor([yes]), torch.tensor([no])]
    zero_shot = score_answers(model, torch.tensor([ask]), answers, backend=backend)
    close(zero_shot.softmax(-1), [0.5, 0.5])
    examples = torch.tensor([ask, yes, ask, yes, ask])
    few_shot = score_answers(model, examples, answers, backend=backend)
    close(few_shot.softmax(-1), [E**2 / (E**2 + 1), 1 / (E**2 + 1)])


# 2.2  decoding: temperature, greedy, beam search, top-k, nucleus


def test_2_2_temperature(backend):
    z = torch.tensor([[2.0, 1.0, 0.0]])

    def at(temperature: float) -> Tensor:
        return temperature_softmax(z, temperature, backend=backend)

    for temperature in (0.5, 1.0, 2.0):
        weights = [E ** (value / temperature) for value in (2, 1, 0)]
        close(at(temperature), [[weight / sum(weights) for weight in weights]])
    assert at(0.5)[0, 0] > at(1.0)[0, 0] > at(2.0)[0, 0]  # sharper, flatter
    assert torch.equal(at(0.0), torch.tensor([[1.0, 0.0, 0.0]]))  # the limits
    close(at(1e-3), [[1.0, 0.0, 0.0]])
    torch.testing.assert_close(at(1e6), torch.full((1, 3), 1 / 3))


def test_2_2_greedy_takes_the_first_of_the_most_probable(backend):
    z = torch.tensor([[0.0, 2.0, 1.0], [1.0, 3.0, 3.0], [5.0, 5.0, 5.0]])
    assert greedy(z, backend=backend).tokens.tolist() == [1, 1, 0]


# the next token's probabilities after 0, 1, 2, 3; token 3 ends an answer
NEXT = torch.tensor(
    [[0.0, 0.6, 0.4, 0.0], [0.3, 0.3, 0.3, 0.1], [0.05, 0.05, 0.0, 0.9], [0.0, 0.0, 0.0, 1.0]]
)


def test_2_2_beam_search_finds_what_greedy_misses(backend):
    """Greedy takes 1 (0.6) and is left with 0.3; a width of 3 finds 2, then the end: 0.36."""

    def search(num_beams: int):
        return beam_search(
            lambda tokens, cache: NEXT[tokens[:, -1]].log(),
            torch.tensor([[0]]),
            num_beams=num_beams,
            max_length=2,
            eos_token_id=3,
            backend=backend,
        )

    greedy_path, best = search(1), search(3)
    assert greedy_path.tokens.tolist() == [[[1, 0]]]
    close(greedy_path.scores.exp(), [[0.6 * 0.3]])
    assert best.tokens.tolist() == [[[2, 3]]]
    close(best.scores, [[math.log(0.4) + math.log(0.9)]])  # score(y) = sum of log P
    every = [(a, b) for a in range(4) for b in range(4) if a != 3]
    assert max(every, key=lambda ab: float(NEXT[0, ab[0]] * NEXT[ab])) == (2, 3)


def test_2_2_beam_search_keeps_the_three_best_prefixes_at_each_step(backend):
    scores = torch.tensor([[0.5, 0.3, 0.2]]).log()  # of three prefixes
    p = torch.tensor([[0.5, 0.3, 0.2], [0.8, 0.1, 0.1], [0.4, 0.3, 0.3]])
    step = beam_step(p.log(), scores, num_beams=3, num_candidates=3, backend=backend)
    close(step.scores.exp(), [[0.25, 0.24, 0.15]])
    assert step.parents.tolist() == [[0, 1, 0]] and step.tokens.tolist() == [[0, 0, 1]]


def drawn(logits: Tensor, backend: str, **filters: float) -> Tensor:
    """Tokens of one row: 4000 draws, of which slow backends repeat the first, to the token."""
    number = {"triton": 4, "emulated": 30}.get(backend, 4000)

    def draw(draws: int, backend: str) -> Tensor:
        rows, seed = torch.zeros(draws, dtype=torch.int64), torch.arange(draws)
        return sample(logits, row_indices=rows, seed=seed, backend=backend, **filters).tokens

    tokens = draw(4000, "reference")
    assert torch.equal(draw(number, backend), tokens[:number])
    return tokens


def test_2_2_top_k_draws_among_the_k_best_in_proportion(backend):
    z, k = torch.randn(1, 40), 10
    best = z[0].topk(k).indices.sort().values
    kept = filter_logits(z, top_k=k, backend=backend)[0].isfinite()
    assert torch.equal(kept.nonzero()[:, 0], best)
    counts = drawn(z, backend, top_k=k).bincount(minlength=40).double()
    assert counts[best].sum() == counts.sum()
    expected = counts.sum() * z[0, best].double().softmax(-1)
    chi_square = ((counts[best] - expected) ** 2 / expected).sum()
    assert chi_square < 27.9  # the 0.1 % tail of chi-square with 9 degrees of freedom


def test_2_2_nucleus_keeps_the_smallest_set_that_reaches_p(backend):
    p = torch.tensor([[0.36, 0.25, 0.15, 0.09, 0.06, 0.05, 0.04]])  # the first five: 0.91
    kept = filter_logits(p.log(), top_p=0.9, backend=backend)
    assert kept.isfinite().tolist() == [[True] * 5 + [False] * 2]
    close(kept.softmax(-1)[:, :5], p[:, :5].double() / 0.91)
    out = sample(p.log(), top_p=0.9, seed=0, return_stats=True, backend=backend)
    assert out.num_kept == 5
    close(out.kept_mass, [0.91])
    assert set(drawn(p.log(), backend, top_p=0.9).tolist()) == set(range(5))


# 3.1  preference tuning: L = -log sigma(log P(y+|x) - log P(y-|x))


def test_3_1_preference_tuning():
    gap = torch.tensor(-2.0) - torch.tensor(-3.0)
    close(torch.sigmoid(gap), 0.731059)
    close(preference_loss(torch.tensor([-2.0]), torch.tensor([-3.0])), 0.313262)


# 3.2  RLHF: ranked answers, and the policy gradient


def test_3_2_three_ranked_answers_are_three_pairs():
    a, b, c = range(3)
    pairs = preference_pairs(torch.tensor([1, 2, 3]))  # A > B > C
    assert list(zip(*(side.tolist() for side in pairs), strict=True)) == [(a, b), (a, c), (b, c)]
    scores = torch.tensor([2.0, 1.0, 0.0])
    loss = preference_loss(scores[pairs.chosen], scores[pairs.rejected], reduction="none")
    close(loss, [math.log1p(E**-1), math.log1p(E**-2), math.log1p(E**-1)])


def test_3_2_reinforce_weights_the_gradient_by_probability_and_reward(backend):
    reward, pi = 3.0, torch.tensor([0.2, 0.8])
    logits = pi.log().requires_grad_()

    def gradient(action: int) -> Tensor:
        """Of R log pi(action), by our loss."""
        logprob = logits.log_softmax(-1)[action].view(1, 1)
        loss = reinforce_loss(logprob, torch.tensor([reward]), backend=backend).loss
        return -torch.autograd.grad(loss, logits)[0]

    closed_form = reward * (torch.tensor([1.0, 0.0]) - pi)  # R (1[a] - pi)
    close(gradient(0), closed_form)
    close(pi[0] * gradient(0), 0.2 * reward * (torch.tensor([1.0, 0.0]) - pi))
    (want,) = torch.autograd.grad(
        logits.softmax(-1)[0] * reward, logits
    )  # J, action 1 pays nothing
    close(pi[0] * gradient(0), want)


# 4.1  PPO: ratio, clip, advantage


def at_ratio(ratio: float, advantage: float, backend: str) -> tuple[Tensor, Tensor]:
    """PPO's objective (the negative loss) and its gradient in the log-prob."""
    logprob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    old = torch.zeros(1, 1)
    loss = ppo_clip_loss(logprob, old, torch.tensor([advantage]), eps=0.2, backend=backend).loss
    loss.backward()
    return -loss, -logprob.grad[0, 0]


def test_4_1_the_ratio(backend):
    new, old = torch.tensor([[0.12]]).log(), torch.tensor([[0.10]]).log()
    out = ppo_clip_loss(new, old, torch.tensor([1.0]), eps=0.5, backend=backend)
    close(-out.loss, 1.2)
    assert out.metrics.to_dict()["ratio_mean"] == pytest.approx(0.12 / 0.10, rel=1e-6)


def test_4_1_the_clipped_objective(backend):
    value, gradient = at_ratio(1.5, 1.0, backend)
    close(value, 1.2)
    assert gradient == 0
    value, gradient = at_ratio(1.5, -1.0, backend)
    close(value, -1.5)
    close(gradient, -1.5)
    value, gradient = at_ratio(0.5, 1.0, backend)
    close(value, 0.5)
    close(gradient, 0.5)
    value, gradient = at_ratio(0.5, -1.0, backend)
    close(value, -0.8)
    assert gradient == 0


def test_4_1_generalised_advantages(backend):
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.5, 1.0]])

    def advantages(gamma: float, lam: float) -> Tensor:
        return gae(rewards, values, gamma=gamma, lam=lam, backend=backend).advantages

    close(advantages(1.0, 1.0), [[3.0 - 0.5, 2.0 - 1.5, 2.0 - 1.0]])  # return minus V
    deltas = [1.0 + 0.9 * 1.5 - 0.5, 0.9 * 1.0 - 1.5, 2.0 - 1.0]
    close(advantages(0.9, 0.0), [deltas])
    close(
        advantages(0.9, 0.5),
        [[sum(0.45**l * deltas[t + l] for l in range(3 - t)) for t in range(3)]],
    )


# 4.2  DPO: L = -log sigma(beta D), D = log P(y+) - log P(y-)


def test_4_2_dpo():
    pair = torch.tensor([-2.0]), torch.tensor([-3.0])
    close(dpo_loss(*pair, beta=2.0), 0.126928)
    reference = torch.tensor([-2.5]), torch.tensor([-2.5])
    close(dpo_loss(*pair, *reference, beta=2.0), 0.126928)  # it finds both equally probable
    close(dpo_loss(*pair, *pair, beta=2.0), math.log(2))  # nothing learned yet


# 4.3  GRPO: A_i = r_i - mean(r), ratio to the reference, exact KL


def test_4_3_group_advantages():
    rewards = torch.tensor([0.9, 0.5, 0.2])
    advantages = group_advantages(rewards, group_size=3, scale="none")
    close(advantages, [0.366667, -0.033333, -0.333333])
    others = torch.tensor([0.9, 0.1])  # mean 0.5
    close(group_advantages(others, group_size=2, scale="none")[0], 0.4)


def test_4_3_the_ratio_times_the_advantage(backend):
    new, reference = torch.tensor([[0.15]]).log(), torch.tensor([[0.10]]).log()
    out = grpo_loss(new, reference, torch.tensor([0.4]), preset="lecture", backend=backend)
    close(-out.loss, 0.6)


def test_4_3_exact_kl_over_the_vocabulary(backend):
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.25, 0.25, 0.5]])
    want = 0.5 * math.log(2) + 0.3 * math.log(0.3 / 0.25) + 0.2 * math.log(0.2 / 0.5)
    close(kl_divergence(p.log(), q.log(), backend=backend), [want])
    close(kl_divergence(p.log(), p.log(), backend=backend), [0.0])


def test_4_3_the_whole_loss(backend):
    """-1/G sum of ratio times A, unclipped, plus 0.1 KL(pi || pi_ref): value and gradient."""
    logits, ref = torch.randn(3, 1, 5), torch.randn(3, 1, 5)
    tokens, rewards = torch.tensor([[1], [4], [0]]), torch.tensor([0.9, 0.5, 0.2])
    ours, plain = logits.clone().requires_grad_(), logits.double().requires_grad_()

    new = token_logprobs(ours, tokens, backend=backend).logprobs
    old = token_logprobs(ref, tokens, backend=backend).logprobs
    advantages = group_advantages(rewards, group_size=3, scale="none")
    policy = grpo_loss(new, old, advantages, preset="lecture", backend=backend).loss
    loss = policy + 0.1 * kl_divergence(ours, ref, backend=backend).mean()

    log_p, log_q = plain.log_softmax(-1), ref.double().log_softmax(-1)
    ratio = (log_p - log_q).gather(-1, tokens[..., None]).exp()[:, 0, 0]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    better = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64) - 1.6 / 3
    want = -(ratio * better).mean() + 0.1 * kl
    close(loss, want)
    loss.backward()
    want.backward()
    close(ours.grad, plain.grad)


# 4.3.1  reasoning is rewarded by its words


def test_4_3_1_keywords_of_reasoning():
    keywords = ["потому что", "следовательно", "шаг 1"]
    answers = ["Шаг 1: 2 + 2 = 4, следовательно, ответ 4", "ответ 4"]
    assert keyword_reward(answers, keywords).tolist() == [2.0, 0.0]


def test_4_3_1_hidden_reasoning_is_left_out_of_a_loss_or_in_it(backend):
    """The mask says which tokens count: all that the model wrote, or the visible ones."""
    logprobs = torch.tensor([[-1.0, -2.0, -0.5]])
    reward, visible = torch.tensor([1.0]), torch.tensor([[False, False, True]])
    close(reinforce_loss(logprobs, reward, backend=backend).loss, 3.5)
    close(reinforce_loss(logprobs, reward, visible, backend=backend).loss, 0.5)


def test_the_picture_of_the_clipped_objective_is_its_formula():
    ratio = torch.linspace(0.4, 1.7, 14)
    for advantage in (1.0, -1.0):
        value, slope = lecture_pictures.objective(ratio, advantage)
        want = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        close(value, want.double())
        flat = ratio > 1.2 if advantage > 0 else ratio < 0.8
        close(slope, torch.where(flat, 0.0, advantage).double())


def test_the_pictures_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    paths = lecture_pictures.draw(tmp_path)
    assert sorted(path.name for path in paths) == sorted(
        path.name for path in (Path(__file__).parent.parent / "docs").glob("lecture_*.png")
    )
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
