"""The kernels of policy_loss under the compile gates."""

from __future__ import annotations

from pyllmtune.losses.config import CONSTANTS, PolicyLossConfig

from .kinds import CUDA_FLAGS, Block, CudaSource, TritonKernel

CHOICES = ("LEVEL", "RULE", "KL", "KL_GRADIENT", "AGGREGATION")


def _policy_kernels() -> list[TritonKernel]:
    """policy_loss with every input there is, for five configs, and the sum over sequences."""
    floats = ("logprobs", "old", "advantages", "ref", "entropy", "weights", "grad_logprobs")
    pointers = {f"{name}_ptr": "*fp32" for name in (*floats, "grad_entropy")}
    row = {
        **pointers,
        "offsets_ptr": "*i64",
        "mask_ptr": "*u8",
        "metrics_ptr": "*fp64",
        "total": "i32",
        **dict.fromkeys(CONSTANTS, "fp32"),
    }
    sums = {
        "rows_ptr": "*fp64",
        "metrics_ptr": "*fp64",
        **dict.fromkeys(("loss_ptr", "scale_ptr"), "*fp32"),
        "normalizer": "fp32",
        "sequences": "i32",
    }
    module = "pyllmtune.kernels.policy_loss"
    configs = {
        "token ppo": PolicyLossConfig(),
        "token cispo": PolicyLossConfig(rule="cispo", kl="k1", aggregation="constant"),
        "token dppo-kl": PolicyLossConfig(rule="dppo-kl"),
        "sequence ppo": PolicyLossConfig(
            level="sequence", kl="k3", kl_gradient="ratio", aggregation="seq-mean-token-mean"
        ),
        "sum vespo": PolicyLossConfig(level="sequence-sum", rule="vespo"),
    }
    kernels = [
        TritonKernel(
            name=f"policy_loss_fwd {name}",
            function=f"{module}:_policy_loss_fwd_kernel",
            signature=row,
            constants={
                "TOKEN_ADVANTAGES": False,
                **dict(zip(CHOICES, config.choices, strict=True)),
                "BLOCK_T": 256,
            },
            divisible=tuple(name for name in row if name.endswith("_ptr")),
            num_warps=8,
        )
        for name, config in configs.items()
    ]
    total = TritonKernel(
        name="policy_loss_total",
        function=f"{module}:_policy_loss_total_kernel",
        signature=sums,
        constants={"device_normalizer_ptr": None, "AGGREGATION": 0, "BLOCK_SEQUENCES": 128},
        divisible=("rows_ptr", "metrics_ptr"),
        num_warps=8,
    )
    return [*kernels, total]


CUDA = [
    CudaSource(
        "tests/gpuless/drivers/policy_loss.cpp",
        blocks={"policy_loss_kernel": Block(256), "policy_loss_total_kernel": Block(512)},
        flags=CUDA_FLAGS,
    ),
]

TRITON = [
    *_policy_kernels(),
]
