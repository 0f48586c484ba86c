"""Calls that type checkers must refuse: each marked line, with that error, and no other line."""

from __future__ import annotations

import torch
from torch import nn

import pyllmtune
from pyllmtune import KeptTokens, PolicyLossConfig
from pyllmtune.integrations import transformers, trl
from pyllmtune.nn import DPOLoss, GRPOLoss, LogprobHead, PolicyLoss
from pyllmtune.rewards import keyword_reward, regex_reward

x = torch.randn(2, 3)

pyllmtune.token_logprobs([[0.0, 1.0]], x)  # error: arg-type
pyllmtune.token_logprobs(x, x, temperature="hot")  # error: arg-type
pyllmtune.token_logprobs(x, x, backend="gpu")  # error: arg-type
pyllmtune.token_logprobs(x, x, x)  # error: call-arg
print(pyllmtune.token_logprobs(x, x).probs)  # error: attr-defined
pyllmtune.linear_token_logprobs(x, x, x, kept=x)  # error: arg-type
pyllmtune.linear_token_logprobs(x, x)  # error: call-arg
pyllmtune.kl_divergence(x, x, reverse="yes")  # error: arg-type
pyllmtune.temperature_softmax(x, dtype="float32")  # error: arg-type
pyllmtune.filter_logits(x, top_k=0.5)  # error: arg-type
pyllmtune.filter_logits(x, order="HF")  # error: arg-type
pyllmtune.sample(x, logprobs="natural")  # error: arg-type
pyllmtune.sample(x).logprobs.sum()  # error: union-attr
pyllmtune.sample(x, top_q=0.9)  # error: call-arg
pyllmtune.beam_step(x, x)  # error: call-arg
pyllmtune.beam_search(x, x, num_beams=2, max_length=3, eos_token_id=1)  # error: arg-type
pyllmtune.policy_loss(x, x, x, config={"rule": "ppo"})  # error: arg-type
pyllmtune.gae(x, x, gamma=None)  # error: arg-type
pyllmtune.group_advantages(x, baseline="median")  # error: arg-type
pyllmtune.dpo_loss(x, x, loss_type="dpo")  # error: arg-type
pyllmtune.no_such_op(x)  # error: attr-defined
PolicyLossConfig(rule="clipped")  # error: arg-type
PolicyLossConfig(eps_low="0.2")  # error: arg-type
PolicyLossConfig(epsilon=0.2)  # error: call-arg
PolicyLossConfig().eps_low = 0.3  # error: misc
KeptTokens.from_mask(3)  # error: arg-type
KeptTokens(x)  # error: call-arg
keyword_reward(x, ["a"])  # error: arg-type
regex_reward(["a"], 3)  # error: arg-type
LogprobHead(x)  # error: arg-type
LogprobHead(nn.Linear(3, 4))(x)  # error: call-arg
GRPOLoss(0.2)  # error: call-arg
GRPOLoss(preset=3)  # error: arg-type
PolicyLoss()(x, x, "advantages")  # error: arg-type
print(PolicyLoss()(x, x, x).value)  # error: attr-defined
DPOLoss(beta="0.1")  # error: arg-type
DPOLoss()(x, None)  # error: arg-type
trl.patch(True)  # error: call-arg
trl.patch(allow_untested="yes")  # error: arg-type
transformers.FilterLogits(top_k="9")  # error: arg-type
transformers.causal_lm_loss(x, x)  # error: call-arg
