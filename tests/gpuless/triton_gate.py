"""Compiles Triton kernels ahead of time for GPUs that are not there, and reads the result.

    compile_triton([TritonKernel(...)], ["sm_90", "gfx942"]) -> {(name, arch): Facts}

Triton decides at import whether it interprets, so this runs in a process of its own without
TRITON_INTERPRET: ``python -m tests.gpuless.triton_gate`` reads kernels as JSON from stdin and
writes facts to stdout.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from . import binary_facts
from .binary_facts import Facts, amdgcn_facts, cubin_facts
from .build_cache import build as cached_build
from .kernels_under_test import TritonKernel
from .nvcc_gate import GateFailure
from .toolchain import BUILD, REPO, version_line

TRITON_ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")


def compile_triton(
    kernels: Sequence[TritonKernel], archs: Sequence[str] = TRITON_ARCHS
) -> dict[tuple[str, str], Facts]:
    """Facts by name and architecture, all from one process; Triton's own cache lies beside ours."""
    environment = dict(os.environ, TRITON_CACHE_DIR=str(BUILD / "triton"))
    environment.pop("TRITON_INTERPRET", None)
    request = json.dumps({"kernels": list(map(dataclasses.asdict, kernels)), "archs": list(archs)})
    command = [sys.executable, "-m", "tests.gpuless.triton_gate"]
    done = subprocess.run(
        command, input=request, capture_output=True, text=True, cwd=REPO, env=environment
    )
    if done.returncode != 0:
        raise GateFailure(f"Triton refused a kernel\n{done.stderr}")
    return {(name, arch): Facts(**facts) for name, arch, facts in json.loads(done.stdout)}


def _compile(kernel: TritonKernel, arch: str) -> Facts:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = kernel.function.split(":")
    jit_function = getattr(importlib.import_module(module), function)
    source = ASTSource(
        jit_function,
        signature={
            name: kernel.signature.get(name, "constexpr") for name in jit_function.arg_names
        },
        constexprs=dict(kernel.constants),
        attrs=_divisibility(jit_function.arg_names, kernel.divisible),
    )
    nvidia = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if nvidia else GPUTarget("hip", arch, 64)
    options = {"num_warps": kernel.num_warps, **kernel.options}
    compiled = triton.compile(source, target=target, options=options)
    if not nvidia:
        return amdgcn_facts(compiled.asm["amdgcn"], compiled.metadata.shared)
    return _facts_of_cubin(arch, compiled)


def _facts_of_cubin(arch: str, compiled: Any) -> Facts:
    """Disassembling takes longer than compiling, so its result is kept, too."""

    def make(facts_file: Path, depfile: Path) -> None:
        cubin = facts_file.with_suffix(".cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        facts = cubin_facts(cubin, compiled.metadata.shared)
        facts_file.write_text(json.dumps(dataclasses.asdict(facts)))
        depfile.write_text(f"facts: {binary_facts.__file__}\n")

    key = [compiled.hash, version_line("cuobjdump")]
    return Facts(**json.loads(cached_build(f"triton-{arch}", key, ".json", make).read_text()))


def _divisibility(arguments: Sequence[str], divisible: Sequence[str]) -> Mapping[tuple[int], Any]:
    return {(arguments.index(name),): [["tt.divisibility", 16]] for name in divisible}


def main() -> None:
    request = json.load(sys.stdin)
    kernels = [TritonKernel(**fields) for fields in request["kernels"]]
    for kernel in kernels:  # imported once, before the workers are forked
        importlib.import_module(kernel.function.split(":")[0])
    jobs = list(itertools.product(kernels, request["archs"]))
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as workers:
        facts = list(workers.map(_compile, *zip(*jobs, strict=True)))
    results = [
        (kernel.name, arch, dataclasses.asdict(fact))
        for (kernel, arch), fact in zip(jobs, facts, strict=True)
    ]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
