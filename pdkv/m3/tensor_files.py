"""The safetensors files of a checkpoint: what they hold by their headers, and pieces of it as they are wanted."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pdkv.errors import CheckpointError
from pdkv.m3.checkpoint import WeightFiles
from pdkv.m3.mxfp8 import dequantise
from pdkv.m3.quantisation import SCALE_SUFFIX, scale_columns
from pdkv.m3.tensor_names import Part, Shape, unused

ITEMSIZE = {
    "F64": 8,
    "F32": 4,
    "BF16": 2,
    "F16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "U8": 1,
    "I8": 1,
}
"""Bytes of one element, by the names that safetensors gives to dtypes."""

QUANTISED = "F8_E4M3"

_CHUNK_ELEMENTS = 1 << 20
"""At most so many of a tensor are looked at at once: 4 MiB where they become float32."""
_MAPPED_BYTES = 32 << 20
"""After so much, files are let go: pages of a mapped file count as memory of whoever has touched them."""


@dataclass(frozen=True)
class StoredTensor:
    file: str
    dtype: str
    """As safetensors calls it."""
    shape: Shape

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ITEMSIZE.get(self.dtype, 0)


@dataclass(frozen=True)
class Catalogue:
    """What the headers of a checkpoint's files say. No weight has been read for it."""

    model_dir: Path
    found: WeightFiles
    tensors: dict[str, StoredTensor]
    problems: tuple[str, ...]
    """Where the files and their index contradict one another, one entry each."""
    damaged: dict[str, str]
    """Names of files that cannot be read, and why."""

    @property
    def names(self) -> frozenset[str]:
        """Tensors of the text model; not those of the vision tower and of drafting."""
        return frozenset(name for name in self.tensors if unused(name) is None)

    def hint(self, name: str) -> str:
        """Where the index believes a tensor that is missing."""
        shard = self.found.shard_of.get(name)
        if shard is None:
            return ""
        absent = "is not there" if shard in self.found.absent else "does not hold it"
        return f" (the index says it is in {shard}, which {'cannot be read' if shard in self.damaged else absent})"


def read_catalogue(model_dir: Path, found: WeightFiles) -> Catalogue:
    """Look into every file that is there."""
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    damaged: dict[str, str] = {}
    for path in found.paths:
        try:
            held = dict(_header(path))
        except (OSError, SafetensorError) as error:
            damaged[path.name] = f"cannot be read as safetensors, is it cut short? {error}"
            continue
        twice = sorted(held.keys() & tensors.keys())
        problems += [f"twice: {name} is in {tensors[name].file} and in {path.name}" for name in twice]
        tensors |= held
    catalogue = Catalogue(Path(model_dir), found, tensors, (), damaged)
    return replace(catalogue, problems=(*problems, *_against_index(catalogue)))


def _header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    with safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118  not a mapping
            piece = file.get_slice(name)
            yield name, StoredTensor(path.name, piece.get_dtype(), tuple(piece.get_shape()))


def _against_index(catalogue: Catalogue) -> Iterator[str]:
    """An index that does not fit its shards belongs to other files; text tensors that lack are named elsewhere."""
    found, tensors = catalogue.found, catalogue.tensors
    if found.index is None:
        return
    for name, shard in found.shard_of.items():
        if name in tensors and tensors[name].file != shard:
            yield f"misplaced: {name} is in {tensors[name].file}, the index says {shard}"
        elif name not in tensors and unused(name) is not None:
            yield f"missing: {name}{catalogue.hint(name)}"
    for name in sorted(tensors.keys() - found.shard_of.keys()):
        yield f"unlisted: {name} is in {tensors[name].file}, not in the index"


class TensorFiles:
    """Reads pieces of tensors. Files are mapped when first asked and let go soon, so that memory stays near what the
    caller keeps. Used by one thread, as a context.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()
        self._touched_bytes = 0

    def __enter__(self) -> Self:
        return self

    def is_quantised(self, name: str) -> bool:
        return self._catalogue.tensors[name].dtype == QUANTISED

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_go()

    def read(self, part: Part) -> Iterator[Tensor]:
        """The piece, some rows at a time, without anything that is not in it: each [rows, columns], or [elements] of a
        vector, as stored; MXFP8 as exact float32.

        Each is a view of a file: copy it before asking for the next. Raises ``CheckpointError``.
        """
        if len(part.shape) == 1:
            yield self._slice(part.name, part.taken)
            return
        stored = self._catalogue.tensors[part.name]
        *outer, rows, columns = part.taken
        at_once = max(1, _CHUNK_ELEMENTS // part.shape[-1])
        for begin in range(rows.start, rows.stop, at_once):
            some = (*outer, range(begin, min(begin + at_once, rows.stop)))
            chunk = self._slice(part.name, (*some, columns)).flatten(0, -2)
            if stored.dtype == QUANTISED:
                scales = self._slice(part.name + SCALE_SUFFIX, (*some, scale_columns(columns))).flatten(0, -2)
                chunk = dequantise(part.name, chunk, scales, columns.start)
            yield chunk

    def _slice(self, name: str, taken: tuple[range, ...]) -> Tensor:
        stored = self._catalogue.tensors[name]
        # Pages are mapped whole and some ahead, so a run of columns costs as much as the rows that it is cut from.
        self._touched_bytes += prod(map(len, taken[:-1])) * stored.shape[-1] * ITEMSIZE[stored.dtype]
        if self._touched_bytes > _MAPPED_BYTES:
            self._let_go()
        path = self._catalogue.model_dir / stored.file
        try:
            if stored.file not in self._open:
                self._open[stored.file] = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            view: Tensor = self._open[stored.file].get_slice(name)[tuple(slice(r.start, r.stop) for r in taken)]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{name} in {path} cannot be read: {error}") from error
        return view.view(torch.uint8) if stored.dtype == "F8_E8M0" else view

    def _let_go(self) -> None:
        self._stack.close()
        self._open.clear()
        self._touched_bytes = 0
