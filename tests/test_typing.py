"""mypy accepts a right program and refuses wrong calls, with the package installed."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests import helpers

ROOT = Path(__file__).resolve().parent.parent
TYPED = ROOT / "tests" / "typed"
# what of torch our signatures are made of; analysing all of it takes 20 seconds
FOLLOWED = ("", "._tensor", "._C", "._C._VariableFunctions", ".nn", ".nn.modules")
FOLLOWED += (".nn.modules.module", ".nn.modules.linear", ".nn.parameter")
SKIPPED = ("torch", "transformers", "trl", "verl", "numpy", "matplotlib", "triton")


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Runs mypy outside the tree, on an environment that has the package as a wheel leaves it."""
    helpers.need("mypy")
    folder = tmp_path_factory.mktemp("typing")
    run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], folder)
    python = folder / "env" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run([python, "-c", where], folder).strip())
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))
    compiled = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "pyllmtune", site / "pyllmtune", ignore=compiled)
    sections = [("", "strict = True")]
    sections += [(f"-{name}.*", "follow_imports = skip") for name in SKIPPED]
    sections += [(f"-torch{name}", "follow_imports = silent") for name in FOLLOWED]
    settings = folder / "mypy.ini"
    settings.write_text("".join(f"[mypy{name}]\n{line}\n" for name, line in sections))

    def mypy(program: Path) -> list[str]:
        """``line: code`` of every error."""
        shutil.copy(program, folder)
        command = [sys.executable, "-m", "mypy", "--python-executable", python]
        command += ["--config-file", settings, "--cache-dir", folder / "cache", program.name]
        found = run(command, folder, ok=(0, 1))
        errors = re.findall(r"^\S+\.py:(\d+): error: .*\[([\w-]+)\]$", found, re.MULTILINE)
        assert f"Found {len(errors)} error" in found or not errors, found
        return list(dict.fromkeys(f"{line}: {code}" for line, code in errors))

    return mypy


def run(command: list, cwd: Path, ok: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode in ok, done.stdout + done.stderr
    return done.stdout


def test_a_right_program_passes_and_runs(check):
    assert check(TYPED / "right.py") == []
    runpy.run_path(str(TYPED / "right.py"))


def test_wrong_calls_are_refused(check):
    lines = (TYPED / "wrong.py").read_text().splitlines()
    marked = [(number, re.search(r"# error: (\S+)$", line)) for number, line in enumerate(lines, 1)]
    want = [f"{number}: {mark[1]}" for number, mark in marked if mark]
    assert len(want) > 30
    assert check(TYPED / "wrong.py") == want
