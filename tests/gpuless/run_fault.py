"""Runs one planted fault: ``python -m tests.gpuless.run_fault NAME`` prints y, or dies of it.

In a process of its own, since a sanitizer ends the one that it finds a fault in.
"""

from __future__ import annotations

import ctypes
import sys

from .emulator import EmulatedLibrary, KernelFault, load

SOURCE = "tests/gpuless/faults.cu"
SIZE = 256


def run(library: EmulatedLibrary, name: str) -> list[float]:
    """Calls the entry with x[i] = i and returns y."""
    x = (ctypes.c_float * SIZE)(*range(SIZE))
    y = (ctypes.c_float * SIZE)()
    library.call(name, x, y)
    return list(y)


if __name__ == "__main__":
    try:
        print(run(load([SOURCE]), sys.argv[1]))
    except KernelFault as fault:
        sys.exit(f"KernelFault: {fault}")
