"""Keeps what a compiler made, under the hash of everything it was made from.

A build leaves two files: ``<name>-<key hash>.deps``, the list of files that the compiler read (from
its own ``-MMD`` output), and the product, named by the hash of the contents of those files. The
next build hashes the listed files first; if the product of that hash exists, nothing is compiled.
Switching between two versions of a source therefore finds both. Headers of the system and of CUDA
are not listed: compiler versions are in the key.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .toolchain import BUILD, cuda_home


def build(name: str, key: Sequence[str], suffix: str, make: Callable[[Path, Path], None]) -> Path:
    """The product of ``make(product, depfile)``, made now or earlier from the same contents.

    Args:
        name: begins the file names; for people who look into the folder.
        key: whatever else the product depends on: flags, compiler versions.
        suffix: of the product's file name.
        make: writes the product and a make rule that lists the files it was made from.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    key_hash = hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
    listing = BUILD / f"{name}-{key_hash}.deps"
    if listing.is_file():
        product = _product(name, key_hash, listing.read_text().splitlines(), suffix)
        if product is not None and product.is_file():
            return product
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        fresh, new_listing = Path(folder) / f"product{suffix}", Path(folder) / "deps"
        sources = _make_from_settled_sources(make, fresh, Path(folder) / "product.d")
        product = _product(name, key_hash, sources, suffix)
        if product is None:
            raise RuntimeError(f"{name}: a source vanished during its compilation")
        new_listing.write_text("\n".join(sources))
        os.replace(fresh, product)  # atomic: another process may build or load the same
        os.replace(new_listing, listing)
    return product


def _make_from_settled_sources(
    make: Callable[[Path, Path], None], product: Path, depfile: Path
) -> list[str]:
    """Makes it again if a source was edited meanwhile: the hash must be of what was compiled."""
    while True:
        started = time.time()
        make(product, depfile)
        sources = _read_depfile(depfile)
        if all(os.path.getmtime(source) < started for source in sources):
            return sources


def _product(name: str, key_hash: str, sources: Sequence[str], suffix: str) -> Path | None:
    digest = hashlib.sha256(key_hash.encode())
    for source in sources:
        if not os.path.isfile(source):
            return None
        digest.update(source.encode() + b"\0" + Path(source).read_bytes() + b"\0")
    return BUILD / f"{name}-{digest.hexdigest()[:24]}{suffix}"


def _read_depfile(depfile: Path) -> list[str]:
    """The files of make rules ``target: file \\ file``, without repeats and CUDA's headers."""
    rules = depfile.read_text().replace("\\\n", " ").replace("\\ ", "\0").splitlines()
    files = [file for rule in rules for file in rule.partition(":")[2].split()]
    paths = {os.path.realpath(file.replace("\0", " ")) for file in files}
    return sorted(path for path in paths if not path.startswith(f"{cuda_home()}/"))
