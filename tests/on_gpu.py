"""The tests' GPU floors on a real GPU: PYLLMTUNE_TEST_GPU=1 python -m pytest tests

The floors "triton" and "emulated" keep their names and take CPU tensors, but arguments are copied
to the GPU, the Triton or CUDA kernels run there, and results come back. So every test of an op is a
test of the device; what belongs to the interpreter or the emulator alone is left out.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from pyllmtune import _backend, _load, _ops

WANTED = "PYLLMTUNE_TEST_GPU" in os.environ

DEVICE = "cuda"
FLOORS = {"triton": "triton", "emulated": "cuda"}  # what runs under each name

# tests of what executes kernels where there is no GPU
EMULATOR = ("order_of_threads", "sanitizers")


def belongs_there(item: Any) -> bool:
    """A test of one of the two floors."""
    name = item.nodeid
    parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
    floor = "gpuless/test_emulated" in name or bool({*map(str, parameters)} & {*FLOORS})
    return floor and not any(word in name for word in EMULATOR)


def there(x: Any, storages: dict[int, torch.UntypedStorage]) -> Any:
    """A tensor on the GPU with the strides and alignment of ``x``; views of one storage stay so."""
    if not isinstance(x, Tensor):
        return x
    memory = x.untyped_storage()
    if memory.data_ptr() not in storages:
        copy = torch.empty(0, dtype=torch.uint8).set_(memory).to(DEVICE, copy=True)
        storages[memory.data_ptr()] = copy.untyped_storage()
    moved = torch.empty(0, dtype=x.dtype, device=DEVICE)
    return moved.set_(storages[memory.data_ptr()], x.storage_offset(), x.size(), x.stride())


def run_there(floor: str, word: str, *args: Any) -> Any:
    """An operator of a floor on the GPU, for CPU tensors."""
    if args[0].dtype == torch.float64:
        name = next(name for name, runs in FLOORS.items() if runs == floor)
        raise ValueError(f"backend={name!r} has no kernel for {args[0].dtype}")
    operator = _ops.handle(word, floor)
    storages: dict[int, torch.UntypedStorage] = {}
    moved = [there(x, storages) for x in args]
    results = operator(*moved)
    for declared, here, gone in zip(operator._schema.arguments, args, moved, strict=True):
        if declared.alias_info is not None and declared.alias_info.is_write:
            here.copy_(gone)
    if isinstance(results, tuple | list):
        return tuple(x.cpu() for x in results)
    return None if results is None else results.cpu()


@functools.cache
def install() -> None:
    """Puts the GPU behind both names."""
    if _load.cuda_module is None and DEVICE == "cuda":
        raise RuntimeError(f"PYLLMTUNE_TEST_GPU=1, but {_load.why_not('cuda')}")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    _backend._interpreting = lambda: True  # the Triton floor takes CPU tensors
    _ops.add_floor("emulated")
    _backend.extra_floors.append("emulated")
    for name, floor in FLOORS.items():
        for word in _ops.SCHEMAS | _ops.COMPOSED:
            run = functools.partial(run_there, floor, word)
            _ops.LIBRARY.impl(_ops.op_name(word, name), run, "CPU", allow_override=True)
