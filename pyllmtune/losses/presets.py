"""Presets of PolicyLossConfig: the policy loss of each trainer under its own name, with the divisor
that the trainer uses; ``explain`` says in what two of them differ.

The normalizer is the caller's to give, because only the caller knows the large batch; a preset says
what its trainer divides by, for the loss of a micro-batch. GA is the number of micro-batches that
are accumulated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from pyllmtune.losses.config import PolicyLossConfig


@dataclass(frozen=True)
class Preset:
    """A trainer's policy loss.

    Attributes:
        config: the loss; eps and coefficients are the trainer's defaults.
        normalizer: what the trainer divides by.
        caller: what else the trainer does before or after, with the function that does it here.
    """

    config: PolicyLossConfig
    normalizer: str
    caller: str = ""


_PPO = PolicyLossConfig()
_BY_ANSWER = PolicyLossConfig(aggregation="seq-mean-token-mean")
_SEQUENCES = "sequences x GA"
_VERL_TOKENS = "tokens of the global batch / processes"
_VERL_SEQUENCES = "sequences with a token in the global batch / processes"
_NEMO_KL = {
    "kl": "k3",
    "kl_gradient": "score",
    "kl_coef": 0.01,
    "kl_input_limit": 20.0,
    "kl_limit": 10.0,
}


def _config(base: PolicyLossConfig = _PPO, **changes) -> PolicyLossConfig:
    return PolicyLossConfig(**{**vars(base), **changes})


PRESETS: dict[str, Preset] = {
    "lecture": Preset(
        _config(_BY_ANSWER, level="sequence-sum", rule="unclipped"),
        "answers of the group",
        "old_logprobs are those of the reference; add 0.1 * kl_divergence",
    ),
    # TRL 1.16; with vLLM, weights are importance_weights(...)
    "trl.grpo": Preset(_BY_ANSWER, _SEQUENCES),
    "trl.bnpo": Preset(_PPO, "tokens of the micro-batch x GA"),
    "trl.dr_grpo": Preset(
        _config(aggregation="constant"), "sequences x max_completion_length x GA"
    ),
    "trl.dapo": Preset(
        _PPO, "tokens of the generation batch / processes x GA / steps_per_generation"
    ),
    "trl.cispo": Preset(
        _config(rule="cispo", eps_low=1.0, eps_high=4.0),
        "as trl.dapo",
        "TRL's epsilon_high is the bound of the ratio itself: 5 is eps_high=4",
    ),
    "trl.sapo": Preset(_config(_BY_ANSWER, rule="sapo"), _SEQUENCES),
    "trl.luspo": Preset(_config(level="sequence", aggregation="seq-mean-token-sum"), _SEQUENCES),
    "trl.vespo": Preset(
        _config(
            level="sequence-sum",
            rule="vespo",
            log_ratio_limit=20.0,
            score_limits=(math.log(1e-8), 20.0),
        ),
        "as trl.dapo",
        "weights per token become part of the ratio",
    ),
    "trl.gspo": Preset(
        _config(_BY_ANSWER, level="sequence", eps_low=3e-4, eps_high=4e-4), _SEQUENCES
    ),
    "trl.rloo": Preset(_config(_BY_ANSWER, level="sequence-sum"), "sequences"),
    # verl
    "verl.vanilla": Preset(_config(cap=3.0, log_ratio_limit=20.0), _VERL_TOKENS),
    "verl.gspo": Preset(
        _config(
            _BY_ANSWER,
            level="seq-token",
            eps_low=3e-4,
            eps_high=4e-4,
            score_limits=(-math.inf, 10.0),
        ),
        _VERL_SEQUENCES,
    ),
    "verl.cispo": Preset(_config(rule="cispo", log_ratio_limit=20.0), _VERL_TOKENS),
    "verl.gmpo": Preset(
        _config(_BY_ANSWER, level="geometric", rule="unclipped", eps_low=0.4, eps_high=0.4),
        "sequences of the micro-batch",
        "rollout weights are the geometric mean of a sequence's",
    ),
    "verl.sapo": Preset(_config(_BY_ANSWER, rule="sapo", log_ratio_limit=20.0), _VERL_SEQUENCES),
    "verl.dppo_tv": Preset(_config(rule="dppo-tv", cap=20.0, log_ratio_limit=20.0), _VERL_TOKENS),
    "verl.dppo_kl": Preset(_config(rule="dppo-kl", cap=20.0, log_ratio_limit=20.0), _VERL_TOKENS),
    "verl.clip_cov": Preset(_PPO, _VERL_TOKENS, "weights are clip_cov_weights(...)"),
    "verl.kl_cov": Preset(
        _config(rule="unclipped", kl="abs", kl_coef=1.0),
        _VERL_TOKENS,
        "ref_logprobs are kl_cov_reference(...)",
    ),
    "verl.gpg": Preset(_config(rule="reinforce"), _VERL_TOKENS),
    # others
    "nemo.grpo": Preset(_config(**_NEMO_KL), "valid tokens of the global batch"),
    "nemo.cispo": Preset(_config(rule="cispo", **_NEMO_KL), "valid tokens of the global batch"),
    "openrlhf.ppo": Preset(_config(log_ratio_limit=20.0), "tokens of the micro-batch"),
    "openrlhf.gspo": Preset(
        _config(_BY_ANSWER, level="sequence"),
        "sequences of the micro-batch",
        "with importance sampling on, old_logprobs are the rollout's",
    ),
    "slime.cispo": Preset(_config(_BY_ANSWER, rule="cispo"), "sequences of the global batch"),
    "open_instruct.cispo": Preset(
        _config(rule="cispo", eps_low=1.0), "tokens of the accumulated batch"
    ),
    "torchrl.cispo": Preset(_config(rule="clip"), "tokens"),
    "liger.luspo": Preset(
        _config(level="sequence", aggregation="length-weighted"), "sequences x padded length"
    ),
    "prime_rl.default": Preset(
        _config(rule="prime", kl="k2", kl_coef=2e-3, aggregation="constant"),
        "the global loss scale",
        "old_logprobs and ref_logprobs are the rollout's: the term is kl_tau (log-ratio)^2",
    ),
    "roll.topr": Preset(
        _config(rule="topr", eps_low=1.0, eps_high=0.0),
        "tokens",
        "split by the sign of the advantage; by raw score: rule='cispo', with the log-probs "
        "themselves as old where the score is positive",
    ),
}


def get(name: str) -> Preset:
    """The preset of that name; a ``ValueError`` lists the names there are."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]


def explain(first: str, second: str) -> None:
    """Print in what two presets differ, a line for each field.

    >>> explain("trl.gspo", "verl.gspo")
    preset        trl.gspo        verl.gspo
    level         sequence        seq-token
    score_limits  (-inf, inf)     (-inf, 10.0)
    normalizer    sequences x GA  sequences with a token in the global batch / processes
    """
    pair = get(first), get(second)
    rows = [("preset", first, second)]
    for field in fields(PolicyLossConfig):
        values = [str(getattr(preset.config, field.name)) for preset in pair]
        rows.append((field.name, *values))
    rows += [(name, *(getattr(p, name) or "-" for p in pair)) for name in ("normalizer", "caller")]
    shown = [row for row in rows if row[1] != row[2]]
    widths = [max((len(row[column]) for row in shown), default=0) + 2 for column in (0, 1)]
    for row in shown:
        print(f"{row[0]:{widths[0]}}{row[1]:{widths[1]}}{row[2]}".rstrip())
