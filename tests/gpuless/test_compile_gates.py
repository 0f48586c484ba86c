"""The compile gates: shipped kernels are within their budgets, planted losses are noticed."""

from __future__ import annotations

import itertools
import subprocess

import pytest

from . import compile_gates as gates
from .kernels_under_test import Block, CudaSource, TritonKernel
from .nvcc_gate import GateFailure, compile_cuda
from .occupancy import SMEM_KIB, blocks_per_sm
from .toolchain import REPO, cuda_home, require, tool
from .triton_gate import compile_triton

FAULTS = "tests/gpuless/gate_faults.cu"
BLOCKS = {"copy_kernel": Block(256), "many_registers_kernel": Block(256)}


@pytest.fixture(autouse=True)
def compilers() -> None:
    require("nvcc", "g++", "c++filt", "triton", "cuobjdump")


def softmax(name="softmax", *, divisible=True, block=2048, num_warps=8, **options) -> TritonKernel:
    types = {
        "x_ptr": "*bf16",
        "y_ptr": "*bf16",
        "stride_xr": "i32",
        "stride_yr": "i32",
        "columns": "i32",
    }
    return TritonKernel(
        name=name,
        function="tests.gpuless.control_kernels:softmax_kernel",
        signature=types,
        constants={"BLOCK": block},
        divisible=tuple(types) if divisible else ("x_ptr", "y_ptr"),
        num_warps=num_warps,
        options=options,
    )


def test_kernels_under_test_are_within_their_budgets():
    rows = gates.measure()
    assert {row.arch for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    found = gates.verdict(rows)
    assert not found, "\n".join(found)
    if gates.budget_compilers() != gates.compilers():
        pytest.skip(f"budgets are for {gates.budget_compilers()}, here is {gates.compilers()}")


def test_facts_of_the_control():
    facts = compile_cuda(CudaSource("tests/gpuless/clean_softmax.cu", blocks={}), "sm_90")
    assert set(facts) == {f"softmax_kernel<{t}, 256>" for t in ("float", "__half", "__nv_bfloat16")}
    for fact in facts.values():
        assert fact.smem == 32 and fact.spills == fact.stack == 0
        assert fact.loads == fact.loads_128 > 0 and fact.stores == fact.stores_128 > 0


def test_nvcc_takes_what_the_emulator_runs():
    """The emulator's spelling of CUDA is CUDA's."""
    facts = compile_cuda(CudaSource("tests/gpuless/clean_kernels.cu", blocks={}), "sm_90")
    assert {"intrinsics_kernel", "atomics_kernel", "ticket_sum_kernel"} <= set(facts)


# ---- planted losses


def test_a_spill_is_an_error():
    with pytest.raises(GateFailure, match=r"(?s)refused .*gate_faults.cu.*spill"):
        compile_cuda(CudaSource(FAULTS, BLOCKS, flags=("-maxrregcount=32",)), "sm_90")


def test_lost_vectors_are_reported(tmp_path):
    table = tmp_path / "budgets.csv"
    gates.write_budgets(gates.measure([CudaSource(FAULTS, BLOCKS)], []), table)
    rows = gates.measure([CudaSource(FAULTS, BLOCKS, flags=("-DLOSE_VECTORS",))], [])
    for arch in gates.CUDA_ARCHS:
        assert f"copy_kernel {arch}: min_128bit_loads is 1, measured 0" in gates.verdict(
            rows, table
        )
        assert f"copy_kernel {arch}: min_128bit_stores is 1, measured 0" in gates.verdict(
            rows, table
        )


def test_lost_vectors_of_triton_are_seen():
    """An odd vocabulary alone is enough: every 16-byte access becomes eight of two bytes."""
    kernels = [softmax("even"), softmax("odd", divisible=False)]
    good, bad = compile_triton(kernels, ["sm_90"]).values()
    assert good.loads_128 == good.loads > 0 and good.stores_128 == good.stores > 0
    assert bad.loads_128 == bad.stores_128 == 0


def test_spills_of_triton_are_seen():
    """64 values a thread do not fit 32 registers, nor an eighth of an AMD unit's."""
    facts = compile_triton([softmax(num_warps=1, maxnreg=32, waves_per_eu=8)], ["sm_90", "gfx942"])
    for key, fact in facts.items():
        assert fact.spills + fact.stack > 0, key


def test_a_block_that_fits_on_no_sm_is_reported(tmp_path):
    blocks = BLOCKS | {"many_registers_kernel": Block(1024)}
    rows = gates.measure([CudaSource(FAULTS, blocks)], [])
    assert [row.blocks_per_sm for row in rows if row.kernel == "many_registers_kernel"] == [0, 0, 0]
    assert any(
        "many_registers_kernel sm_90: no block fits" in line for line in gates.failures(rows)
    )
    assert blocks_per_sm("sm_90", registers=96, threads=1024, smem=0) == 0


def test_the_table_names_every_kernel_and_no_other(tmp_path):
    table = tmp_path / "budgets.csv"
    rows = gates.measure([CudaSource(FAULTS, BLOCKS)], [])
    gates.write_budgets(rows[1:], table)
    assert gates.verdict(rows, table) == [
        "copy_kernel sm_100: no budget; run compile_gates --write"
    ]
    gates.write_budgets(rows, table)
    assert gates.verdict(rows, table) == []
    assert gates.verdict(rows[1:], table) == ["copy_kernel sm_100: a budget, but no such kernel"]
    with pytest.raises(GateFailure, match=r"does not say how \w+_kernel of"):
        gates.measure([CudaSource(FAULTS, {})], [])


def test_what_does_not_compile_fails():
    with pytest.raises(GateFailure, match="refused"):
        compile_cuda(CudaSource(FAULTS, BLOCKS, flags=("-Dcopy_kernel=(",)), "sm_90")
    with pytest.raises(GateFailure, match="Triton refused"):
        compile_triton([softmax(block=1000)], ["sm_90"])  # no power of two


# ---- occupancy


def test_occupancy_agrees_with_cuda(tmp_path):
    """On 1,620 combinations, those at the limits among them."""
    program = tmp_path / "occupancy_reference"
    source = REPO / "tests" / "gpuless" / "occupancy_reference.cpp"
    includes = ["-I", cuda_home() / "include"]
    subprocess.run([tool("g++"), *includes, source, "-o", program], check=True)
    combinations = list(
        itertools.product(
            SMEM_KIB,
            (16, 32, 33, 62, 64, 65, 96, 128, 255),
            (32, 33, 256, 992, 1024),
            (0, 31, 40000),
            (0, 1000, 100 << 10, 163 << 10),
        )
    )
    lines = [f"{arch[3:]} {r} {t} {s} {d}" for arch, r, t, s, d in combinations]
    done = subprocess.run(
        [program], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    expected = list(map(int, done.stdout.split()))
    assert len(expected) == len(combinations) == 1620 and -1 not in expected
    for (arch, registers, threads, static, dynamic), blocks in zip(
        combinations, expected, strict=True
    ):
        got = blocks_per_sm(arch, registers=registers, threads=threads, smem=static + dynamic)
        assert got == blocks, (arch, registers, threads, static, dynamic)
