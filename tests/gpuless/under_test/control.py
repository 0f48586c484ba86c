"""The gates' own control: a softmax that is known to be good."""

from __future__ import annotations

from .kinds import Block, CudaSource, TritonKernel

CUDA = [CudaSource("tests/gpuless/clean_softmax.cu", blocks={"softmax_kernel": Block(256)})]

TRITON = [
    *(
        TritonKernel(
            name=f"softmax_kernel {element} BLOCK {block}",
            function="tests.gpuless.control_kernels:softmax_kernel",
            signature={
                "x_ptr": f"*{element}",
                "y_ptr": f"*{element}",
                "stride_xr": "i32",
                "stride_yr": "i32",
                "columns": "i32",
            },
            constants={"BLOCK": block},
            divisible=("x_ptr", "y_ptr", "stride_xr", "stride_yr", "columns"),
            num_warps=8,
        )
        for element, block in (("fp32", 2048), ("bf16", 4096))
    ),
]
