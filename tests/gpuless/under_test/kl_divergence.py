"""The kernels of kl_divergence under the compile gates."""

from __future__ import annotations

from .kinds import CUDA_FLAGS, Block, CudaSource, TritonKernel

_MODULE = "pyllmtune.kernels.kl_divergence"
_STRIDES = dict.fromkeys(
    (f"{name}stride_{axis}" for name in ("", "ref_") for axis in ("outer", "inner")), "i64"
)


def _kernels(
    element: str, vector: int, mixture: bool, options: bool, divisible: bool
) -> list[TritonKernel]:
    """Forward and backward for a long row; with ``options`` a temperature a row, a mask and both
    gradients, without them that of the logits alone.
    """
    logits = dict.fromkeys(("logits_ptr", "ref_logits_ptr"), f"*{element}")
    grads = dict.fromkeys(("grad_ptr", "ref_grad_ptr"), f"*{element}")
    rows = {"row_temperature_ptr": "*fp32", "mask_ptr": "*u8"}
    scalars = {"temperature": "fp32", "weight": "fp32"}
    scalars |= dict.fromkeys(("rows", "inner", "vocab"), "i32") | _STRIDES
    absent = {} if options else dict.fromkeys((*rows, "ref_grad_ptr"))
    suffix = (" mixture" if mixture else "") + (" options" if options else "")
    suffix += "" if divisible else " odd vocabulary"

    def kernel(word: str, types: dict[str, str], **sizes: int) -> TritonKernel:
        return TritonKernel(
            name=f"kl_divergence_{word} {element}{suffix}",
            function=f"{_MODULE}:_kl_divergence_{word}_kernel",
            signature={k: v for k, v in types.items() if k not in absent},
            constants={"MIXTURE": mixture, **sizes, **{k: None for k in absent if k in types}},
            divisible=(
                *(name for name in (*logits, *grads) if name in types and name not in absent),
                *(("vocab", *_STRIDES) if divisible else ()),
            ),
            num_warps=8,
        )

    results = dict.fromkeys(("divergence_ptr", "stats_ptr"), "*fp32")
    upstream = dict.fromkeys(("stats_ptr", "upstream_ptr"), "*fp32")
    return [
        kernel(
            "fwd", logits | rows | results | scalars, LANES=256, VECTOR=4 if mixture else vector
        ),
        kernel("bwd", logits | grads | rows | upstream | scalars, BLOCK_V=512 * vector),
    ]


CUDA = [
    CudaSource(
        "tests/gpuless/drivers/kl_divergence.cpp",
        blocks={"kl_divergence_kernel": Block(256), "kl_divergence_backward_kernel": Block(256)},
        flags=CUDA_FLAGS,
    ),
]

TRITON = [
    *(
        kernel
        for element, vector, mixture, options, divisible in (
            ("fp32", 4, False, False, True),
            ("bf16", 8, False, False, True),
            ("fp16", 8, False, True, True),
            ("bf16", 8, True, True, True),
            ("fp32", 4, True, False, True),
            ("bf16", 8, False, False, False),
        )
        for kernel in _kernels(element, vector, mixture, options, divisible)
    ),
]
