"""The kernels of linear_token_logprobs under the compile gates."""

from __future__ import annotations

from .kinds import CUDA_FLAGS, Block, CudaSource, TritonKernel

_TILE = {
    "logits_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "tokens_ptr": "*i64",
    "row_temperature_ptr": "*fp32",
}
_SIZES = {
    **dict.fromkeys(("scale", "softcap", "temperature"), "fp32"),
    **dict.fromkeys(("first", "rows", "columns", "stride"), "i32"),
}
_DIVISIBLE = ("logits_ptr", "tokens_ptr", "first", "columns", "stride")
_OPTIONAL = ("bias_ptr", "row_temperature_ptr")


def _kernels(element: str, vector: int, options: bool) -> list[TritonKernel]:
    """Forward and backward of a wide tile; ``element`` is that of the operands."""
    head = {name: kind for name, kind in _TILE.items() if options or name not in _OPTIONAL}
    absent = {} if options else dict.fromkeys(_OPTIONAL)
    suffix = f"{element}{' options' if options else ''}"
    module, threads = "pyllmtune.kernels.linear_token_logprobs", 256
    given = ("bias_ptr",) if options else ()
    forward = TritonKernel(
        name=f"linear_token_logprobs_tile {suffix}",
        function=f"{module}:_linear_token_logprobs_tile_kernel",
        signature=head | {"running_ptr": "*fp32", "scores_ptr": "*fp32"} | _SIZES,
        constants={"LANES": 2 * threads, "VECTOR": 4, "CAPPED": options, **absent},
        divisible=(*_DIVISIBLE, *given),
        num_warps=8,
    )
    backward = TritonKernel(
        name=f"linear_token_logprobs_tile_bwd {suffix}",
        function=f"{module}:_linear_token_logprobs_tile_bwd_kernel",
        signature=head
        | {"stats_ptr": "*fp32", "upstream_ptr": "*fp32", "grad_ptr": f"*{element}"}
        | _SIZES
        | {"grad_stride": "i32"},
        constants={"BLOCK_V": 2 * threads * vector, "CAPPED": options, **absent},
        divisible=(*_DIVISIBLE, *given, "grad_ptr", "grad_stride"),
        num_warps=8,
    )
    return [forward, backward] if element == "fp32" else [backward]  # forward has no operands


CUDA = [
    CudaSource(
        "tests/gpuless/drivers/linear_token_logprobs.cpp",
        blocks={
            "linear_token_logprobs_tile_kernel": Block(256),
            "linear_token_logprobs_tile_backward_kernel": Block(256),
        },
        flags=CUDA_FLAGS,
    ),
]

TRITON = [
    kernel
    for element, vector, options in (
        *(("fp32", 4, False), ("fp32", 4, True)),
        *(("bf16", 8, False), ("bf16", 8, True), ("fp16", 8, False)),
    )
    for kernel in _kernels(element, vector, options)
]
