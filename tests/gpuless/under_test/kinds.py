"""What a file in this folder lists: sources for nvcc, and configurations for Triton."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# those of setup.py that change code
CUDA_FLAGS = ("-ftz=true", "--expt-relaxed-constexpr")


class Block(NamedTuple):
    """What a launch gives one block."""

    threads: int
    dynamic_smem: int = 0


@dataclass(frozen=True)
class CudaSource:
    """A file for nvcc, relative to the repository, and the block of each kernel in it."""

    source: str
    blocks: Mapping[str, Block]
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class TritonKernel:
    """One configuration of a ``@triton.jit`` function, given as ``module:function``."""

    name: str
    function: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    # num_stages, maxnreg and whatever else a launch may be given
    options: Mapping[str, Any] = field(default_factory=dict)
