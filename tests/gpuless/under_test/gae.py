"""The kernels of gae under the compile gates."""

from __future__ import annotations

from .kinds import CUDA_FLAGS, Block, CudaSource, TritonKernel

_FLOATS = ("rewards_ptr", "values_ptr", "advantages_ptr", "returns_ptr")
_OPTIONAL = {
    "mask_ptr": "*u8",
    "terminated_ptr": "*u8",
    **dict.fromkeys(("bootstrap_ptr", "gamma_ptr", "lam_ptr"), "*fp32"),
}


def _kernel(name: str, given: tuple[str, ...]) -> TritonKernel:
    return TritonKernel(
        name=f"gae_fwd {name}",
        function="pyllmtune.kernels.gae:_gae_fwd_kernel",
        signature={
            **dict.fromkeys(_FLOATS, "*fp32"),
            "offsets_ptr": "*i64",
            **{pointer: _OPTIONAL[pointer] for pointer in given},
            "total": "i32",
            "gamma": "fp32",
            "lam": "fp32",
        },
        constants={
            **{pointer: None for pointer in _OPTIONAL if pointer not in given},
            "CARRY_MASKED": True,
            "BLOCK_T": 1024,
        },
        divisible=(*_FLOATS, *given),
        num_warps=8,
    )


CUDA = [
    CudaSource(
        "tests/gpuless/drivers/gae.cpp", blocks={"gae_kernel": Block(256)}, flags=CUDA_FLAGS
    ),
]

TRITON = [_kernel("plain", ()), _kernel("everything", tuple(_OPTIONAL))]
