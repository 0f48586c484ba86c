"""The demo: task, rewards, sampler, cache, loss against eager PyTorch, and a whole quick run."""

from __future__ import annotations

import csv
import json
import sys

import pytest
import torch

import pyllmtune.demo
from pyllmtune import sample
from pyllmtune.demo import eager, fused, picture, table
from pyllmtune.demo.evaluate import EXAMPLES, accuracy, few_shot_prompts
from pyllmtune.demo.lockstep import TOLERANCE, Lockstep
from pyllmtune.demo.loop import Run, RunSettings, rewards
from pyllmtune.demo.losses import Batch, objectives
from pyllmtune.demo.model import Cache, ModelConfig, Transformer
from pyllmtune.demo.rollout import answer_outputs, answer_seeds, generate, pad_left, without_padding
from pyllmtune.demo.supervised import document
from pyllmtune.demo.task import Question, few_shot, is_right, make_split
from pyllmtune.demo.train import Comparison
from pyllmtune.demo.vocabulary import NEWLINE, PAD, decode, decode_rows, encode
from tests.helpers import use

SMALL = ModelConfig(width=32, layers=2, heads=2, max_length=96)


def unordered(question: Question) -> tuple[int, str, int]:
    low, high = sorted((question.left, question.right))
    return (low, "+", high) if question.sign == "+" else (question.left, "-", question.right)


def test_held_out_questions_are_not_trained_on_even_with_their_operands_swapped():
    split = make_split(validation=256, held_out=512)
    parts = [
        {unordered(q) for q in part} for part in (split.train, split.validation, split.held_out)
    ]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert (len(split.validation), len(split.held_out)) == (256, 512)
    everything = split.train + split.validation + split.held_out
    assert len(everything) == len(set(everything)) == 90 * 90 + 90 * 91 // 2
    assert min(question.value for question in everything) == 0
    prompts = few_shot_prompts(split.held_out[:8], split.train)
    shown = {line.partition("=")[0] for prompt in prompts for line in prompt.split("\n")[1:-1]}
    assert len(shown) == 8 * EXAMPLES
    assert not shown & {question.text[:-1] for question in split.held_out}


@pytest.mark.parametrize(
    ("question", "worked"),
    [
        (Question(47, "+", 38), " step 1: 7+8=15, step 2: 4+3+1=8, therefore 85"),
        (Question(90, "+", 45), " step 1: 0+5=5, step 2: 9+4=13, therefore 135"),
        (Question(72, "-", 38), " step 1: 12-8=4, step 2: 7-3-1=3, therefore 34"),
        (Question(48, "-", 45), " step 1: 8-5=3, step 2: 4-4=0, therefore 3"),
    ],
    ids=lambda value: value.text if isinstance(value, Question) else "",
)
def test_worked_answers(question, worked):
    assert question.worked() == worked
    assert question.solved(worked=True) == question.text + worked + "\n"
    assert question.solved(worked=False) == f"{question.text}{question.value}\n"
    assert decode(encode(question.solved(worked=True))) == question.solved(worked=True)


def test_every_worked_answer_is_right_and_fits():
    split = make_split(validation=0, held_out=0)
    for question in split.train:
        line = question.worked() + "\n"
        assert is_right(question, line)
        assert len(encode(line)) <= 21


def test_rewards_on_hand_cases():
    questions = [Question(47, "+", 38), Question(72, "-", 38)]
    answers = [
        "85\n",
        " step 1: 7+8=15, step 2: 4+3+1=8, therefore 85\n",
        " step 1: 7+8=16, therefore 85\n",  # a wrong step: the reward is of the answer
        "85",  # not finished
        "34\n",
        " step 1: 12-8=4, step 2: 7-3-1=3, therefore 43\n",
        "34 step 1: \n",
        "\n",
    ]
    right, keywords = rewards(questions, answers)
    assert right.tolist() == [1, 1, 1, 0, 1, 0, 0, 0]
    assert torch.equal(keywords * 3, torch.tensor([0.0, 3, 2, 0, 0, 3, 1, 0]))


def test_only_answers_are_learned():
    tokens, answer = document([Question(47, "+", 38), Question(72, "-", 38)], worked=False)
    assert decode(tokens) == "\n47+38=85\n72-38=34\n"
    learned = [token for token, kept in zip(tokens, answer, strict=True) if kept]
    assert decode(learned) == "85\n34\n"


def test_cached_generation_equals_the_full_forward():
    """Left padding, the cache and the copies of a group change no distribution."""
    torch.manual_seed(1)
    model = Transformer(SMALL)
    prompts = ["\n47+38=", few_shot(Question(72, "-", 38), [Question(47, "+", 38)])]
    tokens = pad_left(prompts)
    assert (tokens[0] == PAD).any() and not (tokens[1] == PAD).any()
    copies, length = 3, 12
    seeds = answer_seeds(0, 1, 2 * copies)
    answers, logprobs, _ = generate(model, tokens, length, copies=copies, seeds=seeds)
    with torch.no_grad():
        for row, answer in enumerate(answers):
            alone = torch.tensor([encode(prompts[row // copies])])
            full = answer_outputs(model, alone, answer[None]).logits[0]  # [T, V]
            cache = Cache(SMALL, 1, alone.shape[1] + length)
            cached = [model(alone, cache)[:, -1]]
            cached += [
                model(token.view(1, 1), cache)[:, -1] for token in answer[:-1] if token != PAD
            ]
            cached = without_padding(torch.cat(cached))
            torch.testing.assert_close(cached, full[: len(cached)], rtol=0, atol=1e-5)
            drawn = sample(full, seed=int(seeds[row]), position=torch.arange(len(full)))
            ended = answer == PAD
            assert torch.equal(drawn.tokens[~ended], answer[~ended])
            assert not ended.any() or answer[~ended][-1] == NEWLINE
            # what the sampler calls processed is what the trainer calls log-prob
            scored = fused.score(full[None], answer[None], ~ended[None])[0]
            torch.testing.assert_close(logprobs[row], scored, rtol=0, atol=1e-5)


def test_the_trainer_scores_the_nucleus_that_was_sampled():
    """At a top-p that drops most tokens: both libraries give the sampler's log-probs again."""
    torch.manual_seed(1)
    model, prompts = Transformer(SMALL), pad_left(["\n47+38=", "\n5-3="])
    seeds = answer_seeds(0, 1, 8)
    answers, logprobs, kept = generate(model, prompts, 12, copies=4, seeds=seeds, top_p=0.6)
    mask = answers != PAD
    assert kept.num_rows == answers.numel() and kept.contains(answers)[mask].all()
    assert not kept.counts.view_as(answers)[~mask].any() and kept.counts.max() < SMALL.vocab
    with torch.no_grad():
        logits = answer_outputs(model, prompts.repeat_interleave(4, dim=0), answers).logits
    for library in (fused, eager):
        scored = library.score(logits, answers, mask, kept)
        torch.testing.assert_close(scored, logprobs, rtol=0, atol=1e-5)
    whole = fused.score(logits, answers, mask)
    assert (whole[mask] < logprobs[mask] - 0.1).any()  # what a trainer without the set would use


def test_rollouts_are_reproducible_and_do_not_depend_on_the_batch():
    assert torch.equal(answer_seeds(3, 5, 8), answer_seeds(3, 5, 8))
    assert not torch.equal(answer_seeds(3, 5, 8), answer_seeds(3, 6, 8))
    torch.manual_seed(2)
    model, prompts = Transformer(SMALL), pad_left(["\n47+38=", "\n72-38="])
    seeds = answer_seeds(0, 1, 2)
    once, again = (generate(model, prompts, 8, seeds=seeds) for _ in range(2))
    assert torch.equal(once.tokens, again.tokens)
    alone = generate(model, prompts[1:], 8, seeds=seeds[1:]).tokens
    assert torch.equal(alone[0], once.tokens[1, : alone.shape[1]])


def batch_of_a_moved_policy(dtype: torch.dtype) -> tuple[torch.Tensor, Batch]:
    """Logits and a batch with padding, in which ratios pass both bounds of the clip."""
    rows, length, vocab = 8, 6, 18
    logits = torch.randn(rows, length, vocab, dtype=dtype)
    tokens = torch.randint(2, vocab, (rows, length))
    mask = torch.arange(length) < torch.tensor([6, 5, 4, 3, 6, 2, 1, 6])[:, None]
    tokens[~mask] = PAD
    current = eager.score(logits, tokens, mask)
    old, ref = (current + 0.4 * torch.randn(rows, length, dtype=dtype) * mask for _ in range(2))
    rewards_ = torch.randint(2, (rows,)).to(dtype) + 0.1 * torch.rand(rows, dtype=dtype)
    advantages = eager.advantages(rewards_, 4, "std")
    return logits, Batch(tokens, mask, old, ref, advantages=advantages)


@pytest.mark.parametrize("moved", [True, False], ids=["second-update", "first-update"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("name", objectives(0.0, 0.0))
def test_eager_loss_equals_ours(name, backend, dtype, moved, monkeypatch):
    monkeypatch.setenv("PYLLMTUNE_BACKEND", use(backend))
    config = objectives(kl_coef=0.05, entropy_coef=0.02)[name].config
    logits, batch = batch_of_a_moved_policy(dtype)
    if not moved:
        batch = batch._replace(old_logprobs=None)
    results = []
    for library in (fused, eager):
        leaf = logits.clone().requires_grad_()
        loss = library.loss(leaf, batch, config, 48.0)
        loss.value.backward()
        results.append((loss.value.detach(), leaf.grad, loss.logprobs, loss.metrics))
    (value, grad, logprobs, metrics), (want, want_grad, want_logprobs, want_metrics) = results
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    )
    torch.testing.assert_close(value, want, **tolerance)
    torch.testing.assert_close(grad, want_grad, **tolerance)
    torch.testing.assert_close(logprobs, want_logprobs, **tolerance)
    assert metrics == pytest.approx(want_metrics, rel=1e-5, abs=1e-6)
    assert (metrics["clipped"] > 0.1) == moved  # the clip is what is compared


@pytest.mark.parametrize("scale", ["std", "none"])
def test_eager_advantages_equal_ours(scale):
    values = torch.randint(2, (40,)).float() + 0.1 * torch.rand(40)
    values[:8] = 1.0  # a group without a difference
    torch.testing.assert_close(
        fused.advantages(values, 8, scale), eager.advantages(values, 8, scale), rtol=1e-5, atol=1e-6
    )


class Planted:
    """Stands for a model: right on sums always, on differences only after solved examples."""

    config = ModelConfig()

    def __call__(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        if cache.length == 0:
            self.lines = [self.answer(decode(row.tolist())) for row in tokens]
            cache.length, self.position = 1, 0
        else:
            self.position += 1
        logits = torch.zeros(len(tokens), 1, self.config.vocab)
        for row, line in enumerate(self.lines):
            logits[row, 0, line[min(self.position, len(line) - 1)]] = 1.0
        return logits

    @staticmethod
    def answer(prompt: str) -> list[int]:
        *examples, asked = prompt.split("\n")[1:]
        sign = "+" if "+" in asked else "-"
        question = Question(int(asked[:2]), sign, int(asked[3:5]))
        if sign == "+":
            return encode(question.worked() + "\n")
        return encode(f"{question.value if examples else question.value + 1}\n")


def test_accuracy_of_a_planted_model():
    split = make_split(validation=16, held_out=200)
    sums = sum(question.sign == "+" for question in split.held_out) / 200
    assert 0.2 < sums < 0.9
    measured = accuracy(Planted(), split.held_out, split.train)
    assert measured == pytest.approx((sums, 1.0, sums, sums))


def test_lockstep_sees_a_loss_that_is_off():
    torch.manual_seed(3)
    model = Transformer(SMALL)
    split = make_split(validation=16, held_out=16)
    objective = objectives(0.02, 0.01)["grpo"]
    settings = RunSettings(objective, seed=0, steps=9, questions=4, group_size=4)
    good = Lockstep(fused.LIBRARY, eager.LIBRARY, objective)
    Run(model, fused.LIBRARY, settings, split.train).step(1, good)
    assert good.updates == 2 and good.passed and 0 < good.gradient_difference < TOLERANCE

    def wrong(*arguments):
        loss = eager.batch_loss(*arguments)
        return loss._replace(value=loss.value * (1 + 1e-4))

    off = Lockstep(fused.LIBRARY, eager.LIBRARY._replace(loss=wrong), objective)
    Run(model, fused.LIBRARY, settings, split.train).step(1, off)
    assert not off.passed and off.gradient_difference == pytest.approx(1e-4, rel=0.1)

    def undefined(*arguments):
        loss = eager.batch_loss(*arguments)
        return loss._replace(value=loss.value * torch.nan)

    lost = Lockstep(fused.LIBRARY, eager.LIBRARY._replace(loss=undefined), objective)
    Run(model, fused.LIBRARY, settings, split.train).step(1, lost)
    assert not lost.passed  # NaN is no smaller than the tolerance


def test_two_runs_coincide_and_the_comparison_notes_the_first_difference():
    torch.manual_seed(4)
    model = Transformer(SMALL)
    split = make_split(validation=16, held_out=16)
    objective = objectives(0.02, 0.01)["grpo"]
    settings = RunSettings(
        objective, seed=0, steps=9, questions=4, group_size=4, keyword_weight=0.5
    )
    runs = [Run(model, library.LIBRARY, settings, split.train) for library in (fused, eager)]
    comparison = Comparison(Lockstep(*(run.library for run in runs), objective))
    for step in (1, 2):
        for run in runs:
            run.step(step)
        comparison.note(step, *runs)
    assert comparison.steps == 2 and comparison.first_difference is None
    assert comparison.curves["loss"] < 1e-5
    assert any(record.reward > 0 for record in runs[0].records)  # something was learned from
    assert not torch.equal(runs[0].policy.head.weight, model.head.weight)
    runs[1].answers = runs[1].answers.clone()
    runs[1].answers[0, 0] += 1
    comparison.note(3, *runs)
    assert comparison.first_difference == 3 and comparison.steps == 2


class FakeProcess:
    """A worker of the table that answers with given values."""

    def __init__(self, provider: str, loss: float, gradient: torch.Tensor) -> None:
        self.provider, self.loss, self.gradient = provider, loss, gradient

    def ask(self, command: str, path: str) -> dict[str, float]:
        assert command == "values"
        torch.save(self.gradient, path)
        return {"loss": self.loss}


def test_no_time_without_equal_values(tmp_path):
    gradient = torch.randn(4, 4)
    processes = [
        FakeProcess("eager", 1.0, gradient),
        FakeProcess("pyllmtune", 1.0, gradient * (1 + 1e-7)),
        FakeProcess("compile", 1.0, gradient + 1e-3),
    ]
    results = [table.Result(process.provider) for process in processes]
    table._compare(processes, results, tmp_path)
    assert [result.refused is None for result in results] == [True, True, False]
    results[0].times, results[1].times = [0.2, 0.4, 0.3], [0.1, 0.1, 0.1]
    text = "\n".join(table.lines(results, table.Size(rows=4, vocab=4)))
    assert "300.0 ms" in text and "3.00 x" in text
    assert "torch.compile   no time: values differ: gradient" in text


def test_without_matplotlib_the_picture_is_skipped_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    reason = picture.draw(tmp_path / "curves.png", [], "title")
    assert "matplotlib is not installed" in reason
    assert not list(tmp_path.iterdir())


def test_a_quick_run_writes_its_files(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert (
        pyllmtune.demo.main(["--quick", "--seed", "3", "--threads", "1", "--out", str(tmp_path)])
        == 0
    )
    assert torch.get_num_threads() == threads
    shown = capsys.readouterr().out
    for part in (
        "zero-shot",
        "few-shot",
        "same tokens were sampled in all 3 steps",
        "1.0 x logits",
    ):
        assert part in shown
    with (tmp_path / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"] * 2
    ours, others = rows[:4], rows[4:]
    for name in ("reward", "loss", "kl", "entropy", "grad_norm"):
        for one, other in zip(ours[1:], others[1:], strict=True):
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-4, abs=1e-5)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["agreement"]["gradient_difference"] < TOLERANCE
    assert [line["provider"] for line in summary["loss_step"]] == ["pyllmtune", "eager"]
    assert all(line["median_seconds"] > 0 for line in summary["loss_step"])
    if "curves.png" in shown:
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_help_and_refused_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        pyllmtune.demo.main(["--help"])
    assert stopped.value.code == 0 and "--no-eager" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        pyllmtune.demo.main(["--group-size", "1"])
    assert stopped.value.code == 2 and "must be at least 2, got 1" in capsys.readouterr().err


def test_decoded_rows_end_with_their_first_newline():
    assert decode_rows([encode("85\n4"), encode("85")]) == ["85\n", "85"]
