"""Settings of every test: the Triton interpreter under its guard, memory that is NaN until written,
a fixed seed.
"""

from __future__ import annotations

import os

# read when a module with @triton.jit functions is imported, so before any other import
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from pyllmtune import _backend


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
    if "triton" not in parameters.values() or _backend.why_not("triton", "cpu") is not None:
        yield
        return
    from tests.gpuless.triton_guard import guard

    with guard():
        yield
