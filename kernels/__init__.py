"""The Triton floor, installed as ``pyllmtune.kernels``."""

if __name__ != "pyllmtune.kernels":
    raise ImportError(
        f"this folder is the package pyllmtune.kernels, but was found as {__name__!r}, because the "
        "folder above it is on sys.path; pip install -e . and import pyllmtune.kernels"
    )
