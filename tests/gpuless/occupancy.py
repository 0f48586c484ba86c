"""How many blocks of a kernel an SM holds, by threads, registers, shared memory and slots.

    blocks_per_sm("sm_90", registers=32, threads=256, smem=1024) -> 8;  0: the launch fails

The rules are those of CUDA's cuda_occupancy.h, against which test_compile_gates.py compares them.
"""

from __future__ import annotations

WARP = 32
MAX_THREADS = 2048  # an SM's
MAX_BLOCKS = 32
MAX_REGISTERS = 65536
PARTITIONS = 4  # of an SM; each has a quarter of the registers
REGISTER_GRANULE = 256  # registers are given to a warp in units of this
SMEM_GRANULE = 128
SMEM_RESERVED = 1024  # a block's, taken by the system
SMEM_KIB = {"sm_80": 164, "sm_90": 228, "sm_100": 228}  # an SM's


def _round_up(value: int, granule: int) -> int:
    return -(-value // granule) * granule


def blocks_per_sm(arch: str, *, registers: int, threads: int, smem: int) -> int:
    """Resident blocks; ``smem`` is static and dynamic shared memory of a block together."""
    if arch not in SMEM_KIB:
        raise ValueError(f"arch must be one of {', '.join(SMEM_KIB)}, got {arch!r}")
    warps = -(-threads // WARP)
    registers_per_warp = _round_up(max(registers, 1) * WARP, REGISTER_GRANULE)
    if registers_per_warp * _round_up(warps, PARTITIONS) > MAX_REGISTERS:
        return 0  # the hardware's check before a launch
    resident_warps = MAX_REGISTERS // PARTITIONS // registers_per_warp * PARTITIONS
    smem_per_block = _round_up(smem + SMEM_RESERVED, SMEM_GRANULE)
    return min(
        MAX_BLOCKS,
        MAX_THREADS // WARP // warps,
        resident_warps // warps,
        SMEM_KIB[arch] * 1024 // smem_per_block,
    )
