"""The kernels of filter_logits and sample under the compile gates."""

from __future__ import annotations

from .kinds import CUDA_FLAGS, Block, CudaSource, TritonKernel

_FILTER = {
    **dict.fromkeys(("lists_ptr", "cuts_ptr", "kept_ids_ptr"), "*i32"),
    **dict.fromkeys(("tokens_ptr", "rank_ptr", "num_kept_ptr", "ends_ptr"), "*i64"),
    **dict.fromkeys(("logprobs_ptr", "kept_mass_ptr", "entropy_ptr"), "*fp32"),
    "valid_ptr": "*u8",
    **dict.fromkeys(("temperature", "min_p"), "fp32"),
    **dict.fromkeys(("top_k", "fraction", "seed", "position"), "i64"),
    **dict.fromkeys(("first_row", "rows", "logits_rows", "inner", "vocab", "bits"), "i32"),
    **dict.fromkeys(("num_samples", "stride_allowed"), "i32"),
    **{f"{name}stride_outer": "i64" for name in ("", "out_", "grad_", "output_")},
    **{f"{name}stride_inner": "i32" for name in ("", "out_", "grad_", "output_")},
}
_PER_ROW = {
    **{"row_temperature_ptr": "*fp32", "row_min_p_ptr": "*fp32"},
    **{"row_top_k_ptr": "*i64", "row_top_p_ptr": "*fp64"},
    **dict.fromkeys(("row_seed_ptr", "row_position_ptr", "row_indices_ptr"), "*i64"),
    "allowed_ptr": "*i32",
}


def _filter_kernels(element: str, order: int, per_row: bool, divisible: bool) -> list[TritonKernel]:
    """filter_logits, its gradient, and the three kernels of sample."""
    elements = dict.fromkeys(("logits_ptr", "out_ptr", "grad_ptr", "output_ptr"), f"*{element}")
    suffix = ("" if divisible else " odd vocabulary") + (" rows" if per_row else "")
    row = ("vocab", "stride_outer", "stride_inner") if divisible else ()
    block = 256 * 4  # four tokens a thread; the gradient two 16-byte loads

    def kernel(
        function: str, name: str, optional: tuple[str, ...], *aligned: str, **constants: int
    ) -> TritonKernel:
        return TritonKernel(
            name=f"{name} {element}{suffix}",
            function=f"pyllmtune.kernels.{function}_kernel",
            signature=elements | _FILTER | (_PER_ROW if per_row else {}),
            constants=constants | ({} if per_row else dict.fromkeys(optional)),
            divisible=aligned,
            num_warps=8,
            options={} if name.endswith("bwd") else {"maxnreg": 128},
        )

    pointers = ("grad_ptr", "output_ptr", "out_ptr")
    strides = tuple(f"{kind}_{name}" for kind in ("grad", "output") for name in row[1:])
    filters, masks = tuple(_PER_ROW)[:4], ("allowed_ptr", "row_indices_ptr")
    written = ("out_ptr", "out_stride_outer", "out_stride_inner") if divisible else ("out_ptr",)
    sizes = {"ORDER": order, "BLOCK": block}
    lists = ("logits_ptr", *row, "lists_ptr")
    return [
        kernel(
            *("filter_logits:_filter_logits_fwd", "filter_logits_fwd", filters),
            *(*lists, *written),
            **sizes,
        ),
        kernel(
            *("filter_logits:_filter_logits_bwd", "filter_logits_bwd", filters[:1]),
            *(*pointers, *row[:1], *strides),
            BLOCK=256 * 2 * (4 if element == "fp32" else 8),
        ),
        kernel("sample:_sample_fwd", "sample_fwd", tuple(_PER_ROW), *lists, **sizes),
        kernel(
            *("sample_results:sample_scores", "sample_scores", (*masks, *filters[:1])),
            *lists[:-1],
            BLOCK=block,
        ),
        kernel(
            "sample_results:sample_kept_ids", "sample_kept_ids", masks, *lists[:-1], BLOCK=block
        ),
    ]


CUDA = [
    CudaSource(
        "tests/gpuless/drivers/filter_logits.cpp",
        blocks={"filter_logits_kernel": Block(512), "filter_logits_backward_kernel": Block(256)},
        flags=CUDA_FLAGS,
    ),
    CudaSource(
        "tests/gpuless/drivers/sample.cpp",
        blocks={
            "sample_kernel": Block(512),
            "kept_offsets_kernel": Block(512),
            "kept_ids_kernel": Block(512),
        },
        flags=CUDA_FLAGS,
    ),
]

TRITON = [
    *(
        kernel
        for element, order, per_row, divisible in (
            ("fp32", 0, False, True),
            ("fp16", 1, False, True),
            ("bf16", 2, False, True),
            ("bf16", 3, True, False),
        )
        for kernel in _filter_kernels(element, order, per_row, divisible)
    ),
]
