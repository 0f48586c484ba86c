"""The algorithms of ``--algorithm``: an objective, and its two libraries."""

from __future__ import annotations

from typing import NamedTuple

from pyllmtune import PolicyLossConfig
from pyllmtune.demo import dpo, eager, eager_dpo, eager_ppo, fused, ppo
from pyllmtune.demo.losses import Library, Objective, objectives

NAMES = ("grpo", "ppo", "dpo", "reinforce")


class Algorithm(NamedTuple):
    objective: Objective
    libraries: tuple[Library, Library]  # ours, eager PyTorch


def algorithm(name: str, loss: str, kl_coef: float, entropy_coef: float) -> Algorithm:
    """The algorithm of this name; ``loss`` is one of ``objectives``, for ``"grpo"`` alone."""
    if name == "grpo":
        objective = objectives(kl_coef, entropy_coef)[loss]
        return Algorithm(objective, (fused.LIBRARY, eager.LIBRARY))
    if name == "dpo":
        return Algorithm(
            Objective(offline=True, learning_rate=1e-4), (dpo.LIBRARY, eager_dpo.LIBRARY)
        )

    terms = {"kl": "k3", "kl_coef": kl_coef, "entropy_coef": entropy_coef}
    if name == "ppo":
        objective = Objective(config=PolicyLossConfig(**terms), critic=True)
        return Algorithm(objective, (ppo.LIBRARY, eager_ppo.LIBRARY))
    # on its own answers once: the ratio is 1 and -A logprob is left, pyllmtune.reinforce_loss
    config = PolicyLossConfig(rule="cispo", aggregation="seq-mean-token-sum", **terms)
    return Algorithm(Objective(config=config, updates=1), (fused.LIBRARY, eager.LIBRARY))
