"""The CUDA kernels, executed on the CPU: values, bits in any order of threads, sanitizers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.test_temperature_softmax import compare as assert_softmax

from . import gpu_cases as cases
from .emulator import run_sanitized
from .toolchain import require


@pytest.fixture(autouse=True)
def floor():
    require("g++", "nvcc")
    from . import emulated_floor

    emulated_floor.install()
    return emulated_floor


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("vocab", (*cases.VOCABS, 511, 1023, 5003))
def test_scores_against_float64(vocab, dtype, layout):
    logits = cases.logits_of(layout, vocab, dtype)
    tokens = torch.randint(0, vocab, (2, 3))
    mask = torch.tensor([[True, True, False], [True, False, True]])
    cases.assert_scores(logits, tokens, "emulated", temperature=0.8)
    cases.assert_scores(logits, tokens, "emulated", temperature=torch.rand(2, 3) + 0.5, mask=mask)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("vocab", (8, 128, 1001, 4100))
def test_bits_do_not_depend_on_the_alignment_of_a_row(vocab, dtype):
    """Aligned rows are read in chunks, others cut out of two: the same sums in the same order."""
    rows, tokens = (torch.randn(1, vocab) * 3).to(dtype), torch.randint(0, vocab, (1,))
    weights = torch.ones(3, 1, dtype=torch.float64)
    want = cases.score(rows, tokens, weights, "emulated")
    for shift in range(1, 16 // dtype.itemsize):
        moved = torch.zeros(1, vocab + 16, dtype=dtype)[:, shift : shift + vocab]
        moved.copy_(rows)
        got = cases.score(moved, tokens, weights, "emulated")
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def every_result():
    """All outputs of all entries; some rows idle, masked, unaligned or without a maximum."""
    torch.manual_seed(1)
    logits = cases.logits_of("unaligned", 3001, torch.bfloat16)
    logits[0, 1], logits[1, 0, ::2] = -math.inf, -math.inf
    tokens = torch.randint(0, 3001, (2, 3))
    weights = torch.randn(3, 2, 3, dtype=torch.float64)
    weights[:, 1, 1] = 0
    mask = torch.tensor([[True, True, False], [True, True, True]])
    results = [*cases.score(logits, tokens, weights, "emulated", mask=mask)]
    temperature = torch.tensor([[0.7, 0.0, 1.0], [1e-3, 2.0, 0.0]])
    for log, dtype in itertools.product((False, True), (torch.bfloat16, torch.float32)):
        results += cases.softmax(logits, temperature, log, dtype, "emulated")
    for config in cases.policy_configs()[::17]:
        inputs = cases.policy_batch("random", "ragged", dict.fromkeys(cases.OPTIONAL, True), False)
        results += cases.run_policy(config, inputs, "emulated", torch.float32)
    return (
        results
        + cases.gae_results("emulated")
        + cases.kept_results("emulated")
        + cases.kept_logits_results("emulated")
    )


def test_bits_do_not_depend_on_the_order_of_threads(floor):
    want = every_result()  # threads by index
    for seed in (1, 2, 3, 0):
        for word in (
            "token_logprobs",
            "kept_token_logprobs",
            "kept_logits",
            "temperature_softmax",
            "policy_loss",
            "gae",
        ):
            floor.library(word).seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(every_result(), want, strict=True))


@pytest.mark.parametrize(
    "config",
    cases.policy_configs(),
    ids=lambda c: f"{c.level}-{c.rule}-{c.cap}-{c.kl}-{c.aggregation}",
)
def test_policy_loss_against_float64(config):
    for inputs in cases.policy_inputs(config):
        cases.assert_policy(config, inputs, "emulated")


@pytest.mark.parametrize("level", ("token", "sequence"))
def test_policy_loss_of_overflowing_ratios(level):
    config = cases.PolicyLossConfig(**{**vars(cases.EXTREME), "level": level})
    cases.assert_policy(config, cases.overflowing(), "emulated", truth=torch.float32)
    cases.assert_silent(level, "emulated")


def test_policy_loss_drops_what_is_not_finite():
    for config in cases.policy_configs()[3::5]:
        cases.assert_policy(config, cases.partly_lost(), "emulated")


def test_small_grids():
    """What the sanitizers run: every kernel and dtype, edges of rows included, few threads."""
    for dtype in cases.DTYPES:
        for vocab, layout in ((7, "contiguous"), (300, "unaligned"), (264, "shifted")):
            logits = cases.logits_of(layout, vocab, dtype)
            cases.assert_scores(logits, torch.randint(0, vocab, (2, 3)), "emulated")
            for log, result in ((False, dtype), (True, torch.float32)):
                temperature = torch.tensor([[0.7, 0.0, 1.0], [1e-3, 2.0, 0.0]])
                assert_softmax("emulated", logits, temperature, log, result)
    cases.assert_kept("emulated")
    cases.assert_kept_logits("emulated")
    for config in cases.policy_configs()[::19]:
        inputs = cases.policy_batch("random", "ragged", dict.fromkeys(cases.OPTIONAL, True), True)
        cases.assert_policy(config, inputs, "emulated")
    cases.gae_results("emulated")  # its values are compared in tests/test_gae.py


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ("asan", "tsan"))
def test_sanitizers_find_nothing(flavour):
    outcome = run_sanitized(flavour, "pytest", __file__, "-q", "-k", "test_small_grids")
    assert outcome.returncode == 0 and "1 passed" in outcome.output, outcome.output[-4000:]
