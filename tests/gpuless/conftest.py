"""Triton reads TRITON_INTERPRET when a kernel is decorated, so it is set before any import."""

import os
from importlib.util import find_spec

os.environ.setdefault("TRITON_INTERPRET", "0" if "PYLLMTUNE_TEST_GPU" in os.environ else "1")

# pytest imports every module to look for doctests; these two need triton
collect_ignore = [] if find_spec("triton") else ["watched_builder.py", "control_kernels.py"]
