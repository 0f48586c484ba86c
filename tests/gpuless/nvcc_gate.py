"""Compiles CUDA sources for real GPUs with nvcc, and reads the result.

    compile_cuda(CudaSource("driver.cpp", {...}), "sm_90") -> {"f<float, 256>": Facts(...)}

A spill is an error, as is any other warning of ptxas.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

from . import binary_facts
from .binary_facts import Facts, ptxas_facts, sass_accesses, short_name
from .build_cache import build as cached_build
from .kernels_under_test import CudaSource
from .toolchain import REPO, tool, version_line

CUDA_ARCHS = ("sm_80", "sm_90", "sm_100")
FLAGS = ["-cubin", "-std=c++17", "-O3", "-x", "cu", "-Xptxas=-v,-warn-spills,-Werror"]


class GateFailure(AssertionError):
    """A kernel does not compile, spills, or is worse than its budget."""


def compile_cuda(source: CudaSource, arch: str) -> dict[str, Facts]:
    """Facts of each kernel in the file by its short name, from the cache if nothing has changed."""
    file = REPO / source.source
    includes = ["-I", str(REPO / "tests" / "gpuless"), "-I", str(REPO / "csrc")]
    includes += ["-include", "cuda_on_cpu.h"]
    flags = [*FLAGS, f"-arch={arch}", *includes, *source.flags]

    def make(facts_file: Path, depfile: Path) -> None:
        cubin = facts_file.with_suffix(".cubin")
        command = [tool("nvcc"), *flags, "-MMD", "-MF", depfile, "-o", cubin, file]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode != 0:
            raise GateFailure(f"nvcc refused {source.source} for {arch}\n{done.stderr}")
        facts_file.write_text(json.dumps(_read_facts(done.stderr, cubin)))
        with depfile.open("a") as rules:
            rules.write(f"facts: {binary_facts.__file__}\n")

    key = [*flags, str(file), version_line("nvcc"), version_line("cuobjdump")]
    facts_file = cached_build(f"{file.stem}-{arch}", key, ".json", make)
    return {name: Facts(**facts) for name, facts in json.loads(facts_file.read_text()).items()}


def _read_facts(ptxas_log: str, cubin: Path) -> dict[str, dict[str, int]]:
    accesses = sass_accesses(cubin)
    return {
        short_name(mangled): dataclasses.asdict(Facts(**facts, **accesses[mangled]))
        for mangled, facts in ptxas_facts(ptxas_log).items()
    }
