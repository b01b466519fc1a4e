"""Triton's interpreter without what it does anew at every call: in calls within kernels that was half of its time.

It stays Triton's: the same functions are replaced by the same ones, and numbers come out of numpy as before.
"""

import inspect
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """From now on, in this process. Before the first kernel runs."""
    for patched in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
        _builtins_of(patched)  # as long as none is replaced
    interpreter._patch_builtin = _patch_builtin
    interpreter._get_np_dtype = _np_dtype
    interpreter.ReduceOps.apply_impl = _reduce


@cache
def _builtins_of(holder: Any) -> tuple[str, ...]:
    """A module's or class's functions that the interpreter replaces, by name."""
    return tuple(name for name, member in inspect.getmembers(holder) if tl.core.is_builtin(member))


def _patch_builtin(holder: Any, builder: Any, scope: Any) -> None:
    """All at once or none: where the first is replaced, all are."""
    names = _builtins_of(holder)
    if names and tl.core.is_builtin(getattr(holder, names[0])):
        for name in names:
            interpreter._patch_attr(holder, name, getattr(holder, name), builder, scope)


_plain_np_dtype = interpreter._get_np_dtype
_plain_reduce = interpreter.ReduceOps.apply_impl


@cache
def _np_dtype_of(_: str, scalar: Any) -> "np.dtype[Any]":
    return _plain_np_dtype(scalar)


def _np_dtype(dtype: Any) -> "np.dtype[Any]":
    """Triton's own table, read once a type."""
    if isinstance(dtype, tl.block_type):
        dtype = dtype.element_ty
    return np.dtype(np.uint64) if isinstance(dtype, tl.pointer_type) else _np_dtype_of(dtype.name, dtype)


def _reduce(ops: interpreter.ReduceOps, operands: Any) -> Any:
    """XOR, which sorting is made of, by numpy as Triton does sums, not element by element in Python."""
    if ops.combine_fn != tl.standard._xor_combine:
        return _plain_reduce(ops, operands)
    data = np.bitwise_xor.reduce(operands[0].handle.data, axis=ops.axis, keepdims=ops.keep_dims)
    return ops.to_tensor(data, operands[0].dtype)
