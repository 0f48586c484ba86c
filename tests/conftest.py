"""Settings of every test run: the Triton interpreter, memory that is NaN until written, a fixed
seed.
"""

from __future__ import annotations

import os

# read when a module with @triton.jit functions is imported, so before any other import
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _poison_and_seed():
    """Every torch.empty, from Python or C++, is NaN: a result that nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
