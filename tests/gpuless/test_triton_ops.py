"""The Triton kernels in the guarded interpreter: values, bounds, races, and bytes, exactly."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from pyllmtune import beam_step
from pyllmtune.ops.kept_logits import kept_logits

from . import gpu_cases as cases
from .toolchain import require
from .triton_launches import compiled_launches

# numpy warns of the infinities that are computed with here
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

IDLE_SCALARS = 4 * (2 + 3)  # row maximum, log sum, three upstream gradients
ACTIVE_SCALARS = IDLE_SCALARS + 4 + 8  # entropy, token


@pytest.fixture(autouse=True)
def traffic():
    require("triton")
    import pyllmtune._triton  # noqa: F401  registers the floor

    from .triton_guard import guard

    with guard() as seen:
        yield seen


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("vocab", (*cases.VOCABS, 5003))
def test_scores_against_float64(vocab, dtype, layout):
    logits = cases.logits_of(layout, vocab, dtype)
    tokens = torch.randint(0, vocab, (2, 3))
    mask = torch.tensor([[True, True, False], [True, False, True]])
    cases.assert_scores(logits, tokens, "triton", temperature=0.8)
    cases.assert_scores(logits, tokens, "triton", temperature=torch.rand(2, 3) + 0.5, mask=mask)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("vocab", (7, 5003))
@pytest.mark.parametrize("poison", (math.nan, math.inf))
def test_special_rows(vocab, dtype, poison):
    """-inf in whole tiles, at the target, everywhere; NaN and +inf among finite logits and -inf."""
    logits, tokens = (
        cases.logits_of("contiguous", vocab, dtype),
        torch.zeros(2, 3, dtype=torch.int64),
    )
    logits[0, 0, : vocab - 2] = -math.inf
    logits[0, 1] = -math.inf
    logits[1, 0, vocab // 2] = poison
    logits[1, 1] = -math.inf
    logits[1, 1, vocab - 1] = poison
    got = cases.score(logits, tokens, torch.ones(3, 2, 3), "triton")
    finite = torch.tensor([[True, False, True], [False, False, True]])
    cases.assert_scores(logits[finite], tokens[finite], "triton")
    assert (
        got.logprobs[0, 1] == -math.inf
        and got.entropy[0, 1] == 0
        and got.logsumexp[0, 1] == -math.inf
    )
    assert (got.gradient[0, 1] == 0).all() and (got.gradient[0, 0, : vocab - 2] == 0)[1:].all()
    for value in got:
        assert (
            value[1, :2].isnan().all()
            and not value[0].isnan().any()
            and not value[1, 2].isnan().any()
        )


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("vocab", (1, 128, 257, 5003))
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_forward_reads_each_selected_row_once(traffic, vocab, dtype, layout):
    """Beside the row: its target once more, 8 bytes of token, 1 of mask. 5 results are written."""
    logits, tokens = cases.logits_of(layout, vocab, dtype), torch.zeros(2, 3, dtype=torch.int64)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    cases.token_logprobs(logits, tokens, mask=mask, backend="triton")
    rows, selected = mask.numel(), int(mask.sum())
    assert traffic.loaded == selected * ((vocab + 1) * dtype.itemsize + 8) + rows
    assert traffic.stored == rows * 5 * 4
    assert [launch.kernel for launch in traffic.launches] == ["_token_logprobs_fwd_kernel"]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("vocab", (1, 128, 257, 5003))
@pytest.mark.parametrize("inplace", (False, True))
def test_backward_is_one_read_and_one_write(traffic, vocab, dtype, inplace):
    """Idle rows are written and not read. Each program reads the scalars of its row."""
    leaf = cases.logits_of("shifted", vocab, dtype).requires_grad_()
    logits, tokens = leaf * 1.0, torch.zeros(2, 3, dtype=torch.int64)
    upstream = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]])
    out = cases.token_logprobs(logits, tokens, inplace_backward=inplace, backend="triton")
    torch.autograd.grad(out.logprobs, logits, upstream)
    launch = traffic.launches[-1]
    assert launch.kernel == "_token_logprobs_bwd_kernel"
    rows, active = upstream.numel(), int((upstream != 0).sum())
    programs = -(-vocab // (4096 if dtype == torch.float32 else 8192))
    scalars = programs * (active * ACTIVE_SCALARS + (rows - active) * IDLE_SCALARS)
    assert launch.loaded - scalars == active * vocab * dtype.itemsize
    assert launch.stored == rows * vocab * dtype.itemsize


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("vocab", (1, 128, 257, 5003))
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_softmax_bytes(traffic, vocab, dtype, layout):
    """Forward reads a row twice, a greedy one three times; backward two rows twice. Each writes one
    row; a row's temperature is 4 bytes to read and its gradient 4 to write.
    """
    logits = cases.logits_of(layout, vocab, dtype)
    temperature = torch.tensor([[0.7, 0.0, 1.0], [1.0, 2.0, 0.0]])
    cases.softmax(logits, temperature, False, dtype, "triton")
    forward, backward = traffic.launches
    rows, size = temperature.numel(), vocab * dtype.itemsize
    assert forward.kernel == "_temperature_softmax_fwd_kernel"
    assert forward.loaded == (2 * rows + 2) * size + 4 * rows
    assert forward.stored == rows * size
    assert backward.kernel == "_temperature_softmax_bwd_kernel"
    assert backward.loaded == 4 * rows * size + 4 * rows
    assert backward.stored == rows * size + 4 * rows


@pytest.mark.parametrize("index", range(len(cases.policy_configs())))
def test_policy_loss_against_float64(index):
    """Every config with every 13th of its inputs, each from another one on: 300 of 3,840."""
    config = cases.policy_configs()[index]
    for inputs in list(cases.policy_inputs(config))[index % 13 :: 13]:
        cases.assert_policy(config, inputs, "triton")


@pytest.mark.parametrize("level", ("token", "sequence"))
def test_policy_loss_of_overflowing_ratios(level):
    config = cases.PolicyLossConfig(**{**vars(cases.EXTREME), "level": level})
    cases.assert_policy(config, cases.overflowing(), "triton", truth=torch.float32)
    cases.assert_silent(level, "triton")


def test_policy_loss_drops_what_is_not_finite():
    for config in cases.policy_configs()[3::5]:
        cases.assert_policy(config, cases.partly_lost(), "triton")


@pytest.mark.parametrize("level, sweeps", (("token", 1), ("sequence", 3)))
def test_policy_loss_bytes(traffic, level, sweeps):
    """Token level reads everything once; sequence level sweeps twice more, for the score and
    for the gradient through it.
    """
    given = dict.fromkeys(cases.OPTIONAL, True)
    inputs = cases.policy_batch("none", "padded", given, per_token=True)
    config = cases.PolicyLossConfig(level=level, kl="k3", kl_coef=0.1)
    cases.policy_loss(**inputs, config=config, backend="triton")
    tokens, sequences = inputs["logprobs"].numel(), inputs["logprobs"].shape[0]
    once = 6 * 4  # log-probs, old, reference, advantage, weight, entropy
    launch = traffic.launches[0]
    assert launch.loaded == tokens * once * sweeps + sequences * 2 * 8
    assert launch.stored == tokens * 2 * 4 + sequences * 16 * 8


@pytest.mark.parametrize("options", (False, True))
def test_gae_bytes(traffic, options):
    """Reward and value of selected tokens, the flags; offsets and what a sequence has of its own.
    The mask is read of every token, the rest of those that it selects. Two results are written.
    """
    mask, ends = (torch.rand(3, 7) > 0.5 if options else None for _ in range(2))
    rows = torch.rand(3) if options else None
    given = {"gamma": rows, "lam": rows, "bootstrap": rows} if options else {}
    x = torch.randn(3, 7)
    cases.gae(x, x, mask, terminated=ends, backend="triton", **given)
    (launch,) = traffic.launches
    selected = int(mask.sum()) if options else 21
    once = 3 * (2 * 8 + (3 * 4 if options else 0)) + (21 if options else 0)
    assert launch.loaded == once + selected * (2 * 4 + (1 if options else 0))
    assert launch.stored == 21 * 2 * 4


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_kept_bytes(traffic, dtype):
    """An id and a logit for each kept token, in backward again, and its gradient; of masked and
    idle rows neither.
    """
    leaf = cases.logits_of("shifted", 700, dtype).requires_grad_()
    kept = cases.kept_sets(6, 700)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    tokens, upstream = torch.zeros(2, 3, dtype=torch.int64), mask * torch.tensor([1.0, 0.0, 2.0])
    out = cases.token_logprobs(leaf, tokens, mask=mask, kept=kept, backend="triton")
    torch.autograd.grad(out.logprobs, leaf, upstream)
    forward, backward = traffic.launches
    read = int(kept.counts[mask.flatten()].sum())
    active = (upstream.flatten() != 0) & (kept.counts > 0)
    written = int(kept.counts[active].sum())
    each = dtype.itemsize + 4
    assert forward.loaded == read * each + 6 + 5 * (8 + 16)  # mask; token, begin and end
    assert forward.stored == 6 * 5 * 4
    own = 4 + 8 + 16  # entropy, token, begin and end
    assert backward.loaded == written * each + 6 * (IDLE_SCALARS + 1) + int(active.sum()) * own
    assert backward.stored == written * dtype.itemsize


def test_kept_against_float64():
    cases.assert_kept("triton")
    cases.assert_kept_logits("triton")


@cases.kept_by_dots
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_kept_logits_bytes(traffic, dtype):
    """A row of the weight for each entry and of hidden for each four; backward leaves out entries
    without gradient, and writes a row for each row of hidden and each id.
    """
    rows, size, vocab = 4, 70, 40
    kept = cases.kept_sets(rows, vocab)
    hidden, weight = (torch.randn(n, size).to(dtype).requires_grad_() for n in (rows, vocab))
    logits = kept_logits(hidden, weight, kept, None, "triton")
    upstream = torch.arange(len(logits)) % 3.0
    torch.autograd.grad(logits, (hidden, weight), upstream)
    forward, by_hidden, by_weight = traffic.launches
    entries, active, row = len(logits), int((upstream != 0).sum()), size * dtype.itemsize
    fours = int(((kept.counts + 3) // 4).sum())
    assert forward.loaded == (entries + fours) * row + 4 * entries + 16 * rows
    assert forward.stored == 4 * entries
    assert by_hidden.loaded == active * row + 8 * entries + 16 * rows
    assert by_hidden.stored == rows * row
    # id, the one before, the one after; gradient; where there is one, the row
    assert by_weight.loaded == active * (row + 8) + entries * (4 + 4 + 4 + 4) - 2 * 4
    assert by_weight.stored == len(kept.token_ids.unique()) * row


@pytest.mark.parametrize("vocab", (7, 5003))
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_beam_step_reads_each_live_row_once(traffic, vocab, dtype):
    """Beside the row, the beam's score in each of its parts; of a finished beam that alone."""
    logits, parts = cases.logits_of("unaligned", vocab, dtype), -(-vocab // 4096)
    scores = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf, -1.0, -math.inf]])
    beam_step(logits, scores, num_beams=3, backend="triton")
    rows, merge = traffic.launches
    assert [rows.kernel, merge.kernel] == ["_beam_rows_kernel", "_beam_merge_kernel"]
    assert rows.loaded == 3 * vocab * dtype.itemsize + 6 * parts * 4
    assert rows.stored == 3 * parts * (2 * 4 + 6 * 8)  # maximum and sum, six tokens


def test_triton_is_imported_when_an_operator_is_called():
    code = "import sys, pyllmtune; assert 'triton' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_launches_compile_for_a_gpu():
    """What the interpreter skips. 16-byte accesses wherever V and the strides allow them."""
    require("cuobjdump")
    launches = compiled_launches()
    assert all(launch["cached"] for launch in launches), "a second, equal call compiled again"
    assert not any(launch["spills"] for launch in launches)
    least = {
        "_token_logprobs_bwd_kernel": 4,
        "_temperature_softmax_fwd_kernel": 2,
        "_temperature_softmax_bwd_kernel": 1,
        "_filter_logits_bwd_kernel": 2,
    }
    # four tokens a thread, or gathered one by one
    narrow = ("sample_scores_kernel", "sample_kept_ids_kernel", "_beam_merge_kernel")
    narrow += tuple(f"_kept_token_logprobs_{way}_kernel" for way in ("fwd", "bwd"))
    narrow += tuple(f"_kept_logits_{way}_kernel" for way in ("fwd", "bwd_hidden", "bwd_weight"))
    for launch in launches:
        if "V32000" in launch["call"]:
            assert launch["loads_128"] >= 2 or launch["kernel"] in narrow
            assert launch["stores_128"] >= least.get(launch["kernel"], 0)
