"""What a time depends on besides the code: device, cache, versions, commit; and peak memory."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import pyllmtune
from pyllmtune import _load

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "kernels", "pyllmtune", "benchmarks/*.py")
DEFAULT_CACHE = 32 << 20  # where the system does not say; a common server's last level


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache that a repetition could find its inputs in."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((_kibibytes(path.read_text()) for path in sizes), default=DEFAULT_CACHE)


def _kibibytes(text: str) -> int:
    return int(text.strip().removesuffix("K")) << 10


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Short hash, with ``+`` if the sources differ from it; empty outside of a git checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short", "HEAD")
    if head is None:
        return ""
    return head + ("+" if git("status", "--porcelain", "--", *SOURCES) else "")


@contextmanager
def outside_the_source_tree() -> Iterator[None]:
    """transformers would take our folder ``kernels`` for the package of that name, so the source
    tree leaves the path while it is imported.
    """
    path = list(sys.path)
    sys.path[:] = [entry for entry in path if entry not in ("", str(ROOT))]
    try:
        yield
    finally:
        sys.path[:] = path


def trl_version() -> str:
    """Empty if TRL is not installed."""
    try:
        return importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return ""


def describe(device: torch.device) -> dict[str, str]:
    """The columns of a result that name the machine and the versions."""
    return {
        "device": device_name(device),
        "cpu_capability": _load.cpu_capability or "none",
        "torch": torch.__version__,
        "pyllmtune": pyllmtune.__version__,
        "trl": trl_version(),
        "commit": commit(),
    }


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that ``call`` held at its peak beyond what was held before; None if unknown here."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # pages that malloc kept would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError):  # not Linux, no glibc, or not permitted
        return None


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))
