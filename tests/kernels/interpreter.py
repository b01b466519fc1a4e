"""Triton's interpreter without what it does anew at every call: in calls within kernels that was half of its time.

It stays Triton's: the same functions are replaced by the same ones, and numbers come out of numpy as before.
"""

import dataclasses
import inspect
import math
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """From now on, in this process. Before the first kernel runs."""
    for patched in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
        _builtins_of(patched)  # as long as none is replaced
    interpreter._patch_builtin = _patch_builtin
    interpreter._patch_attr = _patch_attr
    interpreter._patch_lang = _patch_lang
    interpreter._get_np_dtype = _np_dtype
    interpreter.ReduceOps.apply_impl = _reduce
    tl.block_type.__init__ = _init_block_type
    tl.block_type.with_element_ty = _with_element_ty
    tl.tensor.__init__ = _init_tensor
    _skip_what_nobody_asks()


def _skip_what_nobody_asks() -> None:
    """For every sum, difference and product Triton computes whether it overflows, for an assertion that it makes only
    when it debugs."""
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


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


def _patch_attr(holder: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """What the outermost wrapper wraps, told whose semantics are meant: the wrapper only looks whether it was told."""
    plain = getattr(member, "__wrapped__", member)

    def interpreted(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return plain(*args, **kwargs)

    scope.set_attr(holder, name, interpreted)


_plain_patch_lang = interpreter._patch_lang
_NOTHING = interpreter._LangPatchScope()
_replaced: set[ModuleType] = set()
"""Modules whose functions are replaced, from a launch to its end. One launch runs at a time."""


class _Launch(interpreter._LangPatchScope):
    """What a launch has replaced."""

    def __init__(self, scope: Any) -> None:
        super().__init__()
        self._changes = scope._changes

    def restore(self) -> None:
        super().restore()
        _replaced.clear()


def _patch_lang(fn: Any) -> Any:
    """For a launch. Functions that its kernel calls mostly find replaced what they use."""
    langs = _langs_of(fn)
    if langs and _replaced.issuperset(langs):
        return _NOTHING
    scope = _Launch(_plain_patch_lang(fn))
    _replaced.update(langs)
    return scope


@cache
def _langs_of(fn: Any) -> frozenset[ModuleType]:
    """Those of Triton's modules that a kernel's module has imported."""
    modules = (value for value in fn.__globals__.values() if inspect.ismodule(value))
    return frozenset(module for module in modules if module in (tl, tl.core))


# ---- types: a kernel makes the same few over and over


_plain_init_block_type = tl.block_type.__init__
_block_types: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
"""Attributes of blocks of numbers, by the numbers' type and the shape; nobody changes them."""


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    if type(element_ty) is not tl.dtype:  # pointers of equal names may differ
        _plain_init_block_type(self, element_ty, shape)
        self.others = {}
        return
    key = (element_ty.name, tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape))
    if key not in _block_types:
        _plain_init_block_type(self, element_ty, shape)
        self.others = {}
        _block_types[key] = self.__dict__
    self.__dict__ = _block_types[key]


def _with_element_ty(self: Any, scalar_ty: Any) -> Any:
    if type(scalar_ty) is not tl.dtype:
        return tl.block_type(scalar_ty, self.shape)
    if scalar_ty.name not in self.others:
        self.others[scalar_ty.name] = tl.block_type(scalar_ty, self.shape)
    return self.others[scalar_ty.name]


@cache
def _shape_and_numel(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    """As tensors have them: of constants. Nobody changes them."""
    return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))


def _init_tensor(self: Any, handle: Any, type: Any) -> None:  # noqa: A002 - Triton's name, which callers use
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    self.shape, self.numel = _shape_and_numel(tuple(type.shape.values) if type.is_block() else ())


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
