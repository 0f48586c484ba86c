"""Advantages from rewards, in plain torch: ``groups`` for one reward an answer, ``tokens`` for
rewards of tokens and for whitening.
"""

from pyllmtune.advantages.groups import (
    GROUP_PRESETS,
    gpg_advantages,
    group_advantages,
    multi_objective_advantages,
    pass_at_k_advantages,
)
from pyllmtune.advantages.tokens import (
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    remax_advantages,
    rewards_to_go,
    whiten,
)

__all__ = [
    "GROUP_PRESETS",
    "gpg_advantages",
    "group_advantages",
    "multi_objective_advantages",
    "pass_at_k_advantages",
    "reinforce_plus_plus_advantages",
    "reinforce_plus_plus_baseline_advantages",
    "remax_advantages",
    "rewards_to_go",
    "whiten",
]
