"""The kernels of policy_loss that are made for common configurations, on the CPU: the same bits as
the kernel for all of them, and where every token of a sequence is alike, the reference.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from pyllmtune import PolicyLossConfig
from pyllmtune.losses.config import Aggregation
from pyllmtune.losses.metrics import SUMS
from tests import helpers
from tests.policy_cases import batch, compare, run

# never reached by a number that is not itself out of range, yet a limit: the general kernel runs
FAR = 1e30


@pytest.mark.parametrize("level", ("token", "sequence"))
@pytest.mark.parametrize("kl", ("none", "k3"))
@pytest.mark.parametrize("absent", ("", "weights", "entropy", "mask", "ref_logprobs", "all"))
@pytest.mark.parametrize("per_token", (False, True))
@pytest.mark.parametrize("length", (5, 64, 203))
def test_bits_of_the_general_kernel(level, kl, absent, per_token, length):
    data = batch(3, length, per_token=per_token)
    data["old_logprobs"][0, :2] = torch.tensor((math.nan, -40.0))
    data["mask"][0, :2] = True
    names = ("weights", "entropy", "mask", "ref_logprobs") if absent == "all" else (absent,)
    data = {name: value for name, value in data.items() if name not in names}
    if level == "sequence" and absent == "all" and not per_token:
        data["weights"] = torch.ones(3, length)  # or the kernel of uniform sequences runs
    config = PolicyLossConfig(
        level=level,
        kl=kl if "ref_logprobs" in data else "none",
        kl_coef=0.2 if kl == "k3" and "ref_logprobs" in data else 0.0,
        entropy_coef=0.05 if "entropy" in data else 0.0,
        aggregation="seq-mean-token-mean",
    )
    backend = helpers.use("cpp")
    known = run(data, config, backend, torch.float32)
    general = run(data, replace(config, log_ratio_limit=FAR), backend, torch.float32)
    for got, want in zip(known, general, strict=True):
        assert torch.equal(got, want)
    assert known[1][SUMS.index("dropped")] == 1


@pytest.mark.parametrize("level", ("sequence", "seq-token", "sequence-sum"))
@pytest.mark.parametrize("rule", ("ppo", "unclipped", "clip", "sapo"))
@pytest.mark.parametrize("aggregation", Aggregation.__args__)
@pytest.mark.parametrize("score_limits", ((-math.inf, math.inf), (-0.02, 0.02)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=helpers.dtype_id)
def test_sequences_of_uniform_tokens(level, rule, aggregation, score_limits, dtype):
    data = batch(12, 67, spread=0.3)
    data = {name: data[name] for name in ("logprobs", "old_logprobs", "advantages", "mask")}
    data["old_logprobs"] += 0.1 * torch.randn(12, 1, dtype=torch.float64)
    data["old_logprobs"][1, 5] = math.inf
    data["mask"][2] = False
    data["advantages"][3] = math.nan
    config = PolicyLossConfig(
        level=level,
        rule=rule,
        aggregation=aggregation,
        score_limits=score_limits,
        eps_low=0.05,
        eps_high=0.05,
    )
    compare(data, config, "cpp", dtype)
