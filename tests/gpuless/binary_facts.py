"""Reads what compilers say about a kernel: ptxas's log, cuobjdump's listings, AMD's metadata.

    Facts: registers, spills, stack, shared memory, and global loads and stores by width.

Counts are of instructions in the binary, not of those executed. 128-bit means 128 bits or wider
(sm_100 has 256).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .toolchain import tool


@dataclass(frozen=True)
class Facts:
    """Of one kernel for one architecture; sizes in bytes, registers and spills of one thread."""

    registers: int
    spills: int  # stores and loads; of Triton's and AMD's kernels what the binary shows of them
    stack: int
    smem: int
    loads: int
    loads_128: int
    stores: int
    stores_128: int


def short_name(mangled: str) -> str:
    """``pyllmtune::f<float, 256>(float const*)`` without its namespaces and parameters."""
    command = [str(tool("c++filt")), mangled]
    name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    depth = 0
    for end, letter in enumerate(name):  # to the parenthesis that opens the parameters
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            name = name[:end]
            break
    head, bracket, template = name.partition("<")
    return head.rsplit("::", 1)[-1] + bracket + template


def ptxas_facts(log: str) -> dict[str, dict[str, int]]:
    """Registers, spills, stack and static shared memory by mangled name, from ``ptxas -v``."""
    facts = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part[: part.index("'")]
        stack, spill_stores, spill_loads = map(
            int,
            re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
            ).groups(),
        )
        smem = re.search(r"(\d+) bytes smem", part)
        facts[name] = {
            "registers": int(re.search(r"Used (\d+) registers", part).group(1)),
            "spills": spill_stores + spill_loads,
            "stack": stack,
            "smem": int(smem.group(1)) if smem else 0,
        }
    return facts


def _cuobjdump(option: str, cubin: Path) -> str:
    command = [str(tool("cuobjdump")), option, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _accesses(loads: Iterable[str], stores: Iterable[str], wide: str) -> dict[str, int]:
    counts = {}
    for name, instructions in (("loads", list(loads)), ("stores", list(stores))):
        counts[name] = len(instructions)
        counts[f"{name}_128"] = sum(re.search(wide, text) is not None for text in instructions)
    return counts


def sass_accesses(cubin: Path) -> dict[str, dict[str, int]]:
    """Global loads and stores by mangled name, from the disassembly."""
    accesses = {}
    for part in _cuobjdump("-sass", cubin).split("Function : ")[1:]:
        accesses[part.split(maxsplit=1)[0]] = _accesses(
            re.findall(r"\bLDG[.\w]*", part), re.findall(r"\bSTG[.\w]*", part), r"\.(128|256)\b"
        )
    return accesses


def cubin_facts(cubin: Path, smem: int) -> Facts:
    """Of the one kernel in Triton's cubin. ``smem``: the listing counts reserved bytes too."""
    usage = _cuobjdump("--dump-resource-usage", cubin)
    registers, stack, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)", usage).groups()
    )
    (accesses,) = sass_accesses(cubin).values()
    return Facts(registers=registers, spills=local, stack=stack, smem=smem, **accesses)


def amdgcn_facts(assembly: str, smem: int) -> Facts:
    """Of the one kernel in Triton's AMD assembly."""
    metadata = dict(re.findall(r"\.(\w+_count|private_segment_fixed_size):\s+(\d+)", assembly))
    accesses = _accesses(
        re.findall(r"\b(?:global|buffer|flat)_load_\w+", assembly),
        re.findall(r"\b(?:global|buffer|flat)_store_\w+", assembly),
        r"dwordx4",
    )
    return Facts(
        registers=int(metadata["vgpr_count"]),
        spills=int(metadata["vgpr_spill_count"]) + int(metadata["sgpr_spill_count"]),
        stack=int(metadata["private_segment_fixed_size"]),
        smem=smem,
        **accesses,
    )
