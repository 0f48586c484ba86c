"""The kernels of token_logprobs under the compile gates."""

from __future__ import annotations

from .kinds import CUDA_FLAGS, Block, CudaSource, TritonKernel

_SCORE = {
    "logits_ptr": "",
    "grad_ptr": "",
    "tokens_ptr": "*i64",
    "row_temperature_ptr": "*fp32",
    "mask_ptr": "*u8",
    **{
        f"{name}_ptr": "*fp32"
        for name in (
            *("logprobs", "entropy", "logsumexp", "stats"),
            *("grad_logprobs", "grad_entropy", "grad_logsumexp"),
        )
    },
    "temperature": "fp32",
    **dict.fromkeys(("rows", "inner", "vocab"), "i32"),
    **dict.fromkeys(("stride_outer", "grad_stride_outer"), "i64"),
    **dict.fromkeys(("stride_inner", "grad_stride_inner"), "i32"),
}
_FORWARD_ONLY = ("logprobs_ptr", "logsumexp_ptr")
_BACKWARD_ONLY = tuple(name for name in _SCORE if name.startswith("grad_"))


def _score_kernels(
    element: str, vector: int, row_options: bool, divisible: bool
) -> list[TritonKernel]:
    """Forward and backward of token_logprobs for a long row, ``vector`` elements a load."""
    types = _SCORE | {"logits_ptr": f"*{element}", "grad_ptr": f"*{element}"}
    absent = {} if row_options else {"row_temperature_ptr": None, "mask_ptr": None}
    aligned = ("vocab", "stride_outer", "stride_inner") if divisible else ()
    suffix = ("" if divisible else " odd vocabulary") + (" mask" if row_options else "")
    module = "pyllmtune.kernels.token_logprobs"
    threads = 256
    forward = TritonKernel(
        name=f"token_logprobs_fwd {element}{suffix}",
        function=f"{module}:_token_logprobs_fwd_kernel",
        signature={k: v for k, v in types.items() if k not in (*_BACKWARD_ONLY, *absent)},
        constants={"LANES": 2 * threads, "VECTOR": vector, **absent},
        divisible=("logits_ptr", "tokens_ptr", *aligned),
        num_warps=8,
    )
    backward = TritonKernel(
        name=f"token_logprobs_bwd {element}{suffix}",
        function=f"{module}:_token_logprobs_bwd_kernel",
        signature={k: v for k, v in types.items() if k not in (*_FORWARD_ONLY, *absent)},
        constants={"BLOCK_V": 4 * threads * vector, **absent},
        divisible=(
            "logits_ptr",
            "grad_ptr",
            "tokens_ptr",
            *aligned,
            *(f"grad_{name}" for name in aligned if name != "vocab"),
        ),
        num_warps=8,
    )
    return [forward, backward]


CUDA = [
    CudaSource(
        "tests/gpuless/drivers/token_logprobs.cpp",
        blocks={"token_logprobs_kernel": Block(256), "token_logprobs_backward_kernel": Block(256)},
        flags=CUDA_FLAGS,
    ),
]

TRITON = [
    *(
        kernel
        for element, vector, row_options, divisible in (
            ("fp32", 4, False, True),
            ("fp16", 8, False, True),
            ("bf16", 8, False, True),
            ("bf16", 8, True, True),
            ("bf16", 8, False, False),
        )
        for kernel in _score_kernels(element, vector, row_options, divisible)
    ),
]
