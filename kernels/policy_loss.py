"""policy_loss: the clipped policy objective, its gradient and its metrics.

    per token, flat [total]; sequence i is offsets[i] ... offsets[i + 1]
    -> loss and scale (0-d), metrics [16], grad_logprobs and grad_entropy [total]: times `scale`
    l_t = weight_t rule(ratio_t, A_t) + kl_coef kl(ref_t - lp_t) - entropy_coef H_t

Reads 12 to 25 bytes a token and writes 4 or 8. What the whole sequence decides (its score,
its length, the gradient through the score) takes another sweep over data then in cache. One program
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
from .policy_terms import (
    LENGTH_WEIGHTED,
    SEQ_MEAN_TOKEN_MEAN,
    SEQUENCE_SUM,
    TOKEN,
    TOKEN_MEAN,
    exp_residual,
    level_term,
    load_tokens,
    score_of,
    spreads_over_sequence,
    token_terms,
)

METRICS = 16  # the order of pyllmtune/losses/metrics.py
TOKENS, SEQUENCES, LOSS = (tl.constexpr(slot) for slot in (0, 1, 3))
FIRST_MAXIMUM = tl.constexpr(14)

BLOCK_T, WARPS = 256, 8  # one token a thread: its sums stay in registers
BLOCK_SEQUENCES = 128


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
    rule_a,
    rule_b,
    rule_c,
    rule_d,
    log_ratio_limit,
    score_min,
    score_max,
    kl_coef,
    kl_input_limit,
    kl_limit,
    entropy_coef,
    TOKEN_ADVANTAGES: tl.constexpr,
    LEVEL: tl.constexpr,
    RULE: tl.constexpr,
    KL: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
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

    spreads: tl.constexpr = spreads_over_sequence(LEVEL, RULE, KL_GRADIENT)
    by_length: tl.constexpr = (AGGREGATION == SEQ_MEAN_TOKEN_MEAN) | (
        AGGREGATION == LENGTH_WEIGHTED
    )
    each = 1.0  # of the valid tokens, their share in a mean
    sequence_score = 0.0
    if (LEVEL != TOKEN) or by_length:
        count, scores = tl.zeros([BLOCK_T], tl.float32), zeros
        for start in range(begin, end, BLOCK_T):
            t = start + block
            (valid, drop, logprob, old, advantage, weight, delta, entropy) = load_tokens(
                t,
                end,
                sequence,
                logprobs_ptr,
                old_ptr,
                advantages_ptr,
                mask_ptr,
                ref_ptr,
                entropy_ptr,
                weights_ptr,
                TOKEN_ADVANTAGES,
            )
            value, flows, _, _ = level_term(
                logprob - old, advantage, weight, rule_a, rule_b, log_ratio_limit, LEVEL, RULE
            )
            count += valid.to(tl.float32)
            scores += tl.where(valid, value, 0.0).to(tl.float64)
        length = tl.maximum(tl.sum(count.to(tl.float64), 0), 1.0)
        each = 1.0 / length
        summed = tl.sum(scores, 0)
        if LEVEL != SEQUENCE_SUM:
            summed = summed * each
        sequence_score = summed.to(tl.float32)
    share = 1.0
    if AGGREGATION == SEQ_MEAN_TOKEN_MEAN:
        share = each.to(tl.float32)
    elif AGGREGATION == LENGTH_WEIGHTED:
        share = length.to(tl.float32)

    through_score = 0.0  # d loss / d logprob of each token by way of the score
    if spreads:
        through = zeros
        for start in range(begin, end, BLOCK_T):
            t = start + block
            (valid, drop, logprob, old, advantage, weight, delta, entropy) = load_tokens(
                t,
                end,
                sequence,
                logprobs_ptr,
                old_ptr,
                advantages_ptr,
                mask_ptr,
                ref_ptr,
                entropy_ptr,
                weights_ptr,
                TOKEN_ADVANTAGES,
            )
            value, flows, _, _ = level_term(
                logprob - old, advantage, weight, rule_a, rule_b, log_ratio_limit, LEVEL, RULE
            )
            score, score_flows = score_of(value, flows, sequence_score, score_min, score_max, LEVEL)
            _, d_score, _, _, _, _, _ = token_terms(
                score,
                score_flows,
                advantage,
                logprob,
                old,
                weight,
                delta,
                entropy,
                rule_a,
                rule_b,
                rule_c,
                rule_d,
                kl_coef,
                kl_input_limit,
                kl_limit,
                entropy_coef,
                LEVEL,
                RULE,
                KL,
                KL_GRADIENT,
            )
            through += tl.where(valid, d_score, 0.0).to(tl.float64)
        flow = tl.sum(through, 0)
        if LEVEL != SEQUENCE_SUM:
            flow = flow * each
        through_score = flow.to(tl.float32)

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
        (valid, drop, logprob, old, advantage, weight, delta, entropy) = load_tokens(
            t,
            end,
            sequence,
            logprobs_ptr,
            old_ptr,
            advantages_ptr,
            mask_ptr,
            ref_ptr,
            entropy_ptr,
            weights_ptr,
            TOKEN_ADVANTAGES,
        )
        log_ratio = logprob - old
        value, flows, low_clip, high_clip = level_term(
            log_ratio, advantage, weight, rule_a, rule_b, log_ratio_limit, LEVEL, RULE
        )
        score, score_flows = score_of(value, flows, sequence_score, score_min, score_max, LEVEL)
        loss_t, d_score, grad, kl, below, above, capped = token_terms(
            score,
            score_flows,
            advantage,
            logprob,
            old,
            weight,
            delta,
            entropy,
            rule_a,
            rule_b,
            rule_c,
            rule_d,
            kl_coef,
            kl_input_limit,
            kl_limit,
            entropy_coef,
            LEVEL,
            RULE,
            KL,
            KL_GRADIENT,
        )
        if spreads:
            grad += tl.where(flows, through_score, 0.0)
        else:
            grad += d_score
        loss += tl.where(valid, loss_t, 0.0).to(tl.float64)
        tokens += valid.to(tl.float32)
        dropped += drop.to(tl.float32)
        low_clips += (valid & (below | low_clip)).to(tl.float32)
        high_clips += (valid & (above | high_clip)).to(tl.float32)
        cap_clips += (valid & capped).to(tl.float32)
        approx_kl -= log_ratio
        approx_kl_k3 += exp_residual(log_ratio, tl.exp(log_ratio))
        kl_ref += tl.where(valid, kl, 0.0)
        ratio = tl.exp(score)
        shown = tl.where(valid, ratio, 0.0)
        ratios += shown
        ratios_squared += shown * shown
        entropies += entropy
        weights += weight
        lowest = tl.minimum(lowest, tl.where(valid, ratio, INF))
        highest = tl.maximum(highest, tl.where(valid, ratio, -INF))
        tl.store(grad_logprobs_ptr + t, tl.where(valid, grad * share, 0.0), mask=t < end)
        if entropy_ptr is not None:
            d_entropy = tl.where(valid, 0.0 - entropy_coef * share, 0.0)
            tl.store(grad_entropy_ptr + t, d_entropy, mask=t < end)

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
    tl.store(metrics_ptr + metric, tl.where(is_sum, summed, tl.max(maxima, 0)))

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
    choices: list[int],
    constants: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    total, sequences = logprobs.shape[0], offsets.shape[0] - 1
    level, rule, kl, kl_gradient, aggregation = choices
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
                *constants,
                TOKEN_ADVANTAGES=token_advantages,
                LEVEL=level,
                RULE=rule,
                KL=kl,
                KL_GRADIENT=kl_gradient,
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
