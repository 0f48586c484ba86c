"""Fused kernels for decoding and tuning language models, on the CPU and on GPUs, under one Python
API.
"""

from pyllmtune import _triton  # noqa: F401  registers the Triton floor
from pyllmtune._version import __version__
from pyllmtune.advantages import (
    GROUP_PRESETS,
    gpg_advantages,
    group_advantages,
    multi_objective_advantages,
    pass_at_k_advantages,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    remax_advantages,
    rewards_to_go,
    whiten,
)
from pyllmtune.decoding.beam_search import BeamSearchOutput, beam_search, reorder_cache
from pyllmtune.decoding.sample_beams import sample_beams
from pyllmtune.decoding.search_tree import SearchTree, plot_search_tree
from pyllmtune.kept import KeptTokens
from pyllmtune.losses.config import PolicyLossConfig
from pyllmtune.losses.dpo import dpo_loss
from pyllmtune.losses.kto import kto_loss
from pyllmtune.losses.metrics import PolicyLossMetrics
from pyllmtune.losses.off_policy import (
    effective_sample_share,
    importance_weights,
    off_policy_sequence_mask,
    rejection_mask,
    top_entropy_mask,
)
from pyllmtune.losses.ppo import grpo_loss, ppo_clip_loss
from pyllmtune.losses.preference import PreferencePairs, preference_loss, preference_pairs
from pyllmtune.losses.reference_free import cpo_loss, orpo_loss, simpo_loss
from pyllmtune.losses.reinforce import reinforce_loss
from pyllmtune.losses.value import ValueLossOutput, value_loss
from pyllmtune.ops.beam_step import BeamStep, beam_step
from pyllmtune.ops.filter_logits import filter_logits
from pyllmtune.ops.gae import GaeOutput, gae
from pyllmtune.ops.kl_divergence import kl_divergence
from pyllmtune.ops.linear_policy_loss import linear_policy_loss
from pyllmtune.ops.linear_token_logprobs import linear_token_logprobs
from pyllmtune.ops.policy_loss import PolicyLossOutput, policy_loss
from pyllmtune.ops.sample import SampleOutput, greedy, sample
from pyllmtune.ops.temperature_softmax import temperature_softmax
from pyllmtune.ops.token_logprobs import TokenLogprobs, token_logprobs
from pyllmtune.rewards import keyword_reward
from pyllmtune.scoring import score_answers

__all__ = [
    "GROUP_PRESETS",
    "BeamSearchOutput",
    "BeamStep",
    "GaeOutput",
    "KeptTokens",
    "PolicyLossConfig",
    "PolicyLossMetrics",
    "PolicyLossOutput",
    "PreferencePairs",
    "SampleOutput",
    "SearchTree",
    "TokenLogprobs",
    "ValueLossOutput",
    "__version__",
    "beam_search",
    "beam_step",
    "cpo_loss",
    "dpo_loss",
    "effective_sample_share",
    "filter_logits",
    "gae",
    "gpg_advantages",
    "greedy",
    "group_advantages",
    "grpo_loss",
    "importance_weights",
    "keyword_reward",
    "kl_divergence",
    "kto_loss",
    "linear_policy_loss",
    "linear_token_logprobs",
    "multi_objective_advantages",
    "off_policy_sequence_mask",
    "orpo_loss",
    "pass_at_k_advantages",
    "plot_search_tree",
    "policy_loss",
    "ppo_clip_loss",
    "preference_loss",
    "preference_pairs",
    "reinforce_loss",
    "reinforce_plus_plus_advantages",
    "reinforce_plus_plus_baseline_advantages",
    "rejection_mask",
    "remax_advantages",
    "reorder_cache",
    "rewards_to_go",
    "sample",
    "sample_beams",
    "score_answers",
    "simpo_loss",
    "temperature_softmax",
    "token_logprobs",
    "top_entropy_mask",
    "value_loss",
    "whiten",
]
