"""Triton's interpreter, telling of every access to memory, and right about bfloat16.

The interpreter keeps bfloat16 as 16-bit integers. Conversions and tl.dot are put right here;
arithmetic, which a kernel should do in float32 anyway, is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

from .memory_watch import MemoryWatch


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Float32 values to bits, to nearest even, as the hardware rounds; NaN is 0x7fff."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _by_value(handle: TensorHandle) -> TensorHandle:
    """A bfloat16 handle as float32."""
    values = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return TensorHandle(values, tl.float32)


def _accessed(pointers: TensorHandle, mask: Any) -> tuple[np.ndarray, int]:
    """Addresses of the unmasked lanes, and the bytes of an element; the mask may be an array."""
    size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
    lanes = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)
    return pointers.data[lanes].astype(np.int64).ravel(), size


def _poison(pointers: TensorHandle) -> TensorHandle:
    """For masked lanes without `other`, undefined on a GPU: NaN or -1, so that their use shows."""
    element = pointers.get_element_ty()
    dtype = interpreter._get_np_dtype(element)
    byte = 1 if dtype.kind == "b" else 0xFF
    bits = np.full((*pointers.data.shape, dtype.itemsize), byte, np.uint8)
    return TensorHandle(bits.view(dtype)[..., 0], element)


class WatchedBuilder(InterpreterBuilder):
    """Has one attribute more than its base: ``watch``, a MemoryWatch."""

    def create_masked_load(self, ptrs, mask, other, *hints, **named_hints):
        self.watch.load(*_accessed(ptrs, mask))
        other = _poison(ptrs) if other is None else other
        return super().create_masked_load(ptrs, mask, other, *hints, **named_hints)

    def create_masked_store(self, ptrs, value, mask, *hints):
        self.watch.store(*_accessed(ptrs, mask))
        return super().create_masked_store(ptrs, value, mask, *hints)

    def create_atomic_rmw(self, operation, ptr, value, mask, *order):
        self.watch.atomic(*_accessed(ptr, mask))
        return super().create_atomic_rmw(operation, ptr, value, mask, *order)

    def create_atomic_cas(self, ptr, expected, value, *order):
        self.watch.atomic(*_accessed(ptr, np.ones(ptr.data.shape, bool)))
        return super().create_atomic_cas(ptr, expected, value, *order)

    def cast_impl(self, src, dst_type):
        if _is_bfloat16(src):
            src = _by_value(src)
        if dst_type.scalar == tl.bfloat16:
            return TensorHandle(round_to_bfloat16(src.data.astype(np.float32)), tl.bfloat16)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        nearest = rounding_mode != interpreter._ir.ROUNDING_MODE.RTZ
        if nearest and (_is_bfloat16(src) or dst_type.scalar == tl.bfloat16):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def create_dot(self, a, b, d, *precision):
        self._refuse_bfloat16(d)
        a, b = (_by_value(x) if _is_bfloat16(x) else x for x in (a, b))
        return super().create_dot(a, b, d, *precision)

    def binary_op(self, lhs, rhs, op):
        self._refuse_bfloat16(lhs, rhs)
        return super().binary_op(lhs, rhs, op)

    def unary_op(self, arg, op):
        self._refuse_bfloat16(arg)
        return super().unary_op(arg, op)

    def ternary_op(self, lhs, rhs, other, op):
        if op is not np.where:  # a select moves bits
            self._refuse_bfloat16(lhs, rhs, other)
        return super().ternary_op(lhs, rhs, other, op)

    def create_fma(self, x, y, z):
        self._refuse_bfloat16(x, y, z)
        return super().create_fma(x, y, z)

    def create_rsqrt(self, arg):
        self._refuse_bfloat16(arg)
        return super().create_rsqrt(arg)

    def create_erf(self, arg):
        self._refuse_bfloat16(arg)
        return super().create_erf(arg)

    def _refuse_bfloat16(self, *handles: TensorHandle) -> None:
        if any(map(_is_bfloat16, handles)):
            self.watch.fault(
                "arithmetic on bfloat16 values; convert them with .to(tl.float32) first"
            )


@contextlib.contextmanager
def watching(builder: InterpreterBuilder, watch: MemoryWatch) -> Iterator[None]:
    """Makes the interpreter's one builder a WatchedBuilder for a while."""
    builder.__class__, builder.watch = WatchedBuilder, watch
    try:
        yield
    finally:
        builder.__class__ = InterpreterBuilder
        del builder.watch


_check_tensor = ReduceScanOpInterface.check_tensor


def check_tensor(operation: ReduceScanOpInterface, inputs: Any) -> None:
    """A check of every reduction and scan: of bfloat16 they would combine the raw bits."""
    interpreter.interpreter_builder._refuse_bfloat16(*(tensor.handle for tensor in inputs))
    _check_tensor(operation, inputs)


for _name in vars(WatchedBuilder):
    if _name != "_refuse_bfloat16" and not hasattr(InterpreterBuilder, _name):
        raise ImportError(f"triton {triton.__version__} has no InterpreterBuilder.{_name} to watch")
