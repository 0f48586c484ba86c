"""score_answers: the sum of the log-probs of an answer's tokens, whatever stands beside it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from pyllmtune import score_answers, temperature_softmax
from tests.helpers import use

VOCAB = 11


class Causal(nn.Module):
    """Logits of a position depend on all tokens up to it, and on none behind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8)
        self.recurrent = nn.GRU(8, 16, batch_first=True)
        self.head = nn.Linear(16, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(tokens))[0])


def step_by_step(model: nn.Module, prompt: Tensor, answer: Tensor, temperature: float) -> Tensor:
    """The product rule, one token and one forward at a time."""
    total = torch.zeros(())
    for t, token in enumerate(answer):
        logits = model(torch.cat((prompt, answer[:t]))[None])[0, -1]
        total = total + (logits / temperature).log_softmax(-1)[token]
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_scores_are_the_product_rule(backend, temperature):
    use(backend)
    model, prompt = Causal(), torch.tensor([1, 2, 3])
    answers = [torch.tensor([4]), torch.tensor([5, 6, 7, 8]), torch.tensor([4, 0])]
    want = torch.stack([step_by_step(model, prompt, a, temperature) for a in answers])
    options = {"temperature": temperature, "backend": backend}
    got = score_answers(model, prompt, answers, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    mean = score_answers(model, prompt, answers, reduction="mean", **options)
    torch.testing.assert_close(mean, want / torch.tensor([1, 4, 2]), rtol=1e-5, atol=1e-5)
    padded = score_answers(model, prompt, answers, pad_token_id=9, **options)
    torch.testing.assert_close(padded, got, rtol=1e-6, atol=1e-6)
    got.sum().backward()
    ours = model.head.weight.grad.clone()
    model.zero_grad()
    want.sum().backward()
    torch.testing.assert_close(ours, model.head.weight.grad, rtol=1e-4, atol=1e-5)


def test_probabilities_of_all_answers_of_one_length_add_up_to_one():
    model, prompt = Causal(), torch.tensor([3])
    answers = list(torch.cartesian_prod(torch.arange(VOCAB), torch.arange(VOCAB)))
    scores = score_answers(model, prompt, answers)
    torch.testing.assert_close(scores.exp().sum(), torch.ones(()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(temperature_softmax(scores), scores.exp(), rtol=1e-4, atol=1e-7)


def test_models_with_an_output_object():
    model, prompt, answers = Causal(), torch.tensor([1]), [torch.tensor([2, 3])]
    wrapped = score_answers(lambda rows: SimpleNamespace(logits=model(rows)), prompt, answers)
    assert torch.equal(wrapped, score_answers(model, prompt, answers))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt": torch.tensor([], dtype=torch.int64)}, ValueError, "prompt must be"),
        ({"prompt": torch.tensor([1.0])}, TypeError, "prompt must be one of int64"),
        ({"answers": [torch.tensor([[1]])]}, ValueError, r"answers\[0\] must be \[T\]"),
        ({"answers": []}, ValueError, "at least one candidate"),
        ({"model": lambda rows: torch.zeros(2, VOCAB)}, ValueError, "model must return"),
        ({"answers": [torch.tensor([VOCAB])], "reduction": "max"}, ValueError, "sum or mean"),
        ({"answers": [torch.tensor([VOCAB])]}, ValueError, "tokens must be in"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, message):
    arguments = {
        "model": lambda rows: torch.zeros(*rows.shape, VOCAB),
        "prompt": torch.tensor([1]),
        "answers": [torch.tensor([2])],
    }
    with pytest.raises(error, match=message):
        score_answers(**arguments | change)
