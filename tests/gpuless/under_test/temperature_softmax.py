"""The kernels of temperature_softmax under the compile gates."""

from __future__ import annotations

from .kinds import CUDA_FLAGS, Block, CudaSource, TritonKernel


def _softmax_kernels(
    element: str, vector: int, stored: str, log: bool, divisible: bool
) -> list[TritonKernel]:
    """Forward and backward of temperature_softmax for a long row; with one temperature a row, and
    its gradient, where ``log`` is set.
    """
    types = {
        **dict.fromkeys(("logits_ptr", "grad_ptr"), f"*{element}"),
        **dict.fromkeys(("output_ptr", "upstream_ptr"), f"*{stored}"),
        **dict.fromkeys(("row_temperature_ptr", "grad_temperature_ptr"), "*fp32"),
        "temperature": "fp32",
        **dict.fromkeys(("inner", "vocab"), "i32"),
    }
    absent = () if log else ("row_temperature_ptr", "grad_temperature_ptr")
    suffix = (" log" if log else "") + ("" if divisible else " odd vocabulary")
    module = "pyllmtune.kernels.temperature_softmax"

    def kernel(word: str, pointers: tuple[str, ...], strides: tuple[str, ...], **sizes: int):
        names = (*pointers, "temperature", "inner", "vocab")
        rows = {f"{name}stride_{axis}": "i64" for name in strides for axis in ("outer", "inner")}
        return TritonKernel(
            name=f"temperature_softmax_{word} {element} to {stored}{suffix}",
            function=f"{module}:_temperature_softmax_{word}_kernel",
            signature={k: types[k] for k in names if k not in absent} | rows,
            constants={"LOG": log, **sizes, **{k: None for k in absent if k in names}},
            divisible=(
                *(name for name in pointers if types[name] != "*fp32" or "temp" not in name),
                *(("vocab", *rows) if divisible else ()),
            ),
            num_warps=8,
        )

    outputs = 16 // {"fp32": 4, "bf16": 2, "fp16": 2}[stored]
    return [
        kernel(
            "fwd",
            ("logits_ptr", "row_temperature_ptr", "output_ptr"),
            ("", "out_"),
            LANES=512,
            VECTOR=vector,
        ),
        kernel(
            "bwd",
            (
                *("upstream_ptr", "output_ptr", "row_temperature_ptr"),
                *("grad_ptr", "grad_temperature_ptr"),
            ),
            ("upstream_", "", "grad_"),
            BLOCK_V=512 * outputs,
        ),
    ]


CUDA = [
    CudaSource(
        "tests/gpuless/drivers/temperature_softmax.cpp",
        blocks={
            "temperature_softmax_kernel": Block(256),
            "temperature_softmax_backward_kernel": Block(256),
        },
        flags=CUDA_FLAGS,
    ),
]

TRITON = [
    *(
        kernel
        for element, vector, stored, log, divisible in (
            ("fp32", 4, "fp32", False, True),
            ("bf16", 8, "bf16", False, True),
            ("fp16", 8, "fp16", True, True),
            ("bf16", 8, "fp32", True, True),
            ("bf16", 8, "bf16", False, False),
        )
        for kernel in _softmax_kernels(element, vector, stored, log, divisible)
    ),
]
