"""TRL's trainers score with our ops: one line before training, the same numbers.

    import pyllmtune.integrations.trl
    pyllmtune.integrations.trl.patch()

Every trainer that scores through ``trl.trainer.utils`` is covered: GRPO, RLOO, DPO, KTO, SFT, and
experimental ones that import from it (tested: ORPO, CPO). What our ops do not give (the WPO weight,
a soft cap with mean logits) goes to TRL's own function.
``patch(policy_loss=True, generation=True)`` also computes the loss of GRPO by ours, and draws its
answers by ``sample``, whose kept sets then restrict every log-prob.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from pyllmtune import _backend
from pyllmtune.integrations.patching import Patch, Seam
from pyllmtune.integrations.trl_generation import GENERATION, take_kept
from pyllmtune.integrations.trl_loss import compute_loss
from pyllmtune.ops.linear_token_logprobs import score_hidden
from pyllmtune.ops.token_logprobs import token_logprobs

TESTED = ("1.16",)  # the versions whose trainers were compared, step by step, with and without us

_UTILS = "trl.trainer.utils"
_patch: Patch | None = None


def patch(
    *, policy_loss: bool = False, generation: bool = False, allow_untested: bool = False
) -> Patch:
    """Replace TRL's scoring functions by ours, in every module that bound them.

    Args:
        policy_loss: also replace the policy loss of ``GRPOTrainer``, with its gradient and the sums
            it logs; what :func:`pyllmtune.policy_loss` does not express stays TRL's, whole.
        generation: also draw the answers of ``GRPOTrainer`` by :func:`pyllmtune.sample`: the same
            distribution, other draws. With top-k, top-p or min-p all log-probs (policy, old policy,
            reference) are then those of the tokens that the sampler kept, which is the distribution
            that was sampled, and the head computes these alone. vLLM, continuous batching and
            beams stay TRL's; so do the log-probs of answers with tool calls.
        allow_untested: also patch a version of TRL that is not in ``TESTED``. Names and parameters
            are compared all the same.

    Returns:
        The patch: ``changed`` lists the names that were replaced, ``calls`` counts the calls. As a
        context manager it ends with the block; otherwise :func:`unpatch` ends it. Patching twice
        returns the same patch, with what either call asked for.

    Raises:
        RuntimeError: TRL's version is unknown, or a name or its parameters have moved; nothing is
            changed then.
        ImportError: TRL is not installed.
    """
    global _patch
    if _patch is None or not _patch.active:
        import trl  # noqa: F401  its absence is the ImportError promised

        found = version("trl")
        if not allow_untested and not found.startswith(tuple(f"{known}." for known in TESTED)):
            raise RuntimeError(
                f"TRL {found} is not among the versions tested ({', '.join(TESTED)}); "
                "allow_untested=True patches it if its names are the same"
            )
        _patch = Patch("trl", SEAMS)
    return _patch.apply(
        *([POLICY_LOSS] if policy_loss else []), *(GENERATION if generation else [])
    )


def unpatch() -> None:
    """Put every name back that :func:`patch` replaced."""
    if _patch is not None:
        _patch.undo()


def _selective_log_softmax(original: Any) -> Any:
    def selective_log_softmax(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Tensor:
        if index.ndim == logits.ndim:  # several tokens a row: not an op of ours
            return original(logits, index, temperature, row_mask)
        out = token_logprobs(logits, index, temperature=temperature, mask=_rows(row_mask))
        return out.logprobs

    return selective_log_softmax


def _entropy_from_logits(original: Any) -> Any:
    def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
        return token_logprobs(logits, logits.new_zeros(logits.shape[:-1], dtype=torch.long)).entropy

    return entropy_from_logits


def _selective_log_softmax_and_entropy(original: Any) -> Any:
    def selective_log_softmax_and_entropy(
        logits: Tensor,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        out = token_logprobs(logits, index, temperature=temperature, mask=_rows(row_mask))
        return out.logprobs, out.entropy if entropy_requires_grad else out.entropy.detach()

    return selective_log_softmax_and_entropy


def _rows(row_mask: Tensor | None) -> Tensor | None:
    return None if row_mask is None else row_mask != 0


def _chunked_logprobs(original: Any) -> Any:
    def apply(
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        mean_of_capped = softcap is not None and "mean_logits" in outputs
        # ZeRO-3 gathers the weight for the call only; TRL gathers it again in backward
        gathered_later = hasattr(weight, "ds_id")
        without_kernels = _backend.resolve("auto", hidden.device, hidden.dtype) == "reference"
        unlike_ours = "log_sum_sq_probs" in outputs or mean_of_capped or gathered_later
        kept = take_kept(targets)
        if kept is not None and unlike_ours:
            raise RuntimeError(
                "generation=True scores the tokens that the sampler kept, which needs the whole "
                "head in memory and no mean logits or WPO weight; patch without it"
            )
        if kept is None and (unlike_ours or without_kernels):
            return original.apply(
                hidden,
                weight,
                bias,
                targets,
                temperature,
                chunk_size,
                softcap,
                logit_scale,
                outputs,
            )
        if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)  # TRL multiplies in the dtype of the hidden states
        scores, sums = score_hidden(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            kept=kept,
        )
        is_top1 = mean_logits = None
        if "is_top1" in outputs and sums is not None:
            # logits closer than float32 tells apart count as equal
            is_top1 = scores.logprobs.detach() + sums.log() >= -1e-6
        if "mean_logits" in outputs:  # the mean logit is the logit of the mean row of the head
            with torch.no_grad():
                mean_logits = hidden.float() @ weight.mean(0, dtype=torch.float32)  # [N]
                if bias is not None:
                    mean_logits += bias.mean(dtype=torch.float32)
                mean_logits *= logit_scale / temperature
        return (
            scores.logprobs,
            scores.entropy if "entropy" in outputs else None,
            None,
            mean_logits,
            is_top1,
        )

    return apply


def _score_valid_rows_only(original: Any) -> Any:
    def _use_triton(device: torch.device) -> bool:
        """TRL's head asks this whether to leave the masked rows out: with our op, always."""
        return True

    return _use_triton


SEAMS = (
    Seam(
        _UTILS,
        "selective_log_softmax",
        ("logits", "index", "temperature", "row_mask"),
        _selective_log_softmax,
    ),
    Seam(_UTILS, "entropy_from_logits", ("logits", "chunk_size"), _entropy_from_logits),
    Seam(
        _UTILS,
        "selective_log_softmax_and_entropy",
        ("logits", "index", "entropy_requires_grad", "temperature", "row_mask"),
        _selective_log_softmax_and_entropy,
    ),
    Seam(
        _UTILS,
        "_ChunkedLogProbFunction",
        (
            "ctx",
            "hidden",
            "weight",
            "bias",
            "targets",
            "temperature",
            "chunk_size",
            "final_logit_softcapping",
            "logit_scale",
            "outputs",
        ),
        _chunked_logprobs,
        method=("apply", "forward"),
    ),
    # TRL's kernels ask their own binding of it what they can launch; that one stays
    Seam(_UTILS, "_use_triton", ("device",), _score_valid_rows_only, everywhere=False),
)
POLICY_LOSS = Seam(
    "trl.trainer.grpo_trainer",
    "GRPOTrainer._compute_loss",
    ("self", "model", "inputs"),
    compute_loss,
    everywhere=False,
)
