"""Settings of every test: the Triton interpreter under its guard, memory that is NaN until written,
a fixed seed.
"""

from __future__ import annotations

import os

# read when a module with @triton.jit functions is imported, so before any other import
os.environ.setdefault("TRITON_INTERPRET", "0" if "PYLLMTUNE_TEST_GPU" in os.environ else "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS is not deterministic

import pytest
import torch

from pyllmtune import _backend
from tests import on_gpu

collect_ignore = ["typed"]  # for a type checker: looking for doctests would import the wrong calls


def pytest_collection_modifyitems(items):
    if on_gpu.WANTED:
        on_gpu.install()
        items[:] = filter(on_gpu.belongs_there, items)


@pytest.fixture(autouse=True)
def _poison_and_seed():
    """Every torch.empty, from Python or C++, is NaN: a result that nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _guard_triton(request):
    """A test with the parameter "triton" has bounds, races and bf16 of its launches checked."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    on_cpu = not on_gpu.WANTED and _backend.why_not("triton", "cpu") is None
    if "triton" not in parameters.values() or not on_cpu:
        yield
        return
    from tests.gpuless.triton_guard import guard

    with guard():
        yield
