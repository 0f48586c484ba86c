"""Builds and loads drivers of CUDA kernels as host code, and runs Python under a sanitizer.

    library = load(["tests/gpuless/drivers/softmax.cpp"])      # g++ once, then from the cache
    library.call("softmax_f32", x, y, rows, columns)           # KernelFault names the mistake
    library = load(["tests/gpuless/drivers/softmax.cpp"], "tsan")      # finds races as well
    outcome = run_sanitized("asan", "pytest", "tests/test_softmax_cuda.py", "-q")

A driver is C++ that includes cuda_on_cpu.h and one ``.cuh``, and launches its kernels from ``extern
"C"`` functions of pointers, ``int64_t`` and ``double``, which return what ``emu::guarded`` returns.
Three flavours of build:

    plain   as fast as it gets; several seeds show results that depend on the order of threads
    asan    AddressSanitizer and UndefinedBehaviourSanitizer, in a process of run_sanitized
    tsan    g++'s -fsanitize=thread, with a race detector of our own (emu_races.h); 20 times slower

A process of ``run_sanitized`` loads its flavour without being told: one test file serves all three.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from .build_cache import build as cached_build
from .toolchain import REPO, ToolMissing, cuda_home, tool, version_line

FLAVOUR_VARIABLE = "PYLLMTUNE_EMULATOR_FLAVOUR"
FLAVOURS = {  # flags of the compiler
    "plain": ["-O2"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": [
        "-O1",
        "-fsanitize=thread",
        *(f"-fno-builtin-{name}" for name in ("memcpy", "memmove", "memset")),
    ],
}
RACES = "tests/gpuless/emu_races.cpp"  # what tsan's instrumentation calls; not itself instrumented
FLAGS = [
    "-std=c++17",
    "-g1",  # lines for the sanitizers' reports
    "-fPIC",
    "-fno-strict-aliasing",  # CUDA code reads T through uint4*; g++ -O2 makes nonsense of that
    "-ffp-contract=off",
    "-ftrivial-auto-var-init=pattern",  # a local that is not written is -1.7e38, not luck
    "-fno-threadsafe-statics",  # one thread
    "-fno-gnu-unique",  # two libraries in one process keep their own emulator
]


class KernelFault(AssertionError):
    """A checker found a mistake in a kernel or its launch."""


class Outcome(NamedTuple):
    """How a process ended: 0 means no finding; ``output`` is all that it printed and reported."""

    returncode: int
    output: str


class EmulatedLibrary:
    """A built driver, loaded. It has an emulator, and a seed, of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # PyDLL keeps the GIL: the emulator runs one launch at a time
        self._library = ctypes.PyDLL(str(path))
        self._library.emu_last_fault.restype = ctypes.c_char_p

    def seed(self, seed: int) -> None:
        """The order of blocks and threads: 0 is by index, anything else new in every round."""
        self._library.emu_set_seed(ctypes.c_uint(seed))

    def call(self, entry: str, *arguments: Any) -> None:
        """Runs an entry of the driver; raises KernelFault with the emulator's message.

        Tensors and arrays go as pointers, None as a null pointer, int as int64_t, float as double.
        """
        function = getattr(self._library, entry)
        if function(*map(_as_c, arguments)) != 0:
            message = self._library.emu_last_fault().decode()
            lines = re.sub("{0x[0-9a-f]+}", lambda place: _line(self._path, place[0]), message)
            raise KernelFault(f"{entry}: {lines}")


@functools.cache
def _line(library: Path, place: str) -> str:
    """The line of a return address ``{0x...}``: the innermost one outside the emulator."""
    address = int(place[1:-1], 16) - 1  # within the call
    command = [str(tool("addr2line")), "-i", "-e", str(library), hex(address)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [Path(line.split(" (")[0]).name for line in found.splitlines()]
    return next((line for line in lines if not line.startswith("emu_")), lines[0])


def _as_c(value: Any) -> Any:
    if value is None or isinstance(value, ctypes.Array):
        return value
    if hasattr(value, "data_ptr"):  # torch.Tensor
        return ctypes.c_void_p(value.data_ptr())
    if hasattr(value, "ctypes"):  # numpy.ndarray
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, (bool, int)):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    raise TypeError(
        f"a driver takes tensors, arrays, None, int and float, got {type(value).__name__}"
    )


def build(
    sources: Sequence[str | Path], flavour: str = "plain", defines: Sequence[str] = ()
) -> Path:
    """Compiles drivers into one library, unless the same was compiled before; returns its path.

    Args:
        sources: driver files, relative to the repository or absolute.
        flavour: "plain", "asan" or "tsan".
        defines: macros such as ``"PLANTED_FAULT=3"``.
    """
    if flavour not in FLAVOURS:
        raise ValueError(f"flavour must be one of {', '.join(FLAVOURS)}, got {flavour!r}")
    files = [str(REPO / source) for source in sources]
    includes = ["-I", str(REPO / "tests" / "gpuless"), "-I", str(REPO / "csrc")]
    # cuda_on_cpu.h comes before everything, however a driver's includes are sorted
    includes += ["-isystem", str(cuda_home() / "include"), "-include", "cuda_on_cpu.h"]
    macros = [f"-D{define}" for define in defines]
    commands = [[*FLAGS, *FLAVOURS[flavour], *includes, *macros, file] for file in files]
    # every symbol must be there now, not when a test runs
    link = ["-shared", "-Wl,-z,defs", "-ldl"]
    if flavour == "tsan":
        commands.append([*FLAGS, "-O2", str(REPO / RACES)])
    if flavour == "asan":
        link += FLAVOURS["asan"]
    key = [version_line("g++"), *link, *(part for command in commands for part in command)]
    make = functools.partial(_compile, commands, link)
    return cached_build(f"{Path(files[0]).stem}-{flavour}", key, ".so", make)


def _compile(commands: list[list[str]], link: list[str], library: Path, depfile: Path) -> None:
    objects = [str(library.with_suffix(f".{i}.o")) for i in range(len(commands))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(_gxx, "-c", "-MMD", "-o", made, "-xc++", *command)
            for made, command in zip(objects, commands, strict=True)
        ]
    for job in jobs:
        job.result()
    _gxx("-o", str(library), *objects, *link)
    depfile.write_text("".join(Path(made).with_suffix(".d").read_text() for made in objects))


def _gxx(*arguments: str) -> None:
    command = [str(tool("g++")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=_plain_environment())
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def load(
    sources: Sequence[str | Path], flavour: str | None = None, *, defines: Sequence[str] = ()
) -> EmulatedLibrary:
    """Builds drivers and loads them, in the flavour of this process unless one is given.

    "asan" is for processes of ``run_sanitized`` only: its runtime must be there from the start.
    """
    flavour = flavour or os.environ.get(FLAVOUR_VARIABLE, "plain")
    return EmulatedLibrary(build(sources, flavour, defines))


def run_sanitized(flavour: str, target: str, *args: str, timeout: float = 600) -> Outcome:
    """Runs ``python target args...`` from the repository's root; any finding makes it fail.

    Args:
        flavour: "asan" or "tsan"; "plain" runs without a sanitizer.
        target: a ``.py`` file, or the name of a module as for ``python -m``.
        timeout: seconds, after which ``subprocess.TimeoutExpired`` is raised.
    """
    python = [sys.executable, *([] if target.endswith(".py") else ["-m"]), target, *args]
    with tempfile.TemporaryDirectory() as reports:
        variables = _sanitizer_variables(Path(reports) / "report") if flavour == "asan" else {}
        done = subprocess.run(
            python,
            cwd=REPO,
            env=_plain_environment() | variables | {FLAVOUR_VARIABLE: flavour},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
        )
        found = [path.read_text(errors="replace") for path in sorted(Path(reports).iterdir())]
    return Outcome(done.returncode, "\n".join([done.stdout, *found]))


def _sanitizer_variables(report: Path) -> dict[str, str]:
    """For a Python process under ASan; findings go to ``report``, since pytest hides stderr."""
    # libstdc++ too: ASan looks __cxa_throw up once, before Python loads a library that brings it
    libraries = [runtime_library(name) for name in ("libasan.so", "libstdc++.so")]
    return {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": f"detect_leaks=0:detect_stack_use_after_return=0:log_path={report}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={report}",
        "PYTHONMALLOC": "malloc",  # red zones around what Python allocates, too
    }


@functools.cache
def runtime_library(name: str) -> str:
    """Where g++ keeps a sanitizer's runtime: preloaded, since Python itself is not instrumented."""
    command = [str(tool("g++")), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        raise ToolMissing(f"g++ has no {name}: install its sanitizer runtimes")
    return os.path.realpath(path)


def _plain_environment() -> dict[str, str]:
    """This process's environment without its sanitizer: a compiler must not run under one."""
    ours = {
        "LD_PRELOAD",
        "ASAN_OPTIONS",
        "UBSAN_OPTIONS",
        "PYTHONMALLOC",
        FLAVOUR_VARIABLE,
    }
    return {name: value for name, value in os.environ.items() if name not in ours}
