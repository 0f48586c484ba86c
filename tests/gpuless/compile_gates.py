"""Compiles every kernel under test for real GPUs and compares it with the budgets in budgets.csv.

    python -m tests.gpuless.compile_gates            table; fails where a kernel is over its budget
    python -m tests.gpuless.compile_gates --write    makes what is measured the budget: see the diff
    python -m tests.gpuless.compile_gates --write gae    ... of this word's kernels alone

Finds: spills, lost 16-byte accesses, more registers or shared memory, fewer blocks on an SM or none
(a launch that fails). Cannot find: anything at run time. Counts are of instructions in the binary,
not of those executed.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .binary_facts import Facts
from .kernels_under_test import (
    CUDA_SOURCES,
    TRITON_KERNELS,
    Block,
    CudaSource,
    TritonKernel,
    of_word,
)
from .nvcc_gate import CUDA_ARCHS, GateFailure, compile_cuda
from .occupancy import SMEM_KIB, blocks_per_sm
from .toolchain import version_line
from .triton_gate import TRITON_ARCHS, compile_triton

BUDGETS = Path(__file__).with_name("budgets.csv")
COLUMNS = {  # of the table: from a row, and the sign of what is worse
    "registers_max": (lambda row: row.facts.registers, +1),
    "spills_max": (lambda row: row.facts.spills + row.facts.stack, +1),
    "smem_max": (lambda row: row.smem, +1),
    "min_128bit_loads": (lambda row: row.facts.loads_128, -1),
    "min_128bit_stores": (lambda row: row.facts.stores_128, -1),
    "min_blocks_per_sm": (lambda row: row.blocks_per_sm, -1),
}


@dataclass(frozen=True)
class Row:
    """A kernel for an architecture; ``smem`` is all of a block's, AMD has no ``blocks_per_sm``."""

    kernel: str
    arch: str
    facts: Facts
    smem: int
    blocks_per_sm: int | None

    def budget(self) -> dict[str, int | None]:
        return {column: measure(self) for column, (measure, _) in COLUMNS.items()}


def _row(kernel: str, arch: str, facts: Facts, block: Block) -> Row:
    smem = facts.smem + block.dynamic_smem
    blocks = None
    if arch in SMEM_KIB:
        blocks = blocks_per_sm(arch, registers=facts.registers, threads=block.threads, smem=smem)
    return Row(kernel, arch, facts, smem, blocks)


def _block_of(source: CudaSource, kernel: str) -> Block:
    for name in (kernel, kernel.partition("<")[0]):
        if name in source.blocks:
            return source.blocks[name]
    raise GateFailure(
        f"tests/gpuless/under_test does not say how {kernel} of {source.source} is launched"
    )


def measure(
    cuda_sources: Sequence[CudaSource] = CUDA_SOURCES,
    triton_kernels: Sequence[TritonKernel] = TRITON_KERNELS,
) -> list[Row]:
    """Compiles everything, or takes it from the cache; a spill raises GateFailure."""
    jobs = list(itertools.product(cuda_sources, CUDA_ARCHS))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(compile_cuda, *zip(*jobs, strict=True))) if jobs else []
    rows = [
        _row(kernel, arch, facts, _block_of(source, kernel))
        for (source, arch), facts_of in zip(jobs, compiled, strict=True)
        for kernel, facts in facts_of.items()
    ]
    threads = {kernel.name: 32 * kernel.num_warps for kernel in triton_kernels}
    facts_of = compile_triton(triton_kernels, TRITON_ARCHS) if triton_kernels else {}
    rows += [
        _row(name, arch, facts, Block(threads[name])) for (name, arch), facts in facts_of.items()
    ]
    return sorted(rows, key=lambda row: (row.kernel, row.arch))


def read_budgets(path: Path = BUDGETS) -> dict[tuple[str, str], dict[str, int | None]]:
    with path.open(newline="") as file:
        return {
            (row["kernel"], row["arch"]): {
                column: int(row[column]) if row[column] else None for column in COLUMNS
            }
            for row in csv.DictReader(line for line in file if not line.startswith("#"))
        }


def write_budgets(rows: Iterable[Row], path: Path = BUDGETS, *, keep_others: bool = False) -> None:
    """``keep_others``: budgets of kernels that are not in ``rows`` stay."""
    budgets = read_budgets(path) if keep_others else {}
    budgets |= {(row.kernel, row.arch): row.budget() for row in rows}
    with path.open("w", newline="") as file:
        file.write(f"# {compilers()}\n")
        table = csv.DictWriter(file, ["kernel", "arch", *COLUMNS], lineterminator="\n")
        table.writeheader()
        for (kernel, arch), budget in sorted(budgets.items()):
            table.writerow({"kernel": kernel, "arch": arch, **budget})


def compilers() -> str:
    """The versions that budgets hold for: others may allocate registers differently."""
    import triton

    return f"{version_line('nvcc')}, triton {triton.__version__}"


def budget_compilers(path: Path = BUDGETS) -> str:
    return path.read_text().splitlines()[0].removeprefix("# ")


def differences(
    rows: Sequence[Row], budgets: dict[tuple[str, str], dict[str, int | None]]
) -> list[str]:
    """What is worse than its budget, has none, or is no longer there: a line each."""
    found = []
    for row in rows:
        budget = budgets.get((row.kernel, row.arch))
        if budget is None:
            found.append(f"{row.kernel} {row.arch}: no budget; run compile_gates --write")
            continue
        for column, (of_row, worse) in COLUMNS.items():
            value, limit = of_row(row), budget[column]
            if value is not None and (limit is None or worse * (value - limit) > 0):
                found.append(f"{row.kernel} {row.arch}: {column} is {limit}, measured {value}")
    gone = budgets.keys() - {(row.kernel, row.arch) for row in rows}
    found += [f"{kernel} {arch}: a budget, but no such kernel" for kernel, arch in sorted(gone)]
    return found


def verdict(rows: Sequence[Row], path: Path = BUDGETS) -> list[str]:
    """Everything that is wrong. Budgets of other compilers are not compared."""
    found = failures(rows)
    if budget_compilers(path) == compilers():
        found += differences(rows, read_budgets(path))
    return found


def failures(rows: Sequence[Row]) -> list[str]:
    """What no budget can allow: spills, and blocks that fit on no SM."""
    found = []
    for row in rows:
        local = row.facts.spills + row.facts.stack
        if local:
            found.append(f"{row.kernel} {row.arch}: {local} bytes of spills and local arrays")
        if row.blocks_per_sm == 0:
            found.append(f"{row.kernel} {row.arch}: no block fits on an SM, the launch fails")
    return found


def print_table(rows: Sequence[Row]) -> None:
    print(
        f"{'kernel':48}{'arch':8}{'regs':>5}{'smem':>7}{'loads':>7}{'128':>5}{'stores':>7}{'128':>5}{'blocks':>7}"
    )
    for row in rows:
        f, blocks = row.facts, "" if row.blocks_per_sm is None else row.blocks_per_sm
        print(
            f"{row.kernel:48}{row.arch:8}{f.registers:5}{row.smem:7}{f.loads:7}{f.loads_128:5}"
            f"{f.stores:7}{f.stores_128:5}{blocks:>7}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="make what is measured the budget")
    parser.add_argument("word", nargs="?", help="only the kernels that under_test/<word>.py lists")
    options = parser.parse_args(arguments)
    rows = measure(*of_word(options.word)) if options.word else measure()
    print_table(rows)
    if options.write:
        write_budgets(rows, keep_others=bool(options.word))
    elif budget_compilers() != compilers():
        print(f"budgets not compared: they are for {budget_compilers()}, here is {compilers()}")
    found = failures(rows) if options.word else verdict(rows)
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
