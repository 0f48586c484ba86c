"""beam_search against brute force and against the definitions, and its corners."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import Tensor

import pyllmtune
from pyllmtune import beam_search, reorder_cache, token_logprobs
from pyllmtune.decoding.hypotheses import BeamHypotheses, new_pool
from pyllmtune.demo.model import Cache, ModelConfig, Transformer
from pyllmtune.demo.rollout import pad_left
from pyllmtune.demo.vocabulary import NEWLINE, PAD
from tests.helpers import use

EOS = 0
BACKENDS = ("reference", "cpp")


class Table:
    """A model whose next logits depend on the last two tokens and the position. Its cache is the
    prefix itself, which the default ``reorder`` indexes.
    """

    def __init__(self, vocab: int, length: int, spread: float = 1.5) -> None:
        self.logits = torch.randn(length, vocab, vocab, vocab) * spread

    def step(self, tokens: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor]:
        prefix = tokens if prefix is None else torch.cat((prefix, tokens), dim=1)
        return self.logits[prefix.shape[1] - 2, prefix[:, -2], prefix[:, -1]], prefix

    def logprobs(self, start: list[int], answer: list[int]) -> Tensor:
        """``[len(answer)]``, by ``token_logprobs``."""
        whole = torch.tensor([*start, *answer])
        at = torch.arange(len(answer))
        logits = self.logits[at, whole[at], whole[at + 1]]
        return token_logprobs(logits, torch.tensor(answer), backend="reference").logprobs


def all_answers(vocab: int, length: int) -> list[list[int]]:
    """Every sequence that ends with EOS or has the full length."""
    words = range(1, vocab)
    short = [[*body, EOS] for n in range(length) for body in itertools.product(words, repeat=n)]
    return short + [list(body) for body in itertools.product(words, repeat=length)]


@pytest.mark.parametrize("penalty", (0.0, 1.0))
@pytest.mark.parametrize("backend", BACKENDS)
def test_brute_force(backend, penalty):
    """As wide as there are prefixes and never stopped early, it finds the best of all."""
    use(backend)
    vocab, length = 4, 4
    model, start = Table(vocab, length), torch.tensor([[1, 2], [3, 1], [2, 2]])
    width = 3**length
    out = beam_search(
        *(model.step, start),
        num_beams=width,
        num_return_sequences=20,
        max_length=length,
        eos_token_id=EOS,
        length_penalty=penalty,
        early_stopping="never",
        backend=backend,
    )
    for item, prompt in enumerate(start.tolist()):
        ranked = sorted(
            (
                (float(model.logprobs(prompt, answer).sum()) / len(answer) ** penalty, answer)
                for answer in all_answers(vocab, length)
            ),
            reverse=True,
        )[:20]
        assert len(ranked) == 20
        for rank, (score, answer) in enumerate(ranked):
            assert out.tokens[item, rank, : len(answer)].tolist() == answer
            assert float(out.scores[item, rank]) == pytest.approx(score, abs=1e-5)
            assert int(out.lengths[item, rank]) == len(answer)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_are_the_sums_of_token_logprobs(backend):
    """Each log-prob, each sum and, divided, each score, of sequences of forty tokens."""
    use(backend)
    model, start = Table(9, 40), torch.tensor([[1, 2], [5, 8], [3, 3]])
    words = {"max_length": 40, "eos_token_id": [0, 7], "length_penalty": 0.7, "backend": backend}
    out = beam_search(model.step, start, num_beams=5, num_return_sequences=5, **words)
    assert int(out.lengths.max()) > 4
    for item, rank in itertools.product(range(3), range(5)):
        length = int(out.lengths[item, rank])
        answer = out.tokens[item, rank, :length].tolist()
        want = model.logprobs(start[item].tolist(), answer)
        # a log-prob is the difference of two float32 sums
        assert torch.allclose(out.logprobs[item, rank, :length], want, atol=1e-5)
        total = float(want.double().sum())
        assert float(out.scores[item, rank]) * length**0.7 == pytest.approx(
            total, abs=1e-5, rel=1e-6
        )
        assert not out.logprobs[item, rank, length:].any()
        assert (out.tokens[item, rank, length:] == 0).all()
        assert (out.parents[item, rank, length:] == -1).all()


def naive_groups(
    model: Table, prompt: list[int], beams: int, groups: int, penalty: float, length: int
) -> list[list[tuple[float, list[int]]]]:
    """Vijayakumar et al. 2016, eq. 5, word for word, without ending tokens: per group, sums and
    sequences, best first.
    """
    width = beams // groups
    running = [[(0.0, [])] for _ in range(groups)]
    for _ in range(length):
        taken: list[int] = []
        for group in range(groups):
            options = []
            for total, answer in running[group]:
                last = [*prompt, *answer][-2:]
                logits = model.logits[(len(answer), *last)]
                for token, logprob in enumerate(logits.log_softmax(-1).tolist()):
                    augmented = total + logprob - penalty * taken.count(token)
                    options.append((augmented, total + logprob, [*answer, token]))
            options.sort(key=lambda option: -option[0])
            running[group] = [option[1:] for option in options[:width]]
            taken += [answer[-1] for _, answer in running[group]]
    return [sorted(group, key=lambda pair: -pair[0]) for group in running]


@pytest.mark.parametrize("groups", (1, 2, 3, 6))
def test_diverse_groups_are_the_published_definition(groups):
    model, start, length = Table(7, 5), torch.tensor([[1, 2], [5, 6]]), 5
    out = beam_search(
        *(model.step, start),
        num_beams=6,
        num_return_sequences=6,
        max_length=length,
        eos_token_id=None,
        num_groups=groups,
        diversity_penalty=1.5,
    )
    for item, prompt in enumerate(start.tolist()):
        found = naive_groups(model, prompt, 6, groups, 1.5, length)
        want = sorted((pair for group in found for pair in group), key=lambda pair: -pair[0])
        assert torch.allclose(out.scores[item], torch.tensor([pair[0] for pair in want]), atol=1e-5)
        assert [row.tolist() for row in out.tokens[item]] == [pair[1] for pair in want]
    if groups == 6:  # each must differ from the others in its first token, the penalty being large
        assert len({int(token) for token in out.tokens[0, :, 0]}) >= 4


def test_a_group_search_whose_groups_end():
    """Groups finish hypotheses of their own, and the merged list is in order."""
    model, start = Table(7, 12), torch.tensor([[1, 2], [5, 6]])
    words = {"max_length": 12, "eos_token_id": EOS, "num_groups": 2, "diversity_penalty": 0.5}
    out = beam_search(
        model.step, start, num_beams=4, num_return_sequences=4, return_trees=True, **words
    )
    assert (out.scores.diff(dim=1) <= 0).all() and len(out.trees) == 4
    first = beam_search(
        model.step, start, num_beams=2, num_return_sequences=2, **{**words, "num_groups": 1}
    )
    for item in range(2):  # the first group is not penalised: it is a search of its own
        best = [row.tolist() for row in first.tokens[item]]
        all_found = [row[: first.tokens.shape[2]].tolist() for row in out.tokens[item]]
        assert all(row in all_found for row in best)


def greedy(step, start: Tensor, length: int) -> float:
    total, cache, tokens = 0.0, None, start
    for _ in range(length):
        logits, cache = step(tokens, cache)
        best = logits.log_softmax(-1).max(-1)
        total, tokens = total + float(best.values[0]), best.indices[:, None]
    return total


def test_one_beam_is_greedy():
    model, start = Table(8, 6), torch.tensor([[1, 2]])
    out = beam_search(model.step, start, num_beams=1, max_length=6, eos_token_id=None)
    assert float(out.scores[0, 0]) == pytest.approx(greedy(model.step, start, 6), abs=1e-5)


def test_batch_order_and_threads_do_not_matter():
    model = Table(30, 6)
    start = torch.randint(30, (5, 2))
    words = {"num_beams": 4, "num_return_sequences": 4, "max_length": 6, "eos_token_id": [3, 4]}
    together = beam_search(model.step, start, **words)
    flipped = beam_search(model.step, start.flip(0), **words)
    assert torch.equal(together.scores, flipped.scores.flip(0))
    for item in range(5):
        alone = beam_search(model.step, start[item : item + 1], **words)
        assert torch.equal(alone.scores[0], together.scores[item])
        assert torch.equal(alone.lengths[0], together.lengths[item])


def test_a_transformer_with_its_cache_and_left_padding():
    """The demo's model and its key-value cache, reordered by a callback: a padded prompt is
    searched as if alone, and one forward over the whole sequence gives the sums that were found.
    """
    config = ModelConfig(width=32, layers=2, heads=2, max_length=64)
    model = Transformer(config).eval()

    def step(tokens: Tensor, cache: Cache) -> Tensor:
        return model(tokens, cache)[:, -1] * 8  # times 8: a fresh model hardly decides

    def reorder(cache: Cache, rows: Tensor) -> Cache:
        cache.store, cache.valid = cache.store[:, :, rows], cache.valid[rows]
        return cache

    def search(start: Tensor):
        cache = Cache(config, len(start), start.shape[1] + 6)
        words = {"cache": cache, "reorder": reorder, "num_beams": 3, "max_length": 6}
        return beam_search(step, start, **words, num_return_sequences=3, eos_token_id=NEWLINE)

    start = pad_left(["12+3=", "4-1=", "77+20="])
    with torch.no_grad():
        together = search(start)
        for item in range(3):
            prompt = start[item][start[item] != PAD]
            alone = search(prompt[None])
            for rank in range(3):
                length = int(alone.lengths[0, rank])
                answer = alone.tokens[0, rank, :length]
                assert torch.equal(together.tokens[item, rank, :length], answer)
                whole = torch.cat((prompt, answer))[None]
                logits = model(whole)[0, len(prompt) - 1 : -1] * 8
                total = token_logprobs(logits, answer).logprobs.sum()
                for score in (alone.scores[0, rank], together.scores[item, rank]):
                    assert float(score) == pytest.approx(float(total), abs=1e-4)


def test_reorder_cache():
    rows, x = torch.tensor([1, 1, 0]), torch.arange(4.0).view(2, 2)

    class Own:
        def reorder_cache(self, rows):
            self.rows = rows

    own = Own()
    got = reorder_cache({"kv": [(x, x + 1)], "own": own, "length": 3, "none": None}, rows)
    assert torch.equal(got["kv"][0][1], (x + 1)[rows]) and isinstance(got["kv"][0], tuple)
    assert got["own"] is own and own.rows is rows and got["length"] == 3 and got["none"] is None
    with pytest.raises(TypeError, match="cache holds a object, which has no reorder_cache"):
        reorder_cache([object()], rows)


def test_without_the_host_module_the_python_pool_gives_the_same(monkeypatch):
    model, start = Table(9, 8), torch.tensor([[1, 2], [5, 8]])
    words = {"num_beams": 4, "num_return_sequences": 4, "max_length": 8, "eos_token_id": [0, 3]}
    fast = beam_search(model.step, start, **words, length_penalty=0.8)
    monkeypatch.setitem(sys.modules, "pyllmtune._host", None)
    monkeypatch.delattr(pyllmtune, "_host", raising=False)
    assert isinstance(new_pool(1, 1, 0.0, False, 0, 1), BeamHypotheses)
    slow = beam_search(model.step, start, **words, length_penalty=0.8)
    assert all(torch.equal(a, b) for a, b in zip(fast[:5], slow[:5], strict=True))
