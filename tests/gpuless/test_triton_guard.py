"""The guard of Triton's interpreter: clean kernels move exact bytes, planted faults are caught."""

from __future__ import annotations

import pytest
import torch

from .emulator import KernelFault
from .toolchain import require
from .triton_guard import guard

require("triton")

import triton  # noqa: E402  not before it is known to be there

from . import control_kernels as kernels  # noqa: E402

SIZE, BLOCK = 200, 64
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(kernel, *args, programs=1, races=True, **constants):
    with guard(races) as traffic:
        kernel[(programs,)](*args, **constants)
    return traffic


# ---- clean kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_softmax_is_right_and_its_bytes_are_exact(dtype):
    rows, columns = 3, 1000
    x = torch.randn(rows, columns, dtype=dtype)
    y = torch.empty_like(x)
    traffic = run(kernels.softmax_kernel, x, y, columns, columns, columns, programs=rows, BLOCK=256)
    error = (y.double() - torch.softmax(x.double(), -1)).abs() / torch.softmax(x.double(), -1)
    half_ulp = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-8}[dtype]
    assert error.max() < half_ulp  # truncation instead of rounding would double it
    floor = x.numel() * x.element_size()
    assert (traffic.loaded, traffic.stored) == (3 * floor, floor)
    assert (traffic.unique_loaded, traffic.unique_stored) == (floor, floor)
    assert traffic.atomics == 0


def test_sectors_count_what_a_gpu_fetches():
    x = torch.randn(1024)
    assert x.data_ptr() % 32 == 0
    whole = run(kernels.copy_kernel, x, torch.empty(1024), 1024, programs=4, BLOCK=256)
    assert whole.loaded_sectors == whole.stored_sectors == 1024 * 4 // 32
    shifted = run(kernels.copy_kernel, x[1:], torch.empty(1023), 1023, programs=4, BLOCK=256)
    assert shifted.loaded == 1023 * 4
    assert (
        shifted.loaded_sectors == 1024 * 4 // 32 + 3
    )  # each program but the last reads one sector more


def test_in_place_is_no_race_and_aliases_are_one_range():
    x = torch.randn(4, 100)
    want = torch.softmax(x, -1)
    traffic = run(kernels.softmax_kernel, x, x, 100, 100, 100, programs=4, BLOCK=64)
    torch.testing.assert_close(x, want)
    assert traffic.unique_loaded == traffic.unique_stored == 4 * 100 * 4
    y = torch.arange(200.0)
    run(kernels.copy_kernel, y[:100], y[100:], 100, programs=2, BLOCK=64)  # halves of one storage
    assert torch.equal(y[100:], y[:100])


def test_launches_of_one_guard_add_up():
    x, y = torch.randn(SIZE), torch.empty(SIZE)
    with guard() as traffic:
        kernels.copy_kernel[(4,)](x, y, SIZE, BLOCK=BLOCK)
        kernels.copy_kernel[(2,)](
            y, x, SIZE, BLOCK=128
        )  # another program writes what one has read before
    assert [launch.kernel for launch in traffic.launches] == ["copy_kernel", "copy_kernel"]
    assert traffic.loaded == traffic.stored == traffic.unique_loaded == 2 * SIZE * 4


def test_missing_and_empty_tensors_are_fine():
    x, y = torch.randn(SIZE), torch.empty(SIZE)
    run(kernels.maybe_add_kernel, x, None, y, SIZE, BLOCK=256)
    assert torch.equal(x, y)
    traffic = run(kernels.maybe_add_kernel, torch.empty(0), None, torch.empty(0), 0, BLOCK=256)
    assert traffic.loaded == traffic.stored == 0


def test_atomics_of_several_programs_are_no_race():
    x, counts = torch.randint(0, 8, (256,), dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    traffic = run(kernels.histogram_kernel, x, counts, programs=4, BLOCK=64)
    assert torch.equal(counts.long(), torch.bincount(x, minlength=8))
    assert traffic.atomics == 256 * 4


def test_bfloat16_is_rounded_and_multiplied_as_on_a_gpu():
    ties = torch.tensor(
        [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00000001, -0x80000000], dtype=torch.int32
    )
    x = torch.cat([torch.randn(507), ties.view(torch.float32)])
    y = torch.empty(512, dtype=torch.bfloat16)
    run(kernels.copy_kernel, x, y, 512, BLOCK=512)
    assert torch.equal(y, x.to(torch.bfloat16))
    a, b = torch.randn(2, 32, 32).to(torch.bfloat16)
    out = torch.empty(32, 32)
    run(kernels.dot_kernel, a, b, out, N=32)
    torch.testing.assert_close(out, a.float() @ b.float())


def test_the_interpreter_is_left_as_it_was():
    builder = triton.runtime.interpreter.interpreter_builder
    before = dict(vars(triton.runtime.interpreter.GridExecutor))
    run(kernels.copy_kernel, torch.randn(8), torch.empty(8), 8, BLOCK=8)
    assert type(builder) is triton.runtime.interpreter.InterpreterBuilder
    assert not hasattr(builder, "watch")
    assert dict(vars(triton.runtime.interpreter.GridExecutor)) == before


# ---- planted faults


def fault(message, kernel, *args, **options):
    with pytest.raises(KernelFault, match=message) as caught:
        run(kernel, *args, **options)
    assert kernel.__name__ in str(caught.value)


def test_out_of_bounds_is_caught():
    x, y = torch.randn(SIZE), torch.empty(SIZE)
    past_end = (
        r"out of bounds in 56 lane\(s\), the first at byte \+800 of {}_ptr, which spans 800 bytes"
    )
    fault(
        "program .3, 0, 0.: load " + past_end.format("x"),
        kernels.unmasked_load_kernel,
        x,
        y,
        SIZE,
        programs=4,
        BLOCK=BLOCK,
    )
    fault(
        "program .3, 0, 0.: store " + past_end.format("y"),
        kernels.unmasked_store_kernel,
        x,
        y,
        SIZE,
        programs=4,
        BLOCK=BLOCK,
    )
    fault("atomic out of bounds in 12", kernels.unmasked_atomic_kernel, torch.zeros(20), BLOCK=32)
    fault("no argument is a tensor", kernels.unmasked_atomic_kernel, torch.zeros(0), BLOCK=32)


def test_the_gap_between_rows_is_out_of_bounds():
    """Off by one column of a view is inside the storage, and still wrong."""
    x = torch.randn(4, 101)[:, :-1]
    y = torch.empty(4, 100)
    run(kernels.softmax_kernel, x, y, 101, 100, 100, programs=4, BLOCK=64)
    fault(
        r"load out of bounds in 1 lane",
        kernels.softmax_kernel,
        x,
        torch.empty(4, 101),
        101,
        101,
        101,
        programs=4,
        BLOCK=64,
    )


def test_races_between_programs_are_caught():
    x, y = torch.randn(SIZE), torch.empty(SIZE)
    fault(
        "race: store in y_ptr of 1 element.* written",
        kernels.write_write_race_kernel,
        x,
        y,
        programs=2,
    )
    fault(
        "race: store in x_ptr of 1 element.* read",
        kernels.read_write_race_kernel,
        x,
        SIZE,
        programs=3,
    )
    fault(
        "race: store in x_ptr of 1 element.* read",
        kernels.shared_read_then_write_kernel,
        x,
        y,
        programs=3,
    )
    fault(
        "race: atomic in counter_ptr.* read",
        kernels.atomic_against_load_kernel,
        torch.zeros(1),
        y,
        programs=2,
    )
    run(kernels.write_write_race_kernel, x, y, programs=2, races=False)


def test_two_lanes_on_one_element_are_caught():
    fault("two lanes of one store", kernels.double_store_kernel, torch.empty(64), BLOCK=64)


def test_bfloat16_arithmetic_is_caught():
    x = torch.randn(64).to(torch.bfloat16)
    message = "arithmetic on bfloat16"
    fault(message, kernels.bfloat16_product_kernel, x, torch.empty_like(x), BLOCK=64)
    fault(message, kernels.bfloat16_sum_kernel, x, torch.empty_like(x), BLOCK=64)


def test_undefined_lanes_poison_the_result():
    y = torch.zeros(1)
    run(kernels.undefined_lanes_kernel, torch.ones(50), y, 50, BLOCK=64)
    assert y.isnan()
