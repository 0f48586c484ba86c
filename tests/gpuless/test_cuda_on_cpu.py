"""The emulator: clean kernels are right and silent in every flavour, planted faults are caught."""

from __future__ import annotations

import os

import numpy as np
import pytest

from . import run_fault
from .emulator import FLAVOUR_VARIABLE, KernelFault, build, load, run_sanitized
from .toolchain import require

CLEAN_SOURCES = ["tests/gpuless/clean_kernels.cu", "tests/gpuless/clean_softmax.cu"]
# asan needs a process of its own, which runs the clean kernels of this file once more
IN_ASAN = os.environ.get(FLAVOUR_VARIABLE) == "asan"
SEEDS, BLOCKS = (0, 1, 2), 3


@pytest.fixture(autouse=True)
def compilers() -> None:
    require("g++", "nvcc")


@pytest.fixture(scope="module", params=["asan"] if IN_ASAN else ["plain", "tsan"])
def clean(request):
    return load(CLEAN_SOURCES, request.param)


@pytest.fixture(scope="module")
def faulty():
    return load([run_fault.SOURCE], "plain")


@pytest.fixture(scope="module")
def watched():
    return load([run_fault.SOURCE], "tsan")


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Float32 rounded to nearest even, as the upper 16 bits."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def softmax(x: np.ndarray, temperature: float) -> np.ndarray:
    z = x.astype(np.float64) / temperature
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


# ---- clean kernels, each under several orders of threads


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "dtype, relative, absolute",
    [
        ("float32", 4e-6, 0),
        ("float16", 2**-10, 2**-24),  # an output below 2^-14 is subnormal
        ("bfloat16", 2**-8, 0),
    ],
)
def test_clean_softmax(clean, dtype, relative, absolute, seed):
    x = np.random.default_rng(0).standard_normal((BLOCKS, 4096)).astype(np.float32) * 3
    encode, decode = {
        "float32": (lambda a: a, lambda a: a),
        "float16": (lambda a: a.astype(np.float16), lambda a: a),
        "bfloat16": (to_bfloat16, from_bfloat16),
    }[dtype]
    logits = encode(x)
    out = np.zeros_like(logits)
    clean.seed(seed)
    clean.call(f"softmax_{dtype}", logits, out, BLOCKS, 4096, 0.7)
    np.testing.assert_allclose(decode(out), softmax(decode(logits), 0.7), relative, absolute)


@pytest.mark.parametrize("seed", SEEDS)
def test_clean_barriers(clean, seed):
    x = np.arange(256 * BLOCKS, dtype=np.float32)
    out = np.zeros_like(x)
    clean.seed(seed)
    clean.call("reverse_twice", x, out, BLOCKS)
    np.testing.assert_array_equal(out, x)
    clean.call("reverse_warp", x, out, BLOCKS)
    np.testing.assert_array_equal(out, x.reshape(-1, 32)[:, ::-1].ravel())


@pytest.mark.parametrize("seed", SEEDS)
def test_clean_last_block_ticket(clean, seed):
    x = np.random.default_rng(1).standard_normal(256 * BLOCKS).astype(np.float32)
    partial, ticket, total = (
        np.zeros(BLOCKS, np.float32),
        np.ones(1, np.uint32),
        np.zeros(1, np.float32),
    )
    clean.seed(seed)
    clean.call("ticket_sum", x, partial, ticket, total, BLOCKS)
    assert ticket[0] == BLOCKS
    np.testing.assert_allclose(total[0], x.sum(dtype=np.float64), rtol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_clean_atomics(clean, seed):
    x = np.random.default_rng(2).integers(0, 16, 256 * BLOCKS).astype(np.int32)
    counts, total, exact = np.zeros(16, np.int32), np.zeros(1, np.float32), np.zeros(1)
    clean.seed(seed)
    clean.call("atomics", x, counts, total, exact, BLOCKS)
    np.testing.assert_array_equal(counts, np.bincount(x, minlength=16))
    assert total[0] == exact[0] == x.sum()


def test_clean_warp_operations(clean):
    x = np.random.default_rng(3).integers(-5, 6, 32).astype(np.int32)
    out = np.zeros((11, 32), np.int32)
    clean.call("warp_operations", x, out)
    lane = np.arange(32)
    ballot = np.packbits(x > 0, bitorder="little").view(np.int32)[0]
    match = [np.packbits(x == v, bitorder="little").view(np.int32)[0] for v in x]
    expected = [
        x[lane // 8 * 8 + 5],
        x[np.where(lane >= 3, lane - 3, lane)],
        x[np.where(lane % 16 < 13, lane + 3, lane)],
        x[lane ^ 9],
        np.full(32, ballot),
        np.zeros(32),  # none is above 100
        np.ones(32),
        match,
        np.full(32, x.min()),
        np.full(32, x.sum()),
        np.full(32, (x > 0).sum()),
    ]
    for row, wanted in enumerate(expected):
        np.testing.assert_array_equal(out[row], wanted, err_msg=f"operation {row}")


def test_clean_intrinsics(clean):
    random = np.random.default_rng(5)
    x = random.standard_normal(32).astype(np.float32)
    n = random.integers(0, 2**64, 32, dtype=np.uint64)
    real, integral = np.zeros((32, 7), np.float32), np.zeros((32, 6), np.uint64)
    clean.call("intrinsics", x, n, real, integral)
    wide, lane = x.astype(np.float64), np.arange(32)
    half = x[lane ^ 1].astype(np.float16)
    brain = from_bfloat16(to_bfloat16(x[np.minimum(lane + 1, 31)]))
    reals = [np.exp(wide), 2**wide, np.log2(np.maximum(wide, 1)), (wide**2 + 1) ** -0.5]
    np.testing.assert_allclose(real, np.stack([*reals, half, brain, x], 1), rtol=5e-7)
    for row, value, bits in zip(integral.tolist(), n.tolist(), x.view(np.uint32), strict=True):
        complement = 2**64 - 1 - value
        low = value % 2**32
        assert row == [
            value * complement >> 64,
            low * 0x9E3779B9 >> 32,
            value.bit_count(),
            64 - value.bit_length(),
            bits,
            min(value, 1000000),
        ]


def test_clean_partial_warp_and_three_dimensions(clean):
    y = np.zeros(80, np.float32)
    clean.call("partial_warp", y, 80)
    np.testing.assert_array_equal(y, np.arange(80) // 32 * 32)
    x = np.random.default_rng(4).standard_normal(24 * 16).astype(np.float32)
    y = np.zeros_like(x)
    clean.call("three_dimensions", x, y)
    np.testing.assert_array_equal(y, x + 1)


# ---- the same under ASan

in_plain_process = pytest.mark.skipif(IN_ASAN, reason="this process is itself the sanitized one")


@in_plain_process
def test_clean_kernels_are_silent_under_asan():
    build(CLEAN_SOURCES, "asan")
    arguments = ("-q", "--noconftest", "-k", "test_clean and not silent", __file__)
    outcome = run_sanitized("asan", "pytest", *arguments)
    assert outcome.returncode == 0, outcome.output
    assert " passed" in outcome.output and "skipped" not in outcome.output


# ---- planted faults

KERNEL_FAULTS = {
    "divergent_barriers": r"different barriers.*faults.cu:\d+.*faults.cu:\d+",
    "deadlock": r"deadlock of 256.*block barrier at faults.cu:\d+.*warp operation at faults.cu:\d+",
    "own_lane_not_in_mask": r"lane 16 is not in the mask.*thread 16 \(block 0, 0, 0\)",
    "exited_lanes_in_mask": "names lane 26, which has exited",
    "shuffle_outside_mask": "from lane 16, which is not in the mask",
    "too_many_threads": "block of 1025 x 1 x 1 threads",
    "empty_grid": "grid of 0 x 1 x 1 blocks",
    "shared_memory_not_asked_for": "65536 bytes of dynamic shared memory",
}
RACES = (
    "missing_barrier",
    "race_between_barriers",
    "missing_syncwarp",
    "race_between_syncwarps",
    "two_blocks_one_word",
    "two_blocks_between_barriers",
    "missing_threadfence",
)
ASAN_FAULTS = {
    "global_read_past_end": "heap-buffer-overflow",
    "shared_write_past_end": "index 256 out of bounds",
    "dynamic_shared_past_end": "use-after-poison",
    "misaligned_vector": "misaligned address",
    "misaligned_shared_vector": "misaligned address",
    "divergent_barriers": "different barriers",
}


@in_plain_process
@pytest.mark.parametrize("name", KERNEL_FAULTS)
def test_emulator_catches(faulty, name):
    with pytest.raises(KernelFault, match=KERNEL_FAULTS[name]):
        run_fault.run(faulty, name)


@in_plain_process
@pytest.mark.parametrize("name", RACES)
def test_races_are_caught(watched, name):
    for seed in SEEDS:  # whatever the order in which the two accesses happen
        watched.seed(seed)
        with pytest.raises(KernelFault, match=r"race: .*faults.cu:\d+, and .*faults.cu:\d+"):
            run_fault.run(watched, name)


@in_plain_process
@pytest.mark.parametrize("name", ASAN_FAULTS)
def test_asan_catches(name):
    build([run_fault.SOURCE], "asan")
    outcome = run_sanitized("asan", "tests.gpuless.run_fault", name)
    assert outcome.returncode != 0, f"asan let {name} pass"
    assert ASAN_FAULTS[name] in outcome.output
    assert "faults.cu:" in outcome.output, "the report does not name the line"


@in_plain_process
def test_a_process_of_a_flavour_loads_that_flavour():
    build([run_fault.SOURCE], "tsan")
    assert run_sanitized("plain", "tests.gpuless.run_fault", "two_blocks_one_word").returncode == 0
    outcome = run_sanitized("tsan", "tests.gpuless.run_fault", "two_blocks_one_word")
    assert outcome.returncode != 0 and "race: " in outcome.output


@in_plain_process
def test_values_show_what_no_checker_names(faulty):
    """Reads of what nobody wrote, and an order that nothing fixes, change the result."""
    faulty.seed(0)
    assert np.isnan(run_fault.run(faulty, "missing_barrier")[:128]).all()
    assert np.isnan(run_fault.run(faulty, "unwritten_shared")[128:]).all()
    assert max(run_fault.run(faulty, "unwritten_local")[128:]) < -1e38
    sums = set()
    for seed in SEEDS:
        faulty.seed(seed)
        sums.add(run_fault.run(faulty, "order_dependent_sum")[0])
    assert len(sums) > 1


@in_plain_process
def test_a_fault_leaves_the_emulator_usable(faulty, clean):
    for _ in range(3):
        with pytest.raises(KernelFault):
            run_fault.run(faulty, "deadlock")
    test_clean_barriers(clean, seed=1)
