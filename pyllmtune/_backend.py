"""Which floor runs a call: ``auto`` takes the best one present, a named one is used or refused with
the reason.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal

import torch

from pyllmtune import _load

Backend = Literal["auto", "reference", "cpp", "triton", "cuda"]
BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")
VARIABLE = "PYLLMTUNE_BACKEND"

# floors added by the tests: an emulated GPU, say
extra_floors: list[str] = []

_DTYPES = {
    "cpp": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not(floor: str, device: str, dtype: torch.dtype = torch.float32) -> str | None:
    """None if ``floor`` can run tensors of this device type and dtype, else the reason in one
    line.
    """
    if floor == "reference" or floor in extra_floors:
        return None
    if dtype not in _DTYPES[floor]:
        return f"it has no kernel for {dtype}"
    if floor == "cpp":
        if device != "cpu":
            return f"the tensors are on {device}, it runs on the CPU"
        return (
            None if _load.cpu_module else f"no compiled CPU module loaded: {_load.why_not('cpp')}"
        )
    if floor == "cuda":
        if device != "cuda":
            return f"the tensors are on {device}, it runs on CUDA devices"
        return None if _load.cuda_module else _load.why_not("cuda")
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if device == "cpu" and not _interpreting():
        return "on CPU tensors it needs TRITON_INTERPRET=1 in the environment"
    return None


def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the floor that will run.

    Raises:
        ValueError: the name is unknown, or the named backend cannot run here; says why.
    """
    asked = "backend"
    if backend == "auto":
        backend, asked = os.environ.get(VARIABLE, "auto"), VARIABLE
    if backend == "auto":
        preference = ("cuda", "triton") if device.type == "cuda" else ("cpp",)
        for floor in preference:
            if why_not(floor, device.type, dtype) is None:
                return floor
        return "reference"
    if backend not in BACKENDS and backend not in extra_floors:
        raise ValueError(f"{asked} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = why_not(backend, device.type, dtype)
    if reason is not None:
        raise ValueError(
            f"{asked}={backend!r} was asked for, but {reason}. See python -m pyllmtune env"
        )
    return backend
