"""What the tests of policy_loss share: batches, and one floor against the float64 reference."""

from __future__ import annotations

import torch
from torch import Tensor

from pyllmtune import PolicyLossConfig, policy_loss
from pyllmtune.losses.config import Level
from pyllmtune.losses.metrics import MAXIMA, SUMS
from tests import helpers

LEVELS = Level.__args__
NORMALIZED = ("constant", "length-weighted")  # aggregations that need a normalizer


def config_of(level: str, **options) -> PolicyLossConfig:
    """PPO, or at the geometric level, which clips itself, the plain ratio."""
    return PolicyLossConfig(
        level=level, rule="unclipped" if level == "geometric" else "ppo", **options
    )


def batch(B: int, T: int, *, per_token: bool = False, spread: float = 0.5) -> dict[str, Tensor]:
    logprobs = -3 * torch.rand(B, T, dtype=torch.float64)
    return {
        "logprobs": logprobs,
        "old_logprobs": logprobs + spread * torch.randn(B, T, dtype=torch.float64),
        "advantages": torch.randn(B, T, dtype=torch.float64)
        if per_token
        else torch.randn(B, dtype=torch.float64),
        "mask": torch.rand(B, T) > 0.3,
        "ref_logprobs": logprobs + 0.3 * torch.randn(B, T, dtype=torch.float64),
        "entropy": torch.rand(B, T, dtype=torch.float64),
        "weights": torch.rand(B, T, dtype=torch.float64) * (torch.rand(B, T) > 0.1),
    }


def run(
    data: dict[str, Tensor], config: PolicyLossConfig, backend: str, dtype: torch.dtype, **options
):
    """Loss, metrics, gradients in log-probs and entropy (None without one)."""
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in data.items()}
    logprobs = cast.pop("logprobs").requires_grad_()
    entropy = cast.pop("entropy").requires_grad_() if "entropy" in cast else None
    if config.aggregation in NORMALIZED:
        options.setdefault("normalizer", 77.0)
    out = policy_loss(logprobs, entropy=entropy, config=config, backend=backend, **cast, **options)
    wanted = [logprobs] if entropy is None else [logprobs, entropy]
    grads = torch.autograd.grad(1.5 * out.loss, wanted)
    return out.loss.detach(), out.metrics.vector, *grads


def compare(data, config, backend, dtype=torch.float32, **options) -> None:
    rounded = {k: v.to(dtype).double() if v.is_floating_point() else v for k, v in data.items()}
    got = run(data, config, helpers.use(backend), dtype, **options)
    want = run(rounded, config, "reference", torch.float64, **options)
    tolerance = (
        1e-12 if dtype == torch.float64 else 1e-5
    )  # float32: e^r of r rounded to 6e-8 relative, r up to 3
    for name, value, expected in zip(
        ("loss", "metrics", "grad", "grad entropy"), got, want, strict=False
    ):
        if name == "metrics":  # each slot on its own scale
            for slot, a, b in zip(SUMS + MAXIMA, value, expected, strict=True):
                helpers.assert_close(a[None], b[None], tolerance, slot)
        else:
            helpers.assert_close(value, expected, tolerance, name)
