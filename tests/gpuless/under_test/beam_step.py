"""The kernels of beam_step under the compile gates."""

from __future__ import annotations

from .kinds import CUDA_FLAGS, Block, CudaSource, TritonKernel

_TYPES = {
    **dict.fromkeys(("beam_scores_ptr", "stats_ptr", "joined_ptr", "scores_ptr"), "*fp32"),
    **dict.fromkeys(("lists_ptr", "tokens_ptr", "parents_ptr"), "*i64"),
    "taken_ptr": "*i32",
    **dict.fromkeys(("is_eos_ptr", "valid_ptr"), "*u8"),
    **dict.fromkeys(("temperature", "penalty"), "fp32"),
    **dict.fromkeys(("beams", "vocab", "kept", "parts", "candidates", "groups"), "i32"),
    **dict.fromkeys(("eos_count", "stride_allowed", "stride_inner"), "i32"),
    "stride_outer": "i64",
}
_OPTIONAL = {"row_temperature_ptr": "*fp32", "widths_ptr": "*i64"}
_MASK, _EOS = {"allowed_ptr": "*i32"}, {"eos_ptr": "*i64"}


def _rows(element: str, optional: bool, divisible: bool) -> TritonKernel:
    pointers = _OPTIONAL | _MASK
    row = ("vocab", "stride_outer", "stride_inner") if divisible else ()
    return TritonKernel(
        name=f"beam_rows {element}" + (" allowed, widths" if optional else ""),
        function="pyllmtune.kernels.beam_step:_beam_rows_kernel",
        signature={"logits_ptr": f"*{element}"} | _TYPES | (pointers if optional else {}),
        constants={"WHOLE_SUM": False, "BLOCK": 4096}
        | ({} if optional else dict.fromkeys(pointers)),
        divisible=("logits_ptr", "lists_ptr", *row),
        num_warps=8,
    )


def _merge(optional: bool) -> TritonKernel:
    pointers = _OPTIONAL | _EOS
    return TritonKernel(
        name="beam_merge" + (" widths, eos" if optional else ""),
        function="pyllmtune.kernels.beam_step:_beam_merge_kernel",
        signature=_TYPES | (pointers if optional else {}),
        constants={"PARTS": 64, "EOS": 2, "BLOCK": 1024}
        | ({} if optional else dict.fromkeys(pointers)),
        divisible=("lists_ptr", "stats_ptr", "joined_ptr"),
        num_warps=4,
        options={"maxnreg": 128},
    )


CUDA = [
    CudaSource(
        "tests/gpuless/drivers/beam_step.cpp",
        blocks={"beam_rows_kernel": Block(256), "beam_merge_kernel": Block(256)},
        flags=CUDA_FLAGS,
    ),
]

TRITON = [
    _rows("fp32", optional=False, divisible=True),
    _rows("fp16", optional=False, divisible=True),
    _rows("bf16", optional=False, divisible=True),
    _rows("bf16", optional=True, divisible=False),
    _merge(optional=False),
    _merge(optional=True),
]
