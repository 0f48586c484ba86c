"""Who touched which element of a launch's tensors: bounds, races and bytes, for triton_guard.py.

Every element has three entries: the program that read it, wrote it, updated it by an atomic;
programs are numbered from 1, 0 is none and -1 several. An access conflicts if another program has
left an entry that it may not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from .emulator import KernelFault

SECTOR = 32  # bytes; what a GPU fetches at least
SEVERAL = -1
# which entries of other programs an access must not meet, and which it leaves
CONFLICTS = {
    "load": ("written", "updated"),
    "store": ("read", "written", "updated"),
    "atomic": ("read", "written"),
}
LEAVES = {"load": "read", "store": "written", "atomic": "updated"}


@dataclass
class Launch:
    """Bytes that one launch moved: of every unmasked lane; if unique, of every element once."""

    kernel: str
    loaded: int = 0
    stored: int = 0
    atomics: int = 0
    loaded_sectors: int = 0  # 32-byte sectors, summed over the calls of tl.load
    stored_sectors: int = 0
    unique_loaded: int = 0
    unique_stored: int = 0


@dataclass
class Traffic:
    """What the launches inside one guard moved: each, and together by the names of a Launch."""

    launches: list[Launch] = field(default_factory=list)

    loaded = property(lambda self: self._total("loaded"))
    stored = property(lambda self: self._total("stored"))
    atomics = property(lambda self: self._total("atomics"))
    loaded_sectors = property(lambda self: self._total("loaded_sectors"))
    stored_sectors = property(lambda self: self._total("stored_sectors"))
    unique_loaded = property(lambda self: self._total("unique_loaded"))
    unique_stored = property(lambda self: self._total("unique_stored"))

    def _total(self, name: str) -> int:
        return sum(getattr(launch, name) for launch in self.launches)


class Region:
    """The memory of arguments that share a storage, in units of its smallest elements."""

    def __init__(self, named: list[tuple[str, Any]]) -> None:
        ends = [tensor.data_ptr() + _span_bytes(tensor) for _, tensor in named]
        self.names = " = ".join(dict.fromkeys(name for name, _ in named))
        self.start, self.end = min(tensor.data_ptr() for _, tensor in named), max(ends)
        self.unit = min(tensor.element_size() for _, tensor in named)
        units = (self.end - self.start) // self.unit
        self.inside = np.zeros(units, bool)
        for _, tensor in named:
            self._allow(tensor)
        self.entries = {name: np.zeros(units, np.int32) for name in LEAVES.values()}

    def _allow(self, tensor: Any) -> None:
        size = tensor.element_size() // self.unit
        elements = np.lib.stride_tricks.as_strided(
            self.inside[(tensor.data_ptr() - self.start) // self.unit :],
            shape=(*tensor.shape, size),
            strides=(*(stride * size for stride in tensor.stride()), 1),
        )
        elements[...] = True

    def units(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Indices of the units of each access: [accesses, units of one]."""
        if size < self.unit:  # a pointer was cast to a smaller type
            repeats = self.unit // size
            self.inside = self.inside.repeat(repeats)
            self.entries = {name: entry.repeat(repeats) for name, entry in self.entries.items()}
            self.unit = size
        first = (addresses - self.start) // self.unit
        return first[:, None] + np.arange(size // self.unit)

    def unique_bytes(self, name: str) -> int:
        return int(np.count_nonzero(self.entries[name])) * self.unit


def _span_bytes(tensor: Any) -> int:
    """From the first byte to behind the last one; torch has no negative strides."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def regions_of(named: list[tuple[str, Any]]) -> list[Region]:
    """Regions by address, from the tensors of a launch and the names of their arguments."""
    by_storage: dict[int, list[tuple[str, Any]]] = {}
    for name, tensor in named:
        if tensor.numel() > 0:
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
    return sorted(map(Region, by_storage.values()), key=lambda region: region.start)


class MemoryWatch:
    """Told of every launch and every access; raises KernelFault."""

    def __init__(self, position: Callable[[], tuple[tuple, tuple]], races: bool) -> None:
        """``position`` returns the running program's index and the grid, three numbers each."""
        self._position, self._races = position, races
        self._regions: list[Region] = []
        self.traffic = Traffic()

    def begin(self, kernel: str, tensors: list[tuple[str, Any]]) -> None:
        self._regions = regions_of(tensors)
        self.traffic.launches.append(Launch(kernel))

    def end(self) -> None:
        launch = self.traffic.launches[-1]
        launch.unique_loaded = sum(region.unique_bytes("read") for region in self._regions)
        launch.unique_stored = sum(region.unique_bytes("written") for region in self._regions)

    def load(self, addresses: np.ndarray, size: int) -> None:
        launch = self.traffic.launches[-1]
        launch.loaded += addresses.size * size
        launch.loaded_sectors += np.unique(addresses // SECTOR).size
        self._access("load", addresses, size)

    def store(self, addresses: np.ndarray, size: int) -> None:
        launch = self.traffic.launches[-1]
        launch.stored += addresses.size * size
        launch.stored_sectors += np.unique(addresses // SECTOR).size
        self._access("store", addresses, size)

    def atomic(self, addresses: np.ndarray, size: int) -> None:
        self.traffic.launches[-1].atomics += addresses.size * size
        self._access("atomic", addresses, size)

    def _access(self, kind: str, addresses: np.ndarray, size: int) -> None:
        if (addresses % size).any():
            self.fault(f"{kind} of {size} bytes at an address that is no multiple of {size}")
        for region, part in self._by_region(kind, addresses, size):
            units = region.units(part, size)
            inside = region.inside[units].all(1)
            if not inside.all():
                self._out_of_bounds(kind, part[~inside], region)
            self._record(kind, region, units.ravel())

    def _by_region(
        self, kind: str, addresses: np.ndarray, size: int
    ) -> Iterator[tuple[Region, np.ndarray]]:
        starts = [region.start for region in self._regions]
        owners = np.searchsorted(np.array(starts, np.int64), addresses, side="right") - 1
        for owner in np.unique(owners):
            part = addresses[owners == owner]
            if owner < 0:
                self._out_of_bounds(kind, part, self._regions[0] if self._regions else None)
            region = self._regions[owner]
            if (part + size > region.end).any():
                self._out_of_bounds(kind, part[part + size > region.end], region)
            yield region, part

    def _out_of_bounds(self, kind: str, outside: np.ndarray, region: Region | None) -> NoReturn:
        where = "and no argument is a tensor with elements"
        if region is not None:
            where = (
                f"the first at byte {outside[0] - region.start:+d} of {region.names}, "
                f"which spans {region.end - region.start} bytes"
            )
        self.fault(f"{kind} out of bounds in {outside.size} lane(s), {where}")

    def _record(self, kind: str, region: Region, units: np.ndarray) -> None:
        (x, y, z), (_, ny, nz) = self._position()
        me = (x * ny + y) * nz + z + 1
        if kind == "store" and np.unique(units).size != units.size:
            self.fault(f"two lanes of one store write the same element of {region.names}")
        for deed in CONFLICTS[kind] if self._races else ():
            entry = region.entries[deed][units]
            others = np.count_nonzero((entry != 0) & (entry != me))
            if others:
                what = f"{kind} in {region.names} of {others} element(s)"
                self.fault(f"race: {what} that another program has {deed}")
        own = region.entries[LEAVES[kind]]
        own[units] = np.where((own[units] == 0) | (own[units] == me), me, SEVERAL)

    def fault(self, message: str) -> NoReturn:
        index, _ = self._position()
        raise KernelFault(f"{self.traffic.launches[-1].kernel}, program {index}: {message}")
