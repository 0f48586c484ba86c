"""policy_loss: the clipped policy objective, its gradient and its metrics.

    per token, flat [total]; sequence i is offsets[i] ... offsets[i + 1]
    -> loss and scale (0-d), metrics [16], grad_logprobs and grad_entropy [total]: times `scale`
    l_t = weight_t rule(ratio_t, A_t) + kl_coef kl(ref_t - lp_t) - entropy_coef H_t

Reads 12 to 25 bytes a token and writes 4 or 8. What the whole sequence decides (its mean log-ratio,
its length, the gradient through that mean) takes another sweep over data then in cache. One program
a sequence, then one over the sequences; threads are joined in float64, in one fixed order, without
atomics.
Limits: one program reads a whole sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INF, as_bytes, on_device
from .policy_rules import (
    CISPO,
    NO_KL,
    SEQ_MEAN_TOKEN_MEAN,
    SEQUENCE_LEVEL,
    TOKEN_MEAN,
    apply_rule,
    exp_residual,
    kl_estimate,
)

METRICS = 16  # the order of pyllmtune/losses/metrics.py
TOKENS, SEQUENCES, LOSS, RATIO = (tl.constexpr(slot) for slot in (0, 1, 3, 10))
FIRST_MAXIMUM = tl.constexpr(14)

BLOCK_T, WARPS = 256, 8  # one token a thread: its sums stay in registers
BLOCK_SEQUENCES = 128


@triton.jit
def _load_tokens(t, end, logprobs_ptr, old_ptr, mask_ptr, ref_ptr):
    """What is compared of a block of tokens; 0 where not valid, so that it enters no arithmetic."""
    selected = t < end
    if mask_ptr is not None:
        selected = selected & (tl.load(mask_ptr + t, mask=selected, other=0) != 0)
    old = tl.load(old_ptr + t, mask=selected, other=0.0)
    finite = tl.abs(old) < INF
    if ref_ptr is not None:
        ref = tl.load(ref_ptr + t, mask=selected, other=0.0)
        finite = finite & (tl.abs(ref) < INF)
    valid = selected & finite
    logprob = tl.load(logprobs_ptr + t, mask=valid, other=0.0)
    log_ratio = tl.where(valid, logprob - old, 0.0)
    delta = tl.zeros_like(old)  # ref - logprob
    if ref_ptr is not None:
        delta = tl.where(valid, ref - logprob, 0.0)
    return valid, selected & ~finite, logprob, log_ratio, delta


@triton.jit
def _load_weights(t, valid, sequence, advantages_ptr, weights_ptr, TOKEN_ADVANTAGES: tl.constexpr):
    if TOKEN_ADVANTAGES:
        advantage = tl.load(advantages_ptr + t, mask=valid, other=0.0)
    else:
        advantage = tl.where(valid, tl.load(advantages_ptr + sequence), 0.0)
    weight = valid.to(tl.float32)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + t, mask=valid, other=0.0)
    return advantage, weight


@triton.jit
def _weighted(weight, value):
    """Weight 0, as of every token that is not valid, switches off: 0 * inf would be NaN."""
    return tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def _columns4(a, b, c, d):
    """Four of [BLOCK_T], or of [BLOCK_T, n], side by side: the last axis counts a, b, c, d."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _policy_loss_fwd_kernel(
    logprobs_ptr,
    old_ptr,
    advantages_ptr,
    offsets_ptr,
    mask_ptr,
    ref_ptr,
    entropy_ptr,
    weights_ptr,
    grad_logprobs_ptr,
    grad_entropy_ptr,
    metrics_ptr,
    total,
    low,
    high,
    cap,
    kl_coef,
    entropy_coef,
    TOKEN_ADVANTAGES: tl.constexpr,
    LEVEL: tl.constexpr,
    RULE: tl.constexpr,
    KL: tl.constexpr,
    AGGREGATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Program i: the gradients of sequence i, and its row of metrics."""
    sequence = tl.program_id(0).to(tl.int64)
    # clamped: offsets on a GPU are not checked, and must not lead outside the tokens
    begin = tl.maximum(tl.load(offsets_ptr + sequence), 0)
    end = tl.minimum(tl.load(offsets_ptr + sequence + 1), total)
    block = tl.arange(0, BLOCK_T)
    zeros = tl.zeros([BLOCK_T], tl.float64)

    per_token = 1.0  # 1 / n
    mean = 0.0  # of the log-ratios
    if (LEVEL == SEQUENCE_LEVEL) or (AGGREGATION == SEQ_MEAN_TOKEN_MEAN):
        count, log_ratios = zeros, zeros
        for start in range(begin, end, BLOCK_T):
            t = start + block
            valid, _, _, log_ratio, _ = _load_tokens(
                t, end, logprobs_ptr, old_ptr, mask_ptr, ref_ptr
            )
            count += valid.to(tl.float64)
            log_ratios += log_ratio.to(tl.float64)
        n = tl.maximum(tl.sum(count, 0), 1.0)
        per_token = (1.0 / n).to(tl.float32)
        mean = (tl.sum(log_ratios, 0) / n).to(tl.float32)
    share = per_token if AGGREGATION == SEQ_MEAN_TOKEN_MEAN else 1.0

    through_mean = 0.0  # d loss / d logprob of each valid token by way of the mean
    if (LEVEL == SEQUENCE_LEVEL) and (RULE != CISPO):
        through = zeros
        for start in range(begin, end, BLOCK_T):
            t = start + block
            valid, _, logprob, log_ratio, _ = _load_tokens(
                t, end, logprobs_ptr, old_ptr, mask_ptr, ref_ptr
            )
            advantage, weight = _load_weights(
                t, valid, sequence, advantages_ptr, weights_ptr, TOKEN_ADVANTAGES
            )
            ratio = tl.exp(tl.zeros_like(log_ratio) + mean)
            _, d_log_ratio, _, _, _, _ = apply_rule(ratio, advantage, logprob, low, high, cap, RULE)
            through += _weighted(weight, d_log_ratio).to(tl.float64)
        through_mean = tl.sum(through, 0).to(tl.float32) * per_token

    # a thread sums some T / 256 tokens: float32 will do, except for the loss, whose terms cancel
    none = tl.zeros([BLOCK_T], tl.float32)
    tokens, dropped, low_clips, high_clips, cap_clips = none, none, none, none, none
    approx_kl, approx_kl_k3, kl_ref = none, none, none
    ratios, ratios_squared, entropies, weights = none, none, none, none
    loss = zeros
    lowest = tl.full([BLOCK_T], INF, tl.float32)
    highest = tl.full([BLOCK_T], -INF, tl.float32)
    for start in range(begin, end, BLOCK_T):
        t = start + block
        valid, drop, logprob, log_ratio, delta = _load_tokens(
            t, end, logprobs_ptr, old_ptr, mask_ptr, ref_ptr
        )
        advantage, weight = _load_weights(
            t, valid, sequence, advantages_ptr, weights_ptr, TOKEN_ADVANTAGES
        )
        token_ratio = tl.exp(log_ratio)
        ratio = token_ratio
        if LEVEL == SEQUENCE_LEVEL:
            ratio = tl.exp(tl.zeros_like(log_ratio) + mean)
        value, d_log_ratio, d_logprob, below, above, capped = apply_rule(
            ratio, advantage, logprob, low, high, cap, RULE
        )
        value = _weighted(weight, value)
        grad = _weighted(weight, d_logprob)
        if LEVEL == SEQUENCE_LEVEL:
            grad += tl.where(valid, through_mean, 0.0)
        else:
            grad += _weighted(weight, d_log_ratio)
        kl, d_kl = kl_estimate(delta, KL)
        if KL != NO_KL:
            value += tl.where(valid, kl_coef * kl, 0.0)
            grad += tl.where(valid, kl_coef * d_kl, 0.0)
        if entropy_ptr is not None:
            entropy = tl.load(entropy_ptr + t, mask=valid, other=0.0)
            value -= entropy_coef * entropy
            entropies += entropy
            d_entropy = tl.where(valid, 0.0 - entropy_coef * share, 0.0)
            tl.store(grad_entropy_ptr + t, d_entropy, mask=t < end)
        tl.store(grad_logprobs_ptr + t, grad * share, mask=t < end)

        loss += value.to(tl.float64)
        tokens += valid.to(tl.float32)
        dropped += drop.to(tl.float32)
        low_clips += (valid & below).to(tl.float32)
        high_clips += (valid & above).to(tl.float32)
        cap_clips += (valid & capped).to(tl.float32)
        approx_kl -= log_ratio
        approx_kl_k3 += exp_residual(log_ratio, token_ratio)
        kl_ref += kl
        shown = tl.where(valid, ratio, 0.0)
        ratios += shown
        ratios_squared += shown * shown
        weights += weight
        lowest = tl.minimum(lowest, tl.where(valid, ratio, INF))
        highest = tl.maximum(highest, tl.where(valid, ratio, -INF))

    # [BLOCK_T, 16] in the order of the metrics, so that threads are joined once for all of them
    some = tokens  # of each sequence, 1 if it has tokens
    table = _columns4(
        _columns4(tokens, low_clips, approx_kl_k3, entropies),
        _columns4(some, high_clips, kl_ref, weights),
        _columns4(dropped, cap_clips, ratios, none),
        _columns4(none, approx_kl, ratios_squared, none),
    )
    sums = tl.sum(tl.reshape(table, [BLOCK_T, 16]).to(tl.float64), 0)  # [16]
    metric = tl.arange(0, 16)
    sums = tl.where(metric == LOSS, tl.sum(loss, 0) * share, sums)
    sums = tl.where((metric == SEQUENCES) & (sums > 0.0), 1.0, sums)
    sums = tl.where(metric == FIRST_MAXIMUM, -tl.min(lowest, 0), sums)
    sums = tl.where(metric == FIRST_MAXIMUM + 1, tl.max(highest, 0), sums)
    tl.store(metrics_ptr + sequence * 16 + metric, sums)


@triton.jit
def _policy_loss_total_kernel(
    rows_ptr,
    device_normalizer_ptr,
    loss_ptr,
    metrics_ptr,
    scale_ptr,
    normalizer,
    sequences,
    AGGREGATION: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr,
):
    """One program: metrics of the batch, then loss and scale."""
    metric = tl.arange(0, 16)
    is_sum = metric < FIRST_MAXIMUM
    sums = tl.zeros([BLOCK_SEQUENCES, 16], tl.float64)
    maxima = tl.full([BLOCK_SEQUENCES, 16], -INF, tl.float64)
    for start in range(0, sequences, BLOCK_SEQUENCES):
        sequence = start + tl.arange(0, BLOCK_SEQUENCES)[:, None]  # [BLOCK_SEQUENCES, 1]
        present = sequence < sequences
        row = tl.load(
            rows_ptr + sequence.to(tl.int64) * 16 + metric[None, :], mask=present, other=0.0
        )
        sums += row
        maxima = tl.maximum(maxima, tl.where(present, row, -INF))
    summed = tl.sum(sums, 0)  # [16]
    # maxima drop NaN; the sum of the ratios, none negative, is NaN exactly if one of them is
    ratio = tl.sum(tl.where(metric == RATIO, summed, 0.0), 0)
    highest = tl.where(ratio == ratio, tl.max(maxima, 0), float("nan"))
    tl.store(metrics_ptr + metric, tl.where(is_sum, summed, highest))

    tokens = tl.sum(tl.where(metric == TOKENS, summed, 0.0), 0)
    loss = tl.sum(tl.where(metric == LOSS, summed, 0.0), 0)
    if device_normalizer_ptr is not None:
        divisor = tl.load(device_normalizer_ptr).to(tl.float64)
    else:
        counted = tokens
        if AGGREGATION != TOKEN_MEAN:
            counted = tl.sum(tl.where(metric == SEQUENCES, summed, 0.0), 0)
        divisor = tl.where(normalizer != 0.0, normalizer, counted)
    scale = tl.where(tokens > 0.0, 1.0 / divisor, 0.0)
    tl.store(scale_ptr, scale.to(tl.float32))
    tl.store(loss_ptr, (loss * scale).to(tl.float32))


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    token_advantages: bool,
    offsets: Tensor,
    mask: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    weights: Tensor | None,
    normalizer: float,
    device_normalizer: Tensor | None,
    level: int,
    rule: int,
    kl: int,
    aggregation: int,
    low: float,
    high: float,
    cap: float,
    kl_coef: float,
    entropy_coef: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    total, sequences = logprobs.shape[0], offsets.shape[0] - 1
    loss, scale = logprobs.new_empty(()), logprobs.new_empty(())
    metrics = logprobs.new_empty(METRICS, dtype=torch.float64)
    rows = logprobs.new_empty(sequences, METRICS, dtype=torch.float64)
    grad_logprobs = logprobs.new_empty(total)
    grad_entropy = logprobs.new_empty(0 if entropy is None else total)
    with on_device(logprobs):
        if sequences > 0:
            _policy_loss_fwd_kernel[(sequences,)](
                logprobs,
                old_logprobs,
                advantages,
                offsets,
                as_bytes(mask),
                ref_logprobs,
                entropy,
                weights,
                grad_logprobs,
                None if entropy is None else grad_entropy,
                rows,
                total,
                low,
                high,
                cap,
                kl_coef,
                entropy_coef,
                TOKEN_ADVANTAGES=token_advantages,
                LEVEL=level,
                RULE=rule,
                KL=kl,
                AGGREGATION=aggregation,
                BLOCK_T=BLOCK_T,
                num_warps=WARPS,
            )
        _policy_loss_total_kernel[(1,)](
            rows,
            device_normalizer,
            loss,
            metrics,
            scale,
            normalizer,
            sequences,
            AGGREGATION=aggregation,
            BLOCK_SEQUENCES=BLOCK_SEQUENCES,
            num_warps=WARPS,
        )
    return loss, metrics, grad_logprobs, grad_entropy, scale
