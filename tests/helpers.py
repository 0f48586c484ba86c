"""What every op's test needs: the backends present, tolerances, hard inputs, tools that a machine
may lack.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from pyllmtune import _backend

# of the largest value of a row against float64 on the same input; the reason is beside each
FORWARD = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,  # a few ulp of a logit of size 20
    torch.bfloat16: 2e-6,  # the input is exact in float32 and the results are float32
    torch.float16: 2e-6,
}
BACKWARD = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 2
    ** -8,  # one rounding of the result: half an ulp of 8 bits, and the float32 error
    torch.float16: 2**-11,
}


def need(tool: str) -> None:
    """Skip with the reason if ``tool`` is absent; fail instead when PYLLMTUNE_REQUIRE names it."""
    present = {
        "triton": lambda: find_spec("triton") is not None,
        "nvcc": lambda: shutil.which("nvcc") is not None or "CUDA_HOME" in os.environ,
        "g++": lambda: shutil.which("g++") is not None,
        "cpp": lambda: _backend.why_not("cpp", "cpu") is None,
        "transformers": lambda: find_spec("transformers") is not None,
        "trl": lambda: find_spec("trl") is not None,
        "verl": lambda: find_spec("verl") is not None,
        "liger_kernel": lambda: find_spec("liger_kernel") is not None,
        "mypy": lambda: find_spec("mypy") is not None,
    }[tool]()
    if present:
        return
    reason = f"{tool} is not on this machine"
    if tool in os.environ.get("PYLLMTUNE_REQUIRE", "").split(","):
        pytest.fail(f"{reason}, but PYLLMTUNE_REQUIRE names it")
    pytest.skip(reason)


def use(backend: str) -> str:
    """The backend's name, ready to run on CPU tensors here, or skip with the reason."""
    if backend == "emulated":  # the CUDA kernels, executed on the CPU
        need("g++")
        need("nvcc")  # for CUDA's headers
        from tests.gpuless import emulated_floor

        emulated_floor.install()
    elif backend in ("triton", "cpp"):
        need(backend)
    return backend


def torch_before(version: str) -> bool:
    return TorchVersion(torch.__version__) < version


BACKENDS = ("reference", "cpp", "triton", "emulated")
KERNELS = BACKENDS[1:]


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def runs(backend: str, dtype: torch.dtype) -> bool:
    """GPU floors have no float64."""
    return dtype != torch.float64 or backend in ("reference", "cpp")


def pairs(backends: Iterable[str], dtypes: Iterable[torch.dtype]) -> pytest.MarkDecorator:
    """Parametrize ``backend`` and ``dtype`` by the pairs that exist."""
    found = [
        pytest.param(backend, dtype, id=f"{backend}-{dtype_id(dtype)}")
        for backend in backends
        for dtype in dtypes
        if runs(backend, dtype)
    ]
    return pytest.mark.parametrize(("backend", "dtype"), found)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What results are returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    """Equal NaN and infinities; elsewhere within ``tolerance`` of max(1, the largest finite
    value).
    """
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, f"{what}: shape {list(got.shape)} instead of {list(want.shape)}"
    special = ~want.isfinite()
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: NaN elsewhere than in the reference"
    same = (got == want) | got.isnan()
    assert bool(same[special].all()), f"{what}: infinities differ from the reference"
    error = torch.where(special, 0.0, got - want).abs()
    size = torch.where(special, 0.0, want).abs()
    bound = tolerance * size.amax().clamp(min=1.0) if want.numel() else 0.0
    assert want.numel() == 0 or bool(error.max() <= bound), (
        f"{what}: error {float(error.max()):.3e} is above {float(bound):.3e}"
    )
