"""Finds the compilers and binary tools that the checks need, and says what is missing.

require("g++", "nvcc", "triton")     skips the calling test, with the reason, if one is not there
tool("nvcc") -> Path                 raises ToolMissing with the reason
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
BUILD = REPO / "build" / "gpuless"  # ignored by git


class ToolMissing(RuntimeError):
    """A compiler or tool is not on this machine; the message says what to install."""


def cuda_home() -> Path:
    """The CUDA toolkit: $CUDA_HOME, else /usr/local/cuda, else where the nvcc on PATH lies."""
    candidates = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(str(Path(on_path).resolve().parents[1]))
    for candidate in candidates:
        if candidate and (Path(candidate) / "include" / "cuda_runtime.h").is_file():
            return Path(candidate).resolve()
    raise ToolMissing(
        "no CUDA toolkit: set CUDA_HOME to a folder that holds include/cuda_runtime.h"
    )


def tool(name: str) -> Path:
    """The path of "g++", "nvcc", "c++filt", "cuobjdump" or "triton" (the package's folder)."""
    if name == "triton":
        return _triton_home()
    if name == "nvcc":
        return _existing(cuda_home() / "bin" / "nvcc", "the CUDA toolkit has no compiler")
    if name == "cuobjdump":
        return _cuobjdump()
    if name == "g++" and (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise ToolMissing("the emulator of CUDA threads switches stacks on x86-64 Linux only")
    found = shutil.which(name)
    if not found:
        raise ToolMissing(f"{name} is not on PATH")
    return Path(found)


def _existing(path: Path, complaint: str) -> Path:
    if not path.is_file():
        raise ToolMissing(f"{complaint}: {path}")
    return path


def _triton_home() -> Path:
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        raise ToolMissing("triton is not installed: pip install triton")
    return Path(found.origin).parent


def _cuobjdump() -> Path:
    in_toolkit = cuda_home() / "bin" / "cuobjdump"
    if in_toolkit.is_file():
        return in_toolkit
    in_wheel = _triton_home() / "backends" / "nvidia" / "bin" / "cuobjdump"
    return _existing(in_wheel, "neither the CUDA toolkit nor triton's wheel has cuobjdump")


@functools.cache
def version_line(name: str) -> str:
    """What ``name --version`` says: goes into cache keys and into the budget table."""
    output = subprocess.run([tool(name), "--version"], capture_output=True, text=True, check=True)
    lines = output.stdout.splitlines()
    return next((line for line in lines if "release" in line), lines[0])  # NVIDIA's fourth line


def why_missing(name: str) -> str | None:
    """Why a tool cannot be used here; None if it can."""
    try:
        tool(name)
    except ToolMissing as missing:
        return str(missing)
    return None


def require(*names: str) -> None:
    """Skips the test or module if a tool is missing; fails if PYLLMTUNE_REQUIRE names it."""
    import pytest

    for name in names:
        reason = why_missing(name)
        if reason and name in os.environ.get("PYLLMTUNE_REQUIRE", "").split(","):
            pytest.fail(f"{reason}; PYLLMTUNE_REQUIRE names {name}")
        if reason:
            pytest.skip(reason, allow_module_level=True)
