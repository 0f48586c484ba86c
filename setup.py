"""The only build logic: one CPU module per instruction set, the CUDA module, the host module.

PYLLMTUNE_BUILD=auto (default) builds what it can and says what it leaves out; 0 builds nothing
(pure Python: reference and Triton); 1 fails when the CPU modules cannot be built. The CUDA module
is built when torch has CUDA and nvcc is there, whether or not a GPU is; FORCE_CUDA=1 makes its
absence an error. PYLLMTUNE_SANITIZE=address|thread builds the CPU modules (thread: the
baseline alone) under a sanitizer, for the tests.
"""

from __future__ import annotations

import os
import platform
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

MODE = os.environ.get("PYLLMTUNE_BUILD", "auto")
SANITIZE = os.environ.get("PYLLMTUNE_SANITIZE", "")
TORCH_TARGET, TORCH_TARGET_HEX = "2.11", "0x020b000000000000"

# no -march=native: a wheel must run elsewhere; no -ffast-math: it breaks -inf and NaN
CXX_FLAGS = [
    "-std=c++20",  # torch 2.11 would ask for C++17
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]
ISA_FLAGS = {"_C": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["_C_avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["_C_avx512"] = [
        *ISA_FLAGS["_C_avx2"],
        *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")),
        "-mprefer-vector-width=512",
    ]
SANITIZER_FLAGS = {
    "": [],
    "address": [
        "-fsanitize=address,undefined",
        # a third of the build time each, and nothing here that AddressSanitizer would not stop at
        "-fno-sanitize=null,object-size,vptr,pointer-overflow",
        "-fno-sanitize-recover=all",
        "-O1",
        "-g1",  # lines, for the reports
    ],
    "thread": ["-fsanitize=thread", "-O1", "-g1"],
}
if SANITIZE == "thread":  # what threads share is the same with every instruction set
    ISA_FLAGS = {"_C": ISA_FLAGS["_C"]}


def say(message: str) -> None:
    print(f"pyllmtune: {message}", file=sys.stderr)


def cpu_modules() -> list:
    from torch.utils.cpp_extension import CppExtension

    sources = ["csrc/module.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
    if SANITIZE:  # faults that the sanitizer must find, or it proves nothing
        sources.append("tests/sanitize/planted_faults.cpp")
    sanitizer = SANITIZER_FLAGS[SANITIZE]
    return [
        CppExtension(
            f"pyllmtune.{name}",
            sources,
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_HEX)],
            extra_compile_args=CXX_FLAGS + flags + sanitizer,
            extra_link_args=[flag for flag in sanitizer if flag.startswith("-fsanitize")],
        )
        for name, flags in ISA_FLAGS.items()
    ]


def cuda_modules() -> list:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    sources = sorted(glob("csrc/cuda/*.cu"))
    missing = (
        "this torch is built without CUDA"
        if torch.version.cuda is None
        else "no CUDA toolkit found; set CUDA_HOME"
        if CUDA_HOME is None
        else None
    )
    if missing:
        if os.environ.get("FORCE_CUDA") == "1":
            raise RuntimeError(f"FORCE_CUDA=1, but {missing}")
        say(f"no CUDA module: {missing}")
        return []
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
    target = ("TORCH_TARGET_VERSION", TORCH_TARGET_HEX)
    return [
        CUDAExtension(
            "pyllmtune._C_cuda",
            ["csrc/module.cpp", *sources],
            define_macros=[target, ("USE_CUDA", None)],
            extra_compile_args={
                "cxx": CXX_FLAGS,
                "nvcc": ["-std=c++20", "-O3", "-ftz=true", "--expt-relaxed-constexpr"],
            },
        )
    ]


def host_modules() -> list:
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        say("no host module: pybind11 is not installed")
        return []
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "none")
    macros = [
        ("PLT_TORCH_TARGET", TORCH_TARGET),
        ("PLT_CPU_MODULES", " ".join(ISA_FLAGS)),
        ("PLT_CUDA_ARCHS", archs.replace(";", " ")),
    ]
    return [
        Pybind11Extension("pyllmtune._host", ["csrc/host.cpp"], define_macros=macros, cxx_std=17)
    ]


def native() -> dict:
    if MODE not in ("auto", "0", "1"):
        raise ValueError(f"PYLLMTUNE_BUILD must be auto, 0 or 1, got {MODE!r}")
    if MODE == "0":
        say("PYLLMTUNE_BUILD=0: pure Python, no compiled modules")
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError:
        if MODE == "1":
            raise
        say("pure Python: no torch here (if pip isolates the build, use --no-build-isolation)")
        return {}

    class Build(BuildExtension):
        """Each module in its own folder, since they share sources; a failure stops the build only
        when asked to.
        """

        def build_extension(self, ext) -> None:
            shared, self.build_temp = self.build_temp, str(Path(self.build_temp, ext.name))
            try:
                super().build_extension(ext)
            except Exception as error:
                if MODE == "1":
                    raise
                say(f"{ext.name} was not built: {error}")
                ext.optional = True
            finally:
                self.build_temp = shared

    return {
        "ext_modules": [*cpu_modules(), *cuda_modules(), *host_modules()],
        "cmdclass": {"build_ext": Build},
    }


setup(
    packages=[
        "pyllmtune",
        *(
            f"pyllmtune.{part}"
            for part in (
                "advantages",
                "decoding",
                "demo",
                "integrations",
                "integrations.transformers",
                "kernels",
                "losses",
                "ops",
                "reference",
            )
        ),
    ],
    package_dir={"pyllmtune": "pyllmtune", "pyllmtune.kernels": "kernels"},
    package_data={"pyllmtune": ["py.typed"]},
    **native(),
)
