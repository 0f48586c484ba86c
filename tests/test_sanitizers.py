"""The CPU modules under ASan, UBSan and TSan, and planted faults that each must find."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import helpers
from tests.gpuless import emulator, toolchain
from tests.sanitize import thread_sanitizer

REPO = toolchain.REPO


@functools.cache
def built(flavour: str) -> Path:
    """A folder that holds the whole package with sanitized CPU modules."""
    helpers.need("cpp")
    toolchain.require("g++")
    base = REPO / "build" / f"sanitize-{flavour}"
    kind = {"asan": "address", "tsan": "thread"}[flavour]
    done = subprocess.run(
        [
            sys.executable,
            "setup.py",
            "-q",
            "build",
            f"--build-base={base}",
            f"--build-lib={base / 'lib'}",
        ],
        cwd=REPO,
        env=os.environ | {"PYLLMTUNE_BUILD": "1", "PYLLMTUNE_SANITIZE": kind},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return base / "lib"


def run(
    monkeypatch, flavour: str, capability: str, target: str, *arguments: str
) -> emulator.Outcome:
    """Run Python with the sanitized package instead of the installed one."""
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setenv("PYTHONPATH", f"{built(flavour)}{os.pathsep}{REPO}")
    monkeypatch.setenv("PYLLMTUNE_CPU_CAPABILITY", capability)
    if flavour == "tsan":
        return thread_sanitizer.run(target, *arguments)
    return emulator.run_sanitized(flavour, target, *arguments)


@pytest.mark.parametrize(
    ("flavour", "fault", "says"),
    [
        ("asan", "overflow", "heap-buffer-overflow"),
        ("asan", "bad_shift", "shift exponent 32 is too large"),
        ("tsan", "race", "data race"),
    ],
)
def test_planted_faults_are_found(monkeypatch, flavour, fault, says):
    outcome = run(monkeypatch, flavour, "baseline", "tests/sanitize/run_planted.py", fault)
    assert outcome.returncode != 0 and says in outcome.output, outcome.output[-2000:]


@pytest.mark.parametrize("flavour", ("asan", "tsan"))
def test_a_clean_operator_is_clean(monkeypatch, flavour):
    outcome = run(monkeypatch, flavour, "baseline", "tests/sanitize/run_planted.py", "no_race")
    assert outcome.returncode == 0 and "finished" in outcome.output, outcome.output[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("capability", ("baseline", "avx2", "avx512"))
def test_op_tests_pass_under_address_sanitizer(monkeypatch, capability):
    tests = [
        f"tests/test_{name}.py" for name in ("token_logprobs", "token_logprobs_rows", "policy_loss")
    ]
    options = [
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "cpp and not full_product and not 2_to_the_31",
    ]
    outcome = run(monkeypatch, "asan", capability, "pytest", *options, *tests)
    assert outcome.returncode == 0 and " passed" in outcome.output, outcome.output[-3000:]


@pytest.mark.slow
def test_threads_are_clean_under_thread_sanitizer(monkeypatch):
    outcome = run(monkeypatch, "tsan", "baseline", "tests/sanitize/threaded_ops.py")
    assert outcome.returncode == 0 and "finished" in outcome.output, outcome.output[-3000:]
