"""Every example runs with --smoke in seconds, agrees with what it compares with, and has --help."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests import helpers

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def need_peers(example: Path) -> None:
    text = example.read_text()
    for peer in ("transformers", "trl"):
        if f"import {peer}" in text or f"from {peer}" in text:
            helpers.need(peer)


def run(example: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, example, *arguments],
        cwd=folder,
        # one thread: the test runs beside others; no interpreter: an example runs as a user runs it
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_smoke(example, tmp_path):
    need_peers(example)
    done = run(example, "--smoke", "--seed", "3", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_help(example, capsys):
    need_peers(example)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(example))["main"](["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--smoke" in text and "--seed" in text
