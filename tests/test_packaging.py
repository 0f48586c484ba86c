"""An sdist, the wheel built from it, a pure-Python wheel and an editable install, each in a clean
environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests import helpers

ROOT = Path(__file__).resolve().parent.parent
USE = """
import torch, pyllmtune, pyllmtune.kernels, pyllmtune.demo
from pyllmtune import _load
from pyllmtune.__main__ import main
out = pyllmtune.token_logprobs(torch.tensor([[3.0, 1.0]]), torch.tensor([0]))
assert abs(out.logprobs.exp().item() - 0.880797) < 1e-6
assert main(["env"]) == 0
print(pyllmtune.__file__, _load.cpu_module)
"""


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | {"TRITON_INTERPRET": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def environment(folder: Path) -> Path:
    """Python of a fresh virtual environment that can import torch but not this checkout's
    install.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder)  # pip comes with the path below
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "torch.pth").write_text(sysconfig.get_path("purelib"))
    return python


def wheel(sdist: Path, folder: Path, build: str) -> Path:
    command = (sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps")
    run(*command, "-w", folder, sdist, PYLLMTUNE_BUILD=build)
    (path,) = folder.glob("*.whl")
    return path


def install(python: Path, *arguments: str | Path, cwd: Path) -> str:
    """Installs, runs the package from elsewhere, and returns where it was imported from and its CPU
    module.
    """
    command = (
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "--ignore-installed",
    )
    run(*command, *arguments, PYLLMTUNE_BUILD="0")
    return run(python, "-c", USE, cwd=cwd).strip().splitlines()[-1]


def test_sdist_has_what_a_build_and_a_reader_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for name in (
        "csrc/cpu/simd.h",
        "csrc/cuda/token_logprobs.cuh",
        "kernels/token_logprobs.py",
        "LICENSE",
    ):
        assert name in names
    for name in (
        "Makefile",
        "examples/sample_with_cache.py",
        "tests/test_packaging.py",
        "benchmarks/__main__.py",
        "docs/design.md",
    ):
        assert name in names
    assert not any(name.endswith(".so") for name in names)


@pytest.mark.slow
def test_wheel_with_compiled_modules(sdist, tmp_path):
    helpers.need("cpp")
    path = wheel(sdist, tmp_path, build="1")
    names = zipfile.ZipFile(path).namelist()
    assert any(name.startswith("pyllmtune/_C.") for name in names)
    assert "pyllmtune/kernels/token_logprobs.py" in names and "pyllmtune/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"pyllmtune", next(top for top in tops if top.endswith(".dist-info"))}
    where = install(environment(tmp_path / "env"), path, cwd=tmp_path)
    assert str(tmp_path) in where and where.split()[-1].startswith("_C")


def test_pure_python_wheel(sdist, tmp_path):
    path = wheel(sdist, tmp_path, build="0")
    assert path.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(path).namelist())
    where = install(environment(tmp_path / "env"), path, cwd=tmp_path)
    assert str(tmp_path) in where and where.endswith("None")


def test_editable_install_maps_kernels_into_the_package(sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    where = install(environment(tmp_path / "env"), "-e", source, cwd=tmp_path)
    assert str(source) in where


def test_top_level_kernels_counts_as_absent():
    """Another project owns that name. From the root of the tree, the folder does not pose as it:
    who asks for it, as transformers does at import, sees a module without a file.
    """
    program = "import kernels; print(getattr(kernels, '__file__', None)); import kernels.sample"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "None" and "ModuleNotFoundError" in done.stderr


def test_build_variable_is_checked():
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | {"PYLLMTUNE_BUILD": "yes"},
        capture_output=True,
        text=True,
    )
    assert "PYLLMTUNE_BUILD must be auto, 0 or 1, got 'yes'" in done.stderr
