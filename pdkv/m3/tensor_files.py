"""The open safetensors files of a checkpoint: what they hold, checked against the index and against what is wanted."""

import logging
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pdkv.errors import CheckpointError
from pdkv.m3.checkpoint import weight_files
from pdkv.m3.tensor_names import Naming, Shape, unused

_LOG = logging.getLogger("pdkv.m3")

_FLOATS = {"F32", "BF16", "F16"}
"""Names that safetensors gives to the dtypes that weights may be stored in."""

_ITEMSIZE = {
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


class TensorFiles:
    """All files of one checkpoint, mapped, not read. The caller's ``stack`` owns them; use it from one thread.

    ``names``: the tensors of the text model. Those of the vision tower and of drafting are passed over, and said so in
    the log. Raises ``CheckpointError`` that names every file that is absent or cannot be read.
    """

    def __init__(self, model_dir: Path, stack: ExitStack) -> None:
        self._model_dir = Path(model_dir)
        self._found = weight_files(model_dir)
        self._files: dict[str, Any] = {}  # tensor name to the open file that holds it
        self._shard_of: dict[str, str] = {}
        self._problems: list[str] = []
        damaged = []
        for path in self._found.paths:
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (OSError, SafetensorError) as error:
                damaged.append(f"{path} cannot be read as safetensors, is it cut short? {error}")
                continue
            for name in file.keys():  # noqa: SIM118  not a mapping
                self._add(name, path.name, file)
        if damaged:
            raise CheckpointError("; ".join(damaged))
        self._compare_with_index()
        self.names = frozenset(name for name in self._files if unused(name) is None)

    def check(self, naming: Naming, wanted: Mapping[str, Shape]) -> None:
        """Raise one ``CheckpointError`` that lists whatever is missing, extra, mis-shaped or mis-typed; else log once
        what was found."""
        problems = [
            f"missing: {name} {list(shape)}" + self._hint(name)
            for name, shape in wanted.items()
            if name not in self.names
        ]
        problems += [f"extra: {name}" for name in sorted(self.names - wanted.keys())]
        for name in sorted(wanted.keys() & self.names):
            shape, dtype = self._shape(name), self._files[name].get_slice(name).get_dtype()
            if shape != wanted[name]:
                problems.append(f"mis-shaped: {name} is {list(shape)}, the config asks for {list(wanted[name])}")
            if dtype not in _FLOATS:
                problems.append(f"mis-typed: {name} is {dtype}, served are {', '.join(sorted(_FLOATS))}")
        problems += self._problems
        if problems:
            listed = "\n  ".join(problems)
            raise CheckpointError(
                f"the tensors in {self._model_dir} do not fit its config.json, {len(problems)} problems "
                f"(expected are the names of {naming.title}):\n  {listed}"
            )
        self._log(naming)

    def tensor(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._files[name].get_tensor(name)
        except (OSError, SafetensorError) as error:
            shard = self._model_dir / self._shard_of[name]
            raise CheckpointError(f"{name} in {shard} cannot be read: {error}") from error
        return tensor

    def _add(self, name: str, shard: str, file: Any) -> None:
        if name in self._files:
            self._problems.append(f"twice: {name} is in {self._shard_of[name]} and in {shard}")
        self._files[name], self._shard_of[name] = file, shard

    def _compare_with_index(self) -> None:
        """An index that does not fit its shards belongs to other files; text tensors that lack are named later."""
        if self._found.index is None:
            return
        for name, shard in self._found.shard_of.items():
            if name in self._files and self._shard_of[name] != shard:
                self._problems.append(f"misplaced: {name} is in {self._shard_of[name]}, the index says {shard}")
            elif name not in self._files and unused(name) is not None:
                self._problems.append(f"missing: {name}{self._hint(name)}")
        unlisted = sorted(self._files.keys() - self._found.shard_of.keys())
        self._problems += [f"unlisted: {name} is in {self._shard_of[name]}, not in the index" for name in unlisted]

    def _hint(self, name: str) -> str:
        shard = self._found.shard_of.get(name)
        return f" (the index says it is in {shard}, which does not hold it)" if shard else ""

    def _shape(self, name: str) -> Shape:
        return tuple(self._files[name].get_slice(name).get_shape())

    def _log(self, naming: Naming) -> None:
        _LOG.info("%d tensors in %d files, in the names of %s", len(self.names), len(self._found.paths), naming.title)
        counts: dict[str, int] = defaultdict(int)
        sizes: dict[str, int] = defaultdict(int)
        for name in self._files.keys() - self.names:
            purpose = unused(name)
            assert purpose is not None, "all others are the text model's"
            itemsize = _ITEMSIZE.get(self._files[name].get_slice(name).get_dtype(), 0)
            counts[purpose] += 1
            sizes[purpose] += prod(self._shape(name)) * itemsize
        for purpose in sorted(counts):
            _LOG.info("skipped %d tensors of %s, %d bytes", counts[purpose], purpose, sizes[purpose])
