"""policy_loss and its config: each kind of bad input is refused by name."""

from __future__ import annotations

import math

import pytest
import torch

from pyllmtune import PolicyLossConfig, policy_loss

LP = torch.zeros(2, 3)
ADV = torch.zeros(2)
BAD = {
    "logprobs must be \\[B, T\\]": ((LP[0], LP[0], ADV), {}),
    "logprobs must be \\[total\\] with cu_seqlens": (
        (LP, LP, ADV),
        {"cu_seqlens": torch.tensor([0, 3, 6])},
    ),
    "old_logprobs must have shape \\[2, 3\\]": ((LP, LP[:, :2], ADV), {}),
    "old_logprobs must be a torch.Tensor": ((LP, None, ADV), {}),
    "advantages must have shape \\[2\\]": ((LP, LP, torch.zeros(3)), {}),
    "advantages must be one of float32": ((LP, LP, ADV.long()), {}),
    "mask must have shape": ((LP, LP, ADV, torch.ones(2)), {}),
    "ref_logprobs must have shape": ((LP, LP, ADV), {"ref_logprobs": LP[:1]}),
    "weights must have shape \\[2, 3\\], the shape of logprobs, or broadcast": (
        (LP, LP, ADV),
        {"weights": torch.ones(4, 5)},
    ),
    "needs ref_logprobs=": ((LP, LP, ADV), {"config": PolicyLossConfig(kl="k3", kl_coef=0.1)}),
    "needs entropy=": ((LP, LP, ADV), {"config": PolicyLossConfig(entropy_coef=0.1)}),
    "needs normalizer=": ((LP, LP, ADV), {"config": PolicyLossConfig(aggregation="constant")}),
    "normalizer must be positive and finite, got 0": ((LP, LP, ADV), {"normalizer": 0}),
    "normalizer must be a number or a 0-d tensor": ((LP, LP, ADV), {"normalizer": torch.ones(2)}),
    "must rise from 0 to 3": ((LP[0], LP[0], ADV), {"cu_seqlens": torch.tensor([0, 2, 4])}),
    "must rise from 0 to 3, the number of tokens; got \\[0, 5, 3\\]": (
        (LP[0], LP[0], ADV),
        {"cu_seqlens": torch.tensor([0, 5, 3])},
    ),
    "cu_seqlens must be one of int64": ((LP[0], LP[0], ADV), {"cu_seqlens": torch.zeros(3)}),
    "logprobs must be one of float32": ((LP.int(), LP, ADV), {}),
}


@pytest.mark.parametrize("message", BAD, ids=lambda message: message[:40])
@pytest.mark.parametrize("backend", ("reference", "cpp"))
def test_bad_input_is_refused_by_name(message, backend):
    args, options = BAD[message]
    with pytest.raises((TypeError, ValueError), match=message):
        policy_loss(*args, backend=backend, **options)


BAD_CONFIGS = {
    "level must be one of token, sequence, .*, got 'word'": {"level": "word"},
    "rule must be one of ppo, .*, got 'tppo'": {"rule": "tppo"},
    "eps_low must be in \\[0, 1\\], got 1.5": {"eps_low": 1.5},
    "eps_high must be at least 0, got nan": {"eps_high": math.nan},
    "cap must be greater than 1.2, got 1.1": {"cap": 1.1},
    "level='geometric' clips log-ratios itself, got rule='ppo'": {"level": "geometric"},
    "sapo_tau must be two numbers in \\(0, 80\\]": {"sapo_tau": (0.0, 1.0)},
    "vespo_gamma must be four finite numbers": {"vespo_gamma": (1.0, math.inf, 1.0, 1.0)},
    "log_ratio_limit must be positive, got 0.0; infinity means none": {"log_ratio_limit": 0.0},
    "score_limits must be \\(lower, upper\\)": {"score_limits": (1.0, 1.0)},
    "cap belongs to rule='ppo'": {"cap": 3.0, "rule": "cispo"},
    "kl_coef=0.1 needs an estimator": {"kl_coef": 0.1},
    "entropy_coef must be finite": {"entropy_coef": math.nan},
}


@pytest.mark.parametrize("message", BAD_CONFIGS, ids=lambda message: message[:40])
def test_bad_configs_are_refused(message):
    with pytest.raises(ValueError, match=message):
        PolicyLossConfig(**BAD_CONFIGS[message])
