"""What a benchmark consists of: a case, its providers, the bytes it must move, a measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyllmtune import _backend

Results = dict[str, Any]  # name -> tensor, or number
PROVIDERS = (
    *("pyllmtune", "eager", "torch.compile", "trl"),
    *("F.linear_cross_entropy", "matmul"),  # of linear_token_logprobs
    "linear_token_logprobs",  # and policy_loss, of linear_policy_loss
)
PROBES = ("read", "clone", "rewrite")


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        name: one of ``PROVIDERS``, with the backend for ours; or one of ``PROBES``.
        run: timed; takes the inputs, or what ``prepare`` made of them.
        prepare: not timed.
        variant: extends the name of the case: other work, interleaved with the rest of the case.
        share: what the variant must move of the case's traffic.
        slack: how much more than one rounding its results may be wrong, with a reason beside it.
    """

    name: str
    run: Callable[[Any], Results]
    prepare: Callable[[Any], Any] | None = None
    variant: str = ""
    share: float = 1.0
    slack: float = 1.0

    @property
    def is_probe(self) -> bool:
        return self.name in PROBES

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("pyllmtune")


@dataclass(frozen=True)
class Traffic:
    """Bytes an op must move; ``read`` includes the reads that ``written`` is made from."""

    read: int
    written: int = 0  # to new memory
    rewritten: int = 0  # read, and written to the same place

    @property
    def total(self) -> int:
        return self.read + self.written + 2 * self.rewritten


@dataclass(frozen=True)
class Case:
    """``draw`` returns an object whose tensors are one set of fresh inputs; ``reference`` the
    results in float64; ``probe`` the tensor that is read, cloned and rewritten for the floor.
    """

    op: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    draw: Callable[[torch.Generator], Any]
    reference: Callable[[Any], Results]
    probe: Callable[[Any], Tensor]
    probe_bytes: int
    traffic: Traffic
    providers: list[Provider]
    threads: tuple[int, ...]


@dataclass
class Measurement:
    """What became of a provider. ``error`` is the largest of its results, ``excess`` the same over
    the tolerance; ``problem`` the exception in one line; ``times`` is empty without a passed gate.
    """

    provider: Provider
    threads: int
    error: float = 0.0
    excess: float = 0.0
    problem: str = ""
    peak: int | None = None
    times: list[float] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        if self.problem:
            return "FAILED"
        if self.provider.is_probe:
            return "probe"
        return "ok" if self.excess <= 1.0 else "WRONG"

    def quantile(self, share: float) -> float:
        """Seconds."""
        return float(torch.tensor(self.times, dtype=torch.float64).quantile(share))


def our_backends(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The kernels that run here; the reference if there is none."""
    floors = ("cuda", "triton") if device.type == "cuda" else ("cpp",)
    ready = [name for name in floors if _backend.why_not(name, device.type, dtype) is None]
    return ready or ["reference"]
