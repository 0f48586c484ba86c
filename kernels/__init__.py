"""The Triton floor, installed as ``pyllmtune.kernels``."""

if __name__ != "pyllmtune.kernels":
    # The project's root is on sys.path and somebody looks for a package named "kernels", as
    # transformers does at import. This is not it: without file and path it counts as absent, and
    # its submodules cannot be imported under the wrong name.
    del __file__
    __path__ = []
