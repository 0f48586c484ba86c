"""Watches kernels in Triton's interpreter: bounds, races, bytes, and the interpreter's own errors.

    with guard() as traffic:
        softmax_kernel[(rows,)](x, y, ...)           # KernelFault names program and mistake
    assert traffic.loaded + traffic.stored == floor  # requested bytes, exactly

Finds: loads, stores and atomics outside the elements of the tensor arguments (gaps between strided
rows are outside); races between the programs of a launch; two lanes of one store on one element;
bfloat16 arithmetic, which the interpreter would do on the raw bits; masked lanes that are used
though ``other`` was not given (they are NaN or -1). Puts right: float32 to bfloat16 rounds to
nearest even; other conversions and ``tl.dot`` take bfloat16 by value.

How: while the guard lasts, the interpreter's builder is a watched_builder.WatchedBuilder, and
memory_watch.py keeps the books. An argument that is passed twice is one range of memory; a program
may write what it alone has read.

Cannot find: races between the warps of one program, and whatever else Triton's compiler decides. A
hand-over from program to program through an atomic counter looks like a race: use
``guard(races=False)``. ``tl.dot`` of float32 is exact here and rounded to tf32 on a GPU, unless the
kernel asks for ``input_precision="ieee"``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from .emulator import KernelFault
from .memory_watch import MemoryWatch, Traffic


@contextlib.contextmanager
def guard(races: bool = True) -> Iterator[Traffic]:
    """Checks every interpreted Triton launch inside the ``with`` block and adds up its bytes.

    Args:
        races: also report elements that several programs of one launch touch, one of them writing.
    """
    import triton
    from triton.runtime.interpreter import GridExecutor, ReduceScanOpInterface, interpreter_builder

    from .watched_builder import check_tensor, watching

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("guard() needs TRITON_INTERPRET=1, set before the kernels are imported")
    watch = MemoryWatch(lambda: (interpreter_builder.grid_idx, interpreter_builder.grid_dim), races)
    run_grid = GridExecutor.__call__

    def run_watched_grid(executor: Any, *args: Any, **kwargs: Any) -> None:
        named = [*zip(executor.arg_names, args, strict=False), *kwargs.items()]
        watch.begin(executor.fn.__name__, [pair for item in named for pair in _tensors(*item)])
        try:
            run_grid(executor, *args, **kwargs)
        except Exception as error:  # the interpreter wraps what a kernel raises
            fault = _fault_behind(error)
            if fault is None:
                raise
            raise KernelFault(str(fault)) from error
        finally:
            watch.end()

    with (
        watching(interpreter_builder, watch),
        mock.patch.object(GridExecutor, "__call__", run_watched_grid),
        mock.patch.object(ReduceScanOpInterface, "check_tensor", check_tensor),
    ):
        yield watch.traffic


def _tensors(name: str, argument: Any) -> Iterator[tuple[str, Any]]:
    """The tensors of a kernel argument: itself, behind a descriptor or a wrapper, or in a tuple."""
    if isinstance(argument, tuple):
        for item in argument:
            yield from _tensors(name, item)
        return
    argument = getattr(argument, "base", argument)
    if hasattr(argument, "untyped_storage"):
        yield name, argument


def _fault_behind(error: BaseException | None) -> KernelFault | None:
    while error is not None and not isinstance(error, KernelFault):
        error = error.__cause__
    return error
