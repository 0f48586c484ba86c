"""gae: generalised advantage estimation (Schulman et al. 2016) and returns of packed sequences.

    rewards, values [total] -> advantages, returns [total]; sequence i is offsets[i]:offsets[i + 1]
    R_t = r_t + x_{t+1},  A_t = R_t - V_t,  x_t = own_t + decay_t x_{t+1},  x_end = gamma V_end
    own = gamma ((1 - lam) V + lam r), decay = gamma lam  (csrc/math/discount_flow.h)

Reads 8 to 10 bytes a token, writes 8. One launch, one program a sequence, block by block from its
end, each an associative scan of the maps x -> own + decay x. Blocks are counted from the beginning
and tokens past the end are identities, so padding changes no bit.
Limits: one program walks a whole sequence.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import as_bytes, on_device

BLOCK_T, WARPS = 1024, 8  # four tokens a thread


@triton.jit
def _compose(late_own, late_decay, early_own, early_decay):
    """First the later tokens, then the earlier ones. A negative decay lets nothing through."""
    through = early_decay >= 0.0
    own = tl.where(through, early_own + early_decay * late_own, early_own)
    decay = tl.where(through & (late_decay >= 0.0), early_decay * late_decay, -1.0)
    return own, decay


@triton.jit
def _gae_fwd_kernel(
    rewards_ptr,
    values_ptr,
    offsets_ptr,
    mask_ptr,
    terminated_ptr,
    bootstrap_ptr,
    gamma_ptr,
    lam_ptr,
    advantages_ptr,
    returns_ptr,
    total,
    gamma,
    lam,
    CARRY_MASKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Program i: sequence i. Lanes run against time: the scan goes from the last token on."""
    sequence = tl.program_id(0).to(tl.int64)
    # clamped: offsets on a GPU are not checked, and must not lead outside the tokens
    begin = tl.maximum(tl.load(offsets_ptr + sequence), 0)
    end = tl.minimum(tl.load(offsets_ptr + sequence + 1), total)
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + sequence)
    if lam_ptr is not None:
        lam = tl.load(lam_ptr + sequence)
    decay_by = gamma * lam
    entering = 0.0
    if bootstrap_ptr is not None:
        entering = gamma * tl.load(bootstrap_ptr + sequence)

    lane = tl.arange(0, BLOCK_T)
    blocks = tl.cdiv(end - begin, BLOCK_T)
    for back in range(0, blocks):
        t = begin + (blocks - back) * BLOCK_T - 1 - lane  # [BLOCK_T]
        inside = t < end
        selected = inside
        if mask_ptr is not None:
            selected = inside & (tl.load(mask_ptr + t, mask=inside, other=0) != 0)
        reward = tl.load(rewards_ptr + t, mask=selected, other=0.0)
        value = tl.load(values_ptr + t, mask=selected, other=0.0)
        own = (gamma - decay_by) * value + decay_by * reward
        steps = selected if CARRY_MASKED else inside
        decay = tl.where(steps, decay_by, 1.0)
        ends = lane < 0  # nowhere
        if terminated_ptr is not None:
            ends = selected & (tl.load(terminated_ptr + t, mask=selected, other=0) != 0)
            decay = tl.where(ends, -1.0, decay)

        own, decay = tl.associative_scan((own, decay), 0, _compose)
        leaving = tl.where(decay >= 0.0, own + decay * entering, own)  # [BLOCK_T]  x_t
        flows_in = tl.gather(leaving, tl.maximum(lane - 1, 0), 0)  # x_{t+1}
        flows_in = tl.where(lane == 0, entering, flows_in)
        result = tl.where(ends, reward, reward + flows_in)
        tl.store(returns_ptr + t, tl.where(selected, result, 0.0), mask=inside)
        tl.store(advantages_ptr + t, tl.where(selected, result - value, 0.0), mask=inside)
        entering = tl.sum(tl.where(lane == BLOCK_T - 1, leaving, 0.0), 0)


def gae(
    rewards: Tensor,
    values: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    terminated: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    sequence_gamma: Tensor | None,
    sequence_lam: Tensor | None,
    carry_masked: bool,
) -> tuple[Tensor, Tensor]:
    total, sequences = rewards.shape[0], offsets.shape[0] - 1
    advantages, returns = rewards.new_empty(total), rewards.new_empty(total)
    if total > 0:
        with on_device(rewards):
            _gae_fwd_kernel[(sequences,)](
                rewards,
                values,
                offsets,
                as_bytes(mask),
                as_bytes(terminated),
                bootstrap,
                sequence_gamma,
                sequence_lam,
                advantages,
                returns,
                total,
                gamma,
                lam,
                CARRY_MASKED=carry_masked,
                BLOCK_T=BLOCK_T,
                num_warps=WARPS,
            )
    return advantages, returns
