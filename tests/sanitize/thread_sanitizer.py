"""Runs Python with ThreadSanitizer's runtime preloaded, for modules that were compiled with it."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys

from tests.gpuless.emulator import Outcome, runtime_library
from tests.gpuless.toolchain import REPO, ToolMissing

SUPPRESSIONS = REPO / "tests" / "sanitize" / "tsan.supp"


def run(script: str, *arguments: str) -> Outcome:
    """``python script arguments...`` from the repository's root; any finding makes it fail."""
    done = subprocess.run(
        [*_prefix(), sys.executable, script, *arguments],
        cwd=REPO,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=600,
    )
    return Outcome(done.returncode, done.stdout)


def _environment() -> dict[str, str]:
    return os.environ | {
        "LD_PRELOAD": runtime_library("libtsan.so"),
        "TSAN_OPTIONS": f"halt_on_error=1:report_thread_leaks=0:suppressions={SUPPRESSIONS}",
    }


@functools.cache
def _prefix() -> tuple[str, ...]:
    """Nothing, or ``setarch -R`` where the kernel's random addresses hit TSan's shadow memory."""
    for prefix in ((), ("setarch", "-R")):
        if prefix and not shutil.which(prefix[0]):
            continue
        tried = subprocess.run(
            [*prefix, sys.executable, "-c", "pass"], env=_environment(), capture_output=True
        )
        if tried.returncode == 0:
            return prefix
    raise ToolMissing("ThreadSanitizer does not start on this machine")
