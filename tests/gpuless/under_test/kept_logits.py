"""The kernels of kept_logits under the compile gates."""

from __future__ import annotations

from .kinds import CUDA_FLAGS, Block, CudaSource, TritonKernel

_SIZES = dict.fromkeys(("entries", "vocab", "size"), "i32")
_POINTERS = {
    **{"grad_ptr": "*fp32", "logits_ptr": "*fp32", "token_ids_ptr": "*i32", "mask_ptr": "*u8"},
    **dict.fromkeys(("offsets_ptr", "rows_ptr"), "*i64"),
}
_KERNELS = {
    "fwd": ("hidden", "weight", "offsets", "token_ids", "mask", "logits"),
    "bwd_hidden": ("grad", "weight", "offsets", "token_ids", "out"),
    "bwd_weight": ("grad", "rows", "token_ids", "hidden", "out"),
}


def _kernels(element: str, divisible: bool) -> list[TritonKernel]:
    """Forward with a mask, and both halves of backward."""
    operands = dict.fromkeys(("hidden_ptr", "weight_ptr", "out_ptr"), f"*{element}")
    found = []
    for way, names in _KERNELS.items():
        sizes = {"BLOCK_D": 512, "BLOCK_E": 4} if way == "fwd" else {"BLOCK_D": 1024}
        pointers = [f"{name}_ptr" for name in names]
        found.append(
            TritonKernel(
                name=f"kept_logits_{way} {element}{'' if divisible else ' odd size'}",
                function=f"pyllmtune.kernels.kept_logits:_kept_logits_{way}_kernel",
                signature={name: (operands | _POINTERS)[name] for name in pointers} | _SIZES,
                constants=sizes,
                divisible=(*pointers, *(("size",) if divisible else ())),
                num_warps=8 if way != "fwd" and element == "fp32" else 4,
            )
        )
    return found


CUDA = [
    CudaSource(
        "tests/gpuless/drivers/kept_logits.cpp",
        blocks={
            "kept_logits_kernel": Block(128),
            "kept_logits_backward_hidden_kernel": Block(128),
            "kept_logits_backward_weight_kernel": Block(128),
        },
        flags=CUDA_FLAGS,
    ),
]

TRITON = [
    kernel
    for element, divisible in (("fp32", True), ("bf16", True), ("fp16", True), ("bf16", False))
    for kernel in _kernels(element, divisible)
]
