"""PolicyLossMetrics: sums and counts of one policy-loss call as one device vector."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# slots that add up over micro-batches and ranks, in the order of the kernels
SUMS = (
    "tokens",  # valid tokens
    "sequences",  # sequences with a valid token
    "dropped",  # unmasked tokens with an input that was not finite
    "loss",  # the loss before the division by the normalizer
    "clipped_low",
    "clipped_high",
    "clipped_cap",
    "approx_kl",  # old - logprob: k1 estimate of KL(old || policy)
    "approx_kl_k3",  # e^r - 1 - r with r = logprob - old
    "kl_ref",  # the chosen estimator against the reference (k3 if none was chosen)
    "ratio",
    "ratio_squared",
    "entropy",
    "weight",
)
# slots that are maxima; the minimum is kept negated, so that one MAX reduces both
MAXIMA = ("negative_ratio_min", "ratio_max")
SIZE = len(SUMS) + len(MAXIMA)


class PolicyLossMetrics(NamedTuple):
    """The metrics of a policy loss. They stay on the device until :meth:`to_dict`, the only sync.

    Attributes:
        vector: float64 ``[16]``: the sums of ``SUMS``, then the maxima of ``MAXIMA``.
    """

    vector: Tensor

    def merge(self, other: PolicyLossMetrics) -> PolicyLossMetrics:
        """Metrics of two micro-batches together."""
        split = len(SUMS)
        return PolicyLossMetrics(
            torch.cat(
                (
                    self.vector[:split] + other.vector[:split],
                    torch.maximum(self.vector[split:], other.vector[split:]),
                )
            )
        )

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> PolicyLossMetrics:
        """Metrics over all ranks of ``group``: one SUM and one MAX."""
        sums, maxima = self.vector[: len(SUMS)].clone(), self.vector[len(SUMS) :].clone()
        torch.distributed.all_reduce(sums, torch.distributed.ReduceOp.SUM, group)
        torch.distributed.all_reduce(maxima, torch.distributed.ReduceOp.MAX, group)
        return PolicyLossMetrics(torch.cat((sums, maxima)))

    def to_dict(self) -> dict[str, float]:
        """Means per valid token under the names of the sums, counts as counts. Reads the device.

        ``*_fraction`` are shares of the valid tokens; ``effective_sample_size`` is ``(sum w)^2 / (n
        sum w^2)``. With no valid token, every mean is 0.
        """
        values = dict(zip(SUMS + MAXIMA, self.vector.tolist(), strict=True))
        tokens = values["tokens"]
        share = 1.0 / tokens if tokens else 0.0
        squared = values["ratio_squared"]
        return {
            "tokens": tokens,
            "sequences": values["sequences"],
            "dropped": values["dropped"],
            "loss_sum": values["loss"],
            "clip_low_fraction": values["clipped_low"] * share,
            "clip_high_fraction": values["clipped_high"] * share,
            "clip_cap_fraction": values["clipped_cap"] * share,
            "approx_kl": values["approx_kl"] * share,
            "approx_kl_k3": values["approx_kl_k3"] * share,
            "kl_ref": values["kl_ref"] * share,
            "ratio_mean": values["ratio"] * share,
            "ratio_min": -values["negative_ratio_min"] if tokens else 0.0,
            "ratio_max": values["ratio_max"] if tokens else 0.0,
            "effective_sample_size": values["ratio"] ** 2 * share / squared if squared else 0.0,
            "entropy": values["entropy"] * share,
            "weight_mean": values["weight"] * share,
        }
