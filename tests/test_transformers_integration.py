"""``generate`` with our loops equals ``generate``: sequences, scores, distributions."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests import helpers

VOCAB = 60


@pytest.fixture(autouse=True)
def _transformers():
    """On one thread: the models are too small for two, and tests run beside each other."""
    helpers.need("transformers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def fused():
    helpers.need("transformers")
    from pyllmtune.integrations import transformers

    return transformers


def random_model(kind: str):
    """Small, random, and ten times as decided as a fresh one: sums are seldom within rounding."""
    import transformers

    torch.manual_seed(1)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        )
        return transformers.LlamaForCausalLM(config).eval()
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=1,
            num_heads=4,
            initializer_factor=3.0,
            decoder_start_token_id=0,
            eos_token_id=2,
            pad_token_id=3,
        )
        return transformers.T5ForConditionalGeneration(config).eval()
    config = transformers.BartConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        init_std=0.4,
        decoder_start_token_id=0,
        eos_token_id=2,
        pad_token_id=3,
        forced_eos_token_id=None,
    )
    return transformers.BartForConditionalGeneration(config).eval()


@pytest.fixture(scope="module", params=("llama", "t5", "bart"))
def model(request):
    helpers.need("transformers")
    return random_model(request.param)


@pytest.fixture(scope="module")
def llama():
    helpers.need("transformers")
    return random_model("llama")


def prompts(model) -> dict[str, torch.Tensor]:
    """Three of different lengths, padded on the side that the model wants."""
    torch.manual_seed(2)
    ids = torch.randint(4, VOCAB, (3, 6))
    mask = torch.ones_like(ids)
    for row, missing in ((0, 2), (2, 3)):
        place = slice(6 - missing, 6) if model.config.is_encoder_decoder else slice(0, missing)
        ids[row, place], mask[row, place] = 3, 0
    return {"input_ids": ids, "attention_mask": mask}


def both(model, fused, **words):
    """What generate returns with its own loop and with ours, on the same inputs."""
    words = {"return_dict_in_generate": True, "output_scores": True, **words}
    inputs = prompts(model)
    theirs = model.generate(**inputs, **words)
    return theirs, model.generate(**inputs, **words, custom_generate=fused.beam_search)


def assert_same_beams(theirs, ours) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.beam_indices, theirs.beam_indices)
    helpers.assert_close(ours.sequences_scores, theirs.sequences_scores, 1e-5, "sequences_scores")


@pytest.mark.parametrize("beams", (2, 3, 5, 8))
def test_beam_search_is_generate(model, fused, beams):
    """Length penalties, early stopping, EOS sets, lengths, number returned."""
    ended_early = 0
    grid = itertools.product((-1.0, 0.0, 1.0, 2.0), (False, True, "never"))
    for index, (penalty, stopping) in enumerate(grid):
        words = {
            "num_beams": beams,
            "length_penalty": penalty,
            "early_stopping": stopping,
            "max_new_tokens": (1, 4, 9)[index % 3],
            "num_return_sequences": (1, beams)[index % 2],
            "eos_token_id": (2, [2, 7, 11, 20, 30], list(range(5, 50)))[index // 2 % 3],
            # without scores the logits are scored as they are, with them their log-probs
            "output_scores": index % 4 != 3,
        }
        theirs, ours = both(model, fused, **words)
        assert torch.equal(ours.sequences, theirs.sequences), words
        if words["output_scores"]:
            assert_same_beams(theirs, ours)
            assert len(theirs.scores) <= len(ours.scores)
        ended_early += bool((theirs.beam_indices[:, -1] < 0).any())
    assert ended_early > 0


def test_one_beam_is_greedy_decoding(model, fused):
    theirs, ours = both(model, fused, max_new_tokens=9, output_logits=True)
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        for got, want in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            helpers.assert_close(got, want, 1e-5, name)
    plain = model.generate(**prompts(model), max_new_tokens=9, custom_generate=fused.beam_search)
    assert torch.equal(plain, theirs.sequences)


def test_processors_change_log_probs_as_in_transformers(model, fused):
    """They are applied to log-probs and nothing is renormalised."""
    theirs, ours = both(
        model,
        fused,
        num_beams=4,
        max_new_tokens=8,
        min_new_tokens=3,
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        suppress_tokens=[9, 10],
        num_return_sequences=2,
        output_logits=True,
    )
    assert_same_beams(theirs, ours)
    helpers.assert_close(ours.scores[0], theirs.scores[0], 1e-5, "scores")
    helpers.assert_close(ours.logits[0], theirs.logits[0], 1e-5, "logits")


def test_other_stopping_criteria_end_a_beam(llama, fused):
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Sum(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return input_ids[:, 6:].sum(-1) % 4 == 0

    words = {
        "num_beams": 4,
        "max_new_tokens": 8,
        "stopping_criteria": StoppingCriteriaList([Sum()]),
    }
    theirs, ours = both(llama, fused, **words)
    assert_same_beams(theirs, ours)
    assert bool((ours.sequences[:, 6:].clamp(min=0).sum(-1) % 4 == 0).any())


@pytest.mark.parametrize("how", ({"cache_implementation": "static"}, {"use_cache": False}), ids=str)
def test_static_cache_and_no_cache(model, fused, how):
    theirs, ours = both(model, fused, num_beams=3, max_new_tokens=6, **how)
    assert_same_beams(theirs, ours)
    torch.manual_seed(0)
    inputs = prompts(model)
    words = {"do_sample": True, "top_p": 0.8, "max_new_tokens": 6, "seed": 5}
    runs = [
        model.generate(**inputs, **words, **other, custom_generate=fused.sample)
        for other in ({}, how)
    ]
    assert torch.equal(*runs)


def test_a_padded_row_is_searched_as_if_alone(llama, fused):
    inputs = prompts(llama)
    words = {"num_beams": 3, "max_new_tokens": 6, "custom_generate": fused.beam_search}
    together = llama.generate(**inputs, **words)
    for row in range(3):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row] == 1][None]
        alone = llama.generate(ids, attention_mask=torch.ones_like(ids), **words)
        here = together[row, 6:]
        assert here[: alone.shape[1] - ids.shape[1]].tolist() == alone[0, ids.shape[1] :].tolist()


FILTERS = (
    {"temperature": 0.7, "top_k": 0, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 12},
    {"top_k": 0, "min_p": 0.05},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
    {"top_k": 30, "top_p": 0.9, "typical_p": 0.8},  # typical_p comes last and stays transformers'
    {"top_k": 0, "repetition_penalty": 1.4},
)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_sample_draws_from_the_distribution_of_generate(model, fused, filters):
    """Led along our tokens, generate has our scores: the same kept tokens, the same logits."""
    from transformers import LogitsProcessor, LogitsProcessorList

    inputs = prompts(model)
    words = {
        "do_sample": True,
        "max_new_tokens": 6,
        "num_return_sequences": 3,
        "return_dict_in_generate": True,
        "output_scores": True,
        "eos_token_id": [2, 7, 30],
        **filters,
    }
    ours = model.generate(**inputs, **words, custom_generate=fused.sample, seed=11)
    start = ours.sequences.shape[1] - len(ours.scores)
    tokens = ours.sequences[:, start:]

    class Follow(LogitsProcessor):
        """The last word before transformers draws: our token; what it saw is kept."""

        def __init__(self):
            self.seen = []

        def __call__(self, input_ids, scores):
            self.seen.append(scores)
            follow = torch.full_like(scores, -torch.inf)
            return follow.scatter(1, tokens[:, len(self.seen) - 1 :][:, :1], 0.0)

    follow = Follow()
    prepare = type(model)._get_logits_processor

    def with_follow(self, *args, **kwargs):
        return LogitsProcessorList([*prepare(self, *args, **kwargs), follow])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "_get_logits_processor", with_follow)
        theirs = model.generate(**inputs, **words)
    assert torch.equal(theirs.sequences, ours.sequences)
    assert len(follow.seen) == len(ours.scores)
    for step, (got, want) in enumerate(zip(ours.scores, follow.seen, strict=True)):
        assert torch.equal(got.isfinite(), want.isfinite())
        helpers.assert_close(got, want, 1e-5, "scores")
        running = (tokens[:, :step, None] != torch.tensor([2, 7, 30])).all(-1).all(-1)
        assert bool(want.gather(1, tokens[:, step : step + 1])[running].isfinite().all())


def test_sampled_tokens_have_the_probabilities_of_generate(llama, fused):
    """Chi-square over 8,000 first tokens; the 99.9 % point of 14 degrees of freedom is 36.1."""
    inputs = {name: value[:1] for name, value in prompts(llama).items()}
    words = {"do_sample": True, "top_k": 15, "max_new_tokens": 1, "num_return_sequences": 8000}
    drawn = llama.generate(**inputs, **words, custom_generate=fused.sample, seed=3)[:, -1]
    logits = llama(**inputs).logits[0, -1].detach()
    top = logits.topk(15)
    expected = top.values.double().softmax(-1) * 8000
    counts = torch.stack([(drawn == token).sum() for token in top.indices])
    assert int(counts.sum()) == 8000
    assert float(((counts - expected) ** 2 / expected).sum()) < 36.1


def test_beams_are_sampled_as_generate_samples_them(llama, fused):
    """Of 3,000 prompts each, the pairs of tokens: two-sample chi-square below its 99.9 % point."""
    inputs = {name: value[:1].repeat(3000, 1) for name, value in prompts(llama).items()}
    words = {"do_sample": True, "num_beams": 2, "max_new_tokens": 2, "top_k": 3, "temperature": 1.5}
    words["custom_generate"] = fused.beam_search
    ours = llama.generate(**inputs, **words, seed=torch.arange(3000))
    assert torch.equal(ours, llama.generate(**inputs, **words, seed=torch.arange(3000)))
    torch.manual_seed(0)
    theirs = llama.generate(**inputs, **words | {"custom_generate": None})
    pairs = [(x[:, -2] * VOCAB + x[:, -1]).bincount(minlength=VOCAB**2) for x in (ours, theirs)]
    common = pairs[0] + pairs[1] >= 20
    assert int(common.sum()) > 4  # it is a distribution that is compared
    a, b = (x[common].double() for x in pairs)
    degrees = int(common.sum()) - 1
    bound = degrees + 3.1 * (2 * degrees) ** 0.5 + 6  # above the 99.9 % point for any of them
    assert float(((a - b) ** 2 / (a + b)).sum()) < bound


def test_seeds_of_sample(llama, fused):
    inputs = prompts(llama)
    words = {"do_sample": True, "max_new_tokens": 8, "custom_generate": fused.sample}
    first = llama.generate(**inputs, **words, seed=1)
    assert torch.equal(first, llama.generate(**inputs, **words, seed=1))
    assert not torch.equal(first, llama.generate(**inputs, **words, seed=2))
    torch.manual_seed(9)
    unseeded = llama.generate(**inputs, **words)
    torch.manual_seed(9)
    assert torch.equal(unseeded, llama.generate(**inputs, **words))
    copies = llama.generate(**inputs, **words, seed=1, num_return_sequences=2)
    assert not torch.equal(copies[::2], copies[1::2])
    # one seed per row: rows do not depend on the batch
    seeds = torch.tensor([5, 6, 7])
    together = llama.generate(**inputs, **words, seed=seeds)
    last = {name: value[2:] for name, value in inputs.items()}
    alone = llama.generate(**last, **words, seed=seeds[2:])
    assert torch.equal(alone[0], together[2, : alone.shape[1]])


@pytest.mark.parametrize("filters", FILTERS[:4], ids=str)
def test_filter_logits_processor_is_the_warpers(fused, filters):
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    warpers = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    chain = LogitsProcessorList(
        [warpers[name](filters[name]) for name in warpers if filters.get(name)]
    )
    z = torch.randn(40, 300) * 3
    got, want = fused.FilterLogits(**filters)(None, z), chain(None, z)
    assert torch.equal(got.isfinite(), want.isfinite())
    helpers.assert_close(got, want, 1e-6, "scores")


@pytest.mark.parametrize("count", (None, 7, torch.tensor(9.0)), ids=str)
def test_causal_lm_loss(fused, count):
    """The loss of a model and its gradients, with labels to ignore."""
    losses, gradients = [], []
    for own in (False, True):
        model = random_model("llama")
        if own:
            model.loss_function = fused.causal_lm_loss
        torch.manual_seed(4)
        ids = torch.randint(4, VOCAB, (2, 9))
        labels = torch.where(torch.rand(ids.shape) < 0.3, -100, ids)
        loss = model(ids, labels=labels, num_items_in_batch=count).loss
        loss.backward()
        losses.append(loss)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    helpers.assert_close(losses[1], losses[0], 1e-6, "loss")
    helpers.assert_close(gradients[1], gradients[0], 1e-5, "gradients")


def test_what_is_not_supported_says_so(llama, fused):
    inputs = prompts(llama)
    words = {"max_new_tokens": 2, "custom_generate": fused.beam_search, "num_beams": 2}
    for name in ("output_attentions", "output_hidden_states"):
        with pytest.raises(ValueError, match="are not supported here"):
            llama.generate(**inputs, **words, return_dict_in_generate=True, **{name: True})


def test_a_transformers_without_the_private_names_is_refused(llama, fused, monkeypatch):
    from pyllmtune.integrations.transformers import runner

    monkeypatch.setattr(runner, "PRIVATE", (*runner.PRIVATE, "_prefill_of_tomorrow"))
    with pytest.raises(RuntimeError, match=r"has no _prefill_of_tomorrow: this module is written"):
        llama.generate(**prompts(llama), max_new_tokens=2, custom_generate=fused.sample)


def test_nan_logits_raise_in_sample_and_end_a_beam_in_beam_search(llama, fused):
    from transformers import LogitsProcessor, LogitsProcessorList

    class Spoil(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(0, torch.tensor([1]), torch.nan)

    inputs = prompts(llama)
    words = {"max_new_tokens": 4, "logits_processor": LogitsProcessorList([Spoil()])}
    with pytest.raises(ValueError, match="row 1 hold NaN or"):
        llama.generate(**inputs, **words, custom_generate=fused.sample)
    spoiled = llama.generate(**inputs, **words, num_beams=3, custom_generate=fused.beam_search)
    clean = llama.generate(**inputs, max_new_tokens=4, num_beams=3)
    assert torch.equal(spoiled[1:], clean[1:, : spoiled.shape[1]])  # row 1 is a beam of prompt 0
