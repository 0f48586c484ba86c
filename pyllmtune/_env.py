"""``python -m pyllmtune env``: what is installed, what loaded, and why not. Never fails."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable

VARIABLES = {
    "PYLLMTUNE_BACKEND": "overrides backend='auto'",
    "PYLLMTUNE_AMX": "0: no tile registers for bfloat16 products",
    "PYLLMTUNE_CPU_CAPABILITY": "forces a lower CPU module: baseline, avx2, avx512",
    "PYLLMTUNE_DEBUG": "1: check token ids on GPUs too, at the price of a sync",
    "TRITON_INTERPRET": "1: run the Triton kernels on the CPU",
}


def _guard(probe: Callable[[], str]) -> str:
    """What the probe says, or how it failed: the report must come out whatever is broken."""
    try:
        return probe()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    import torch

    seen = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()}, torch sees {seen}, {torch.get_num_threads()} threads"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _floor(name: str, device: str) -> str:
    from pyllmtune import _backend

    reason = _backend.why_not(name, device)
    return "ready" if reason is None else f"no: {reason}"


def _cpp() -> str:
    from pyllmtune import _load

    return (
        f"ready: pyllmtune.{_load.cpu_module}"
        if _load.cpu_module
        else f"no: {_load.why_not('cpp')}"
    )


def _build() -> str:
    try:
        from pyllmtune import _host
    except ImportError as error:
        return f"no host module ({error})"
    return ", ".join(f"{key} {value}" for key, value in _host.build_info().items())


def report() -> str:
    """The whole report, a line per fact."""
    lines = {
        "pyllmtune": lambda: _version("pyllmtune"),
        "python": platform.python_version,
        "platform": platform.platform,
        "cpu": _cpu,
        "gpu": _cuda,
        **{
            package: (lambda name=package: _version(name))
            for package in ("torch", "triton", "numpy")
        },
        "build": _build,
        "backend reference": lambda: "ready",
        "backend cpp": _cpp,
        "backend cuda": lambda: _floor("cuda", "cuda"),
        "backend triton (GPU)": lambda: _floor("triton", "cuda"),
        "backend triton (CPU)": lambda: _floor("triton", "cpu"),
        **{
            name: (
                lambda name=name, meaning=meaning: f"{os.environ.get(name, 'unset')}  ({meaning})"
            )
            for name, meaning in VARIABLES.items()
        },
    }
    return "\n".join(f"{name:<26}{_guard(probe)}" for name, probe in lines.items())
