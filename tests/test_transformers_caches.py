"""Our loops of ``generate`` draw and search the same whatever cache the model keeps."""

from __future__ import annotations

import functools

import pytest
import torch

from tests import helpers
from tests.test_transformers_integration import (
    VOCAB,
    _transformers,  # noqa: F401  an automatic fixture
    prompts,
    random_model,
)

MODES = {
    "greedy": {},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "sample": {"do_sample": True, "top_p": 0.8, "seed": 5},
    "beam_sample": {"do_sample": True, "num_beams": 3, "seed": 5},
}
KINDS = ("llama", "sliding", "convolution", "recurrent", "t5", "bart")


@pytest.fixture(scope="module")
def fused():
    helpers.need("transformers")
    from pyllmtune.integrations import transformers

    return transformers


@functools.cache
def causal_model(kind: str):
    """Layers whose caches differ: all tokens, four tokens, a convolution's, a state."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "initializer_range": 0.3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    torch.manual_seed(1)
    if kind == "sliding":
        layers = ["sliding_attention", "full_attention"]
        config = transformers.Gemma3TextConfig(
            **sizes, **ids, **heads, head_dim=8, sliding_window=4, layer_types=layers
        )
        return transformers.Gemma3ForCausalLM(config).eval()
    if kind == "convolution":
        layers = ["conv", "full_attention"]
        config = transformers.Lfm2Config(**sizes, **ids, **heads, layer_types=layers)
        return transformers.Lfm2ForCausalLM(config).eval()
    if kind == "recurrent":
        config = transformers.MambaConfig(**sizes, **ids, state_size=8)
        return transformers.MambaForCausalLM(config).eval()
    return random_model(kind)


def generate(model, fused, mode: str, **words):
    loop = fused.beam_search if "beam" in mode else fused.sample
    words = {"max_new_tokens": 8, "custom_generate": loop, **MODES[mode], **words}
    if words["custom_generate"] is None:
        words.pop("seed", None)
    return model.generate(**prompts(model), **words)


def caches_seen(model) -> tuple[list, object]:
    """The caches with which the model is called, until the handle returned is removed."""
    seen = []

    def note(_, args, kwargs):
        seen.append(kwargs.get("past_key_values", kwargs.get("cache_params")))

    return seen, model.register_forward_pre_hook(note, with_kwargs=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_same_with_every_cache(kind, mode, fused):
    model = causal_model(kind)
    want = generate(model, fused, mode)
    assert want.unique().numel() > 4  # of the vocabulary, not one token over and over
    for how in ({"cache_implementation": "static"}, {"use_cache": False}):
        seen, handle = caches_seen(model)
        got = generate(model, fused, mode, **how)
        handle.remove()
        assert torch.equal(got, want), how
        if "use_cache" in how:
            assert all(cache is None for cache in seen)
        else:
            assert all("Static" in repr(cache) for cache in seen)
        if mode in ("greedy", "beam"):
            assert torch.equal(got, generate(model, fused, mode, **how, custom_generate=None))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ("llama", "t5"))
def test_a_static_cache_lets_the_model_be_compiled_once(kind, mode, fused):
    """As ``generate`` compiles it on a GPU: same tokens, one graph for all steps."""
    import transformers
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")

    class Compiled(transformers.CompileConfig):
        _compile_all_devices = True

        def to_dict(self):
            return {"backend": counter}

    torch._dynamo.reset()
    model = random_model(kind)
    want = generate(model, fused, mode)
    got = generate(model, fused, mode, cache_implementation="static", compile_config=Compiled())
    assert torch.equal(got, want)
    assert counter.frame_count == 1


@pytest.mark.parametrize("mode", MODES)
def test_kept_logits_outlive_the_memory_of_the_model(mode, fused):
    """A compiled model writes the logits of a step over those of the step before."""
    model = random_model("llama")
    keep = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    want = generate(model, fused, mode, **keep)
    last = []

    def overwrite(_, __, outputs):
        if last:
            last.pop().fill_(torch.nan)
        last.append(outputs.logits)

    with torch.no_grad():
        handle = model.register_forward_hook(overwrite)
        got = generate(model, fused, mode, **keep)
        handle.remove()
    assert torch.equal(got.sequences, want.sequences)
    for name in ("logits", "scores"):
        for a, b in zip(getattr(got, name), getattr(want, name), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("static", (False, True), ids=("dynamic", "static"))
@pytest.mark.parametrize("kind", ("llama", "sliding"))
def test_a_returned_cache_continues_the_text(kind, static, fused):
    """Three more tokens on the cache of the first five: those of eight in one go."""
    from transformers import StaticCache

    model = causal_model(kind)
    inputs = prompts(model)
    words = {"custom_generate": fused.sample, "do_sample": False, "eos_token_id": None}
    want = model.generate(**inputs, **words, max_new_tokens=8)
    cache = StaticCache(model.config, max_cache_len=20) if static else None
    first = model.generate(
        **inputs, **words, max_new_tokens=5, past_key_values=cache, return_dict_in_generate=True
    )
    if static:
        assert first.past_key_values is cache
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
    got = model.generate(
        first.sequences,
        attention_mask=mask,
        **words,
        max_new_tokens=3,
        past_key_values=first.past_key_values,
    )
    assert torch.equal(got, want)
