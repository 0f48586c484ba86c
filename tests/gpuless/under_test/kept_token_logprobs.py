"""The kernels of kept_token_logprobs under the compile gates."""

from __future__ import annotations

from .kinds import CUDA_FLAGS, Block, CudaSource, TritonKernel

_OPTIONAL = {"row_temperature_ptr": "*fp32", "mask_ptr": "*u8"}


def _kernels(element: str, flat: bool, options: bool) -> list[TritonKernel]:
    rows = {
        **{"offsets_ptr": "*i64", "token_ids_ptr": "*i32", "tokens_ptr": "*i64"},
        **(_OPTIONAL if options else {}),
    }
    strides = {"stride_outer": "i64", "stride_inner": "i32"}
    sizes = {"temperature": "fp32", **dict.fromkeys(("rows", "entries", "inner", "vocab"), "i32")}
    name = f"{element}{' flat' if flat else ''}{' mask' if options else ''}"

    def kernel(direction: str, elements: tuple, floats: tuple, more: dict) -> TritonKernel:
        return TritonKernel(
            name=f"kept_token_logprobs_{direction} {name}",
            function="pyllmtune.kernels.kept_token_logprobs:"
            f"_kept_token_logprobs_{direction}_kernel",
            signature={
                **dict.fromkeys(elements, f"*{element}"),
                **rows,
                **dict.fromkeys(floats, "*fp32"),
                **sizes,
                **strides,
                **more,
            },
            constants={
                **({} if options else dict.fromkeys(_OPTIONAL)),
                **{"FLAT": flat, "BLOCK": 128},
            },
            divisible=(*elements, "offsets_ptr", "token_ids_ptr"),
            num_warps=1,
        )

    return [
        kernel(
            *("fwd", ("logits_ptr",)),
            *(("logprobs_ptr", "entropy_ptr", "logsumexp_ptr", "stats_ptr"), {}),
        ),
        kernel(
            *("bwd", ("logits_ptr", "grad_ptr")),
            (
                *("entropy_ptr", "stats_ptr"),
                *(f"grad_{name}_ptr" for name in ("logprobs", "entropy", "logsumexp")),
            ),
            {f"grad_{stride}": kind for stride, kind in strides.items()},
        ),
    ]


CUDA = [
    CudaSource(
        "tests/gpuless/drivers/kept_token_logprobs.cpp",
        blocks={
            "kept_token_logprobs_kernel": Block(128),
            "kept_token_logprobs_backward_kernel": Block(128),
        },
        flags=CUDA_FLAGS,
    ),
]

TRITON = [
    kernel
    for element, flat, options in (
        ("fp32", True, False),
        ("fp32", False, False),
        ("bf16", False, True),
        ("fp16", False, False),
    )
    for kernel in _kernels(element, flat, options)
]
