"""Loads the compiled modules: one CPU module per instruction set, the CUDA module, the host module.

Importing a module registers its kernels with torch. Which CPU module is taken follows the CPU, as
torch sees it; ``PYLLMTUNE_CPU_CAPABILITY`` (``baseline``, ``avx2``, ``avx512``) forces a lower one.
Nothing here raises: every reason is kept, for ``python -m pyllmtune env`` and for the error of a
backend asked for by name.
"""

from __future__ import annotations

import importlib
import os

import torch

CAPABILITY_VARIABLE = "PYLLMTUNE_CPU_CAPABILITY"

# lowest first; the torch name is what torch.backends.cpu.get_cpu_capability() says at least
_CPU_MODULES = {"baseline": "_C", "avx2": "_C_avx2", "avx512": "_C_avx512"}
_TORCH_CAPABILITY = {"AVX2": "avx2", "AVX512": "avx512"}

cpu_module: str | None = None
cuda_module: str | None = None
cpu_capability: str | None = None
reasons: dict[str, str] = {}


def _try_import(name: str) -> bool:
    try:
        importlib.import_module(f"pyllmtune.{name}")
    except ImportError as error:
        reasons[name] = str(error).split("\n")[0]
        return False
    return True


def wanted_capabilities() -> list[str]:
    """CPU capabilities to try, best first; at most what the CPU has and what the environment
    allows.
    """
    names = list(_CPU_MODULES)
    best = names.index(_TORCH_CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), "baseline"))
    forced = os.environ.get(CAPABILITY_VARIABLE)
    if forced is None:
        return names[best::-1]
    if forced not in names:
        reasons["cpp"] = f"{CAPABILITY_VARIABLE}={forced!r} is none of {', '.join(names)}"
        return []
    if names.index(forced) > best:
        reasons["cpp"] = (
            f"{CAPABILITY_VARIABLE}={forced} asks for more than this CPU has ({names[best]})"
        )
        return []
    return [forced]


def load() -> None:
    """Import the best CPU module present, and the CUDA module where torch can use one."""
    global cpu_module, cpu_capability, cuda_module
    for capability in wanted_capabilities():
        if _try_import(_CPU_MODULES[capability]):
            cpu_module, cpu_capability = _CPU_MODULES[capability], capability
            break
    if torch.version.cuda is None:
        reasons["_C_cuda"] = "this torch is built without CUDA"
    elif _try_import("_C_cuda"):
        cuda_module = "_C_cuda"


def why_not(floor: str) -> str:
    """One line: why the compiled floor ``cpp`` or ``cuda`` is absent."""
    if floor == "cuda":
        return reasons.get("_C_cuda", "pyllmtune._C_cuda was not built")
    return "; ".join(
        reasons[key] for key in ("cpp", *reversed(_CPU_MODULES.values())) if key in reasons
    )


load()
