"""A user's program that type checkers must accept, with the types that they must find; it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import pyllmtune
from pyllmtune import (
    BeamSearchOutput,
    BeamStep,
    GaeOutput,
    KeptTokens,
    PolicyLossConfig,
    PolicyLossMetrics,
    PolicyLossOutput,
    SampleOutput,
    TokenLogprobs,
    ValueLossOutput,
)
from pyllmtune.losses import presets
from pyllmtune.nn import DPOLoss, GRPOLoss, LogprobHead, PolicyLoss, ValueLoss
from pyllmtune.rewards import exact_answer_reward

if TYPE_CHECKING:
    from pyllmtune.integrations import transformers, trl, verl

logits, tokens = torch.randn(4, 9), torch.tensor([1, 2, 3, 4])
mask = torch.tensor([[True, True], [True, False]])
logprobs, old = torch.randn(2, 2), torch.randn(2, 2)


def scoring() -> None:
    scores = pyllmtune.token_logprobs(logits, tokens, temperature=0.7, backend="reference")
    assert_type(scores, TokenLogprobs)
    assert_type(scores.logprobs, Tensor)
    first, entropy, _ = pyllmtune.token_logprobs(logits, tokens, temperature=torch.ones(4))
    assert_type(first, Tensor)
    kept = KeptTokens.from_mask(logits > logits.mean(-1, keepdim=True))
    assert_type(kept, KeptTokens)
    assert_type(kept.to_mask(9), Tensor)
    assert_type(kept.num_rows, int)
    hidden, weight = torch.randn(4, 5), torch.randn(9, 5)
    out = pyllmtune.linear_token_logprobs(hidden, weight, tokens, softcap=30, kept=kept)
    assert_type(out.entropy, Tensor)
    assert_type(pyllmtune.kl_divergence(logits, logits + entropy[:, None], reverse=True), Tensor)
    head = LogprobHead(nn.Linear(5, 9))
    assert_type(head(hidden, tokens), TokenLogprobs)


def decoding() -> None:
    assert_type(pyllmtune.temperature_softmax(logits, 0, log=True, dtype=torch.float64), Tensor)
    assert_type(pyllmtune.filter_logits(logits, top_k=5, top_p=torch.full((4,), 0.9)), Tensor)
    drawn = pyllmtune.sample(logits, top_p=0.9, order="vllm", seed=1, logprobs=("raw", "scaled"))
    assert_type(drawn, SampleOutput)
    assert_type(drawn.tokens, Tensor)
    assert_type(drawn.kept, KeptTokens | None)
    assert_type(drawn.logprobs, Tensor | dict[str, Tensor] | None)
    assert_type(pyllmtune.greedy(logits, logprobs=True), SampleOutput)
    step = pyllmtune.beam_step(logits, torch.zeros(2, 2), num_beams=2, eos_token_id=[1, 2])
    assert_type(step, BeamStep)

    def model(tokens: Tensor, cache: Tensor | None) -> Tensor:
        return logits[tokens[:, -1] % 4]

    start = torch.tensor([[1], [2]])
    words = pyllmtune.beam_search(model, start, num_beams=2, max_length=3, eos_token_id=None)
    assert_type(words, BeamSearchOutput)
    assert_type(words.tokens, Tensor)


def tuning() -> None:
    config = PolicyLossConfig(rule="cispo", kl="k3", kl_coef=0.1, aggregation="token-mean")
    assert_type(PolicyLossConfig.preset("trl.grpo", eps_high=0.3), PolicyLossConfig)
    assert_type(presets.get("trl.grpo").config, PolicyLossConfig)
    advantages = pyllmtune.group_advantages(torch.randn(2), group_size=2, baseline="leave-one-out")
    assert_type(advantages, Tensor)
    out = pyllmtune.policy_loss(logprobs, old, advantages, mask, config=config, ref_logprobs=old)
    assert_type(out, PolicyLossOutput)
    loss, metrics = out
    assert_type(loss, Tensor)
    assert_type(metrics, PolicyLossMetrics)
    assert_type(metrics.to_dict(), dict[str, float])
    assert_type(
        PolicyLoss(config=config)(logprobs, old, advantages, mask, ref_logprobs=old),
        PolicyLossOutput,
    )
    module = GRPOLoss(kl_coef=0, eps_high=0.28)
    assert_type(module(logprobs, old, advantages, mask, normalizer=8), PolicyLossOutput)
    returns = pyllmtune.gae(logprobs, old, mask, gamma=torch.ones(2), lam=1)
    assert_type(returns, GaeOutput)
    assert_type(ValueLoss(clip=0.2)(old, returns.returns, mask, old_values=old), ValueLossOutput)
    assert_type(DPOLoss(loss_type="ipo")(logprobs[0], old[0]), Tensor)
    assert_type(pyllmtune.dpo_loss(logprobs[0], old[0], reduction="none"), Tensor)
    assert_type(exact_answer_reward(["a"], answers=["b"]), Tensor)


def integrations() -> None:  # not run: the projects may be absent
    with trl.patch(allow_untested=True) as patched:
        assert_type(patched.calls["selective_log_softmax"], int)
    assert_type(verl.register(), list[str])
    assert_type(transformers.causal_lm_loss(logits, tokens, vocab_size=9), Tensor)
    assert_type(transformers.FilterLogits(top_k=3)(None, logits), Tensor)


scoring()
decoding()
tuning()
