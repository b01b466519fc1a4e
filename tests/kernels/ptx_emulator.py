"""Assembly of NVIDIA's virtual machine (PTX) on a CPU: as much of it as our kernels write themselves.

A warp's 32 lanes go through the text side by side, and warps one after another from barrier to barrier, in any order.
It is stricter than a GPU: what was never written is not read, addresses are aligned and lie in the memory that there
is, and all lanes of a warp jump alike.
"""

import operator
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Lanes = NDArray[Any]
_LANES = 32
_TYPES: dict[str, type[np.generic]] = {
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "b64": np.uint64,
    "s64": np.int64,
}
_TWO: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "add": operator.add,
    "sub": operator.sub,
    "and": operator.and_,
    "shl": operator.lshift,
    "shr": operator.rshift,
    "max": np.maximum,
    "min": np.minimum,
}
_COMPARE: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    name: getattr(operator, name) for name in ("gt", "ge", "lt", "eq", "ne")
}
_ARGUMENT = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_IGNORED = {"griddepcontrol"}
"""What has no meaning for a launch that is alone."""


@dataclass(frozen=True)
class _Instruction:
    predicate: str  # "": always
    operation: list[str]  # its name and what follows it behind points
    arguments: list[str]


class Program:
    """An assembly text, read once. Its operands $0, $1, ... are given when it runs."""

    def __init__(self, text: str) -> None:
        self.shared_bytes = 0
        self.room = ""
        self.types: dict[str, str] = {}
        self.instructions: list[_Instruction] = []
        self.labels: dict[str, int] = {}
        for line in text.strip().removeprefix("{").removesuffix("}").splitlines():
            for statement in filter(None, map(str.strip, line.split(";"))):
                self._read(statement)

    def _read(self, statement: str) -> None:
        if found := re.fullmatch(r"(\w+):", statement):
            self.labels[found[1]] = len(self.instructions)
        elif found := re.fullmatch(r"\.shared \.align 16 \.b8 (\w+)\[(\d+)\]", statement):
            self.room, self.shared_bytes = found[1], int(found[2])
        elif found := re.fullmatch(r"\.reg \.(\w+) (.*)", statement):
            for name in found[2].split(", "):
                stem, _, count = name.rstrip(">").partition("<")
                names = [f"{stem}{nth}" for nth in range(int(count))] if count else [stem]
                self.types.update(dict.fromkeys(names, found[1]))
        else:
            found = re.fullmatch(r"(?:@(\w+)\s+)?([\w.]+)\s*(.*)", statement)
            assert found, statement
            self.instructions.append(_Instruction(found[1] or "", found[2].split("."), _ARGUMENT.findall(found[3])))

    def run(self, warps: int, memory: NDArray[np.uint32], operands: Mapping[str, int], chance: random.Random) -> None:
        """One block of threads. memory: the words from address 0 on; chance: who comes first."""
        shared = np.frombuffer(chance.randbytes(self.shared_bytes), np.uint32).copy()
        left = [iter(_Warp(self, nth, (shared, memory), operands, chance)) for nth in range(warps)]
        while left:
            chance.shuffle(left)
            arrived = [next(warp, False) for warp in left]
            assert len(set(arrived)) == 1, "some warps end where others wait"
            left = left if arrived[0] else []


class _Warp:
    """Its registers, and where it is. Iterating runs it; every value is a barrier that it has come to."""

    def __init__(
        self,
        program: Program,
        nth: int,
        memories: tuple[NDArray[np.uint32], NDArray[np.uint32]],
        operands: Mapping[str, int],
        chance: random.Random,
    ) -> None:
        self._program = program
        self._memories = dict(zip(("shared", "global"), memories, strict=True))
        self._chance = chance
        self._registers: dict[str, Lanes] = {name: np.full(_LANES, value) for name, value in operands.items()}
        self._registers["%tid.x"] = np.arange(_LANES) + _LANES * nth
        self._registers[program.room] = np.zeros(_LANES, np.int64)

    def __iter__(self) -> Iterator[bool]:
        at = 0
        while at < len(self._program.instructions):
            one = self._program.instructions[at]
            at += 1
            active = self._registers[one.predicate] if one.predicate else np.ones(_LANES, np.bool_)
            name = one.operation[0]
            if name == "bar":
                if one.operation[1] == "sync":
                    yield True
            elif name == "bra":
                assert active.all() or not active.any(), f"lanes part before {one.arguments[0]}"
                at = self._program.labels[one.arguments[0]] if active.all() else at
            elif name not in _IGNORED:
                self._step(one, active)

    def _step(self, one: _Instruction, active: Lanes) -> None:
        name, kind, arguments = one.operation[0], one.operation[-1], one.arguments
        if name in ("ld", "st", "atom"):
            getattr(self, f"_{name}")(one, active)
        elif name == "mov" and arguments[0].startswith("{"):
            both = self._get(arguments[1], kind)
            for half, register in enumerate(_names(arguments[0])):
                self._set(register, both >> np.uint64(32 * half), active)
        elif name == "mov" and arguments[1].startswith("{"):
            low, high = (self._get(half, "u32").astype(np.uint64) for half in _names(arguments[1]))
            self._set(arguments[0], low | high << np.uint64(32), active)
        else:
            self._set(arguments[0], self._value(one), active)

    def _value(self, one: _Instruction) -> Lanes:
        """Of an instruction that computes one from others."""
        name, kind, arguments = one.operation[0], one.operation[-1], one.arguments
        if name in ("shfl", "redux"):
            return self._from_other_lanes(one)
        if name == "selp":
            first, second = (self._get(argument, kind) for argument in arguments[1:3])
            return np.where(self._registers[arguments[3]], first, second)
        sources = [self._get(argument, kind) for argument in arguments[1:]]
        if name == "mul":
            assert one.operation[1] == "wide"
            return np.multiply(*sources, dtype=np.int64 if kind[0] == "s" else np.uint64)
        if name == "mad":
            return sources[0] * sources[1] + sources[2]
        if name == "mov":
            return sources[0]
        return (_COMPARE[one.operation[1]] if name == "setp" else _TWO[name])(*sources)

    def _from_other_lanes(self, one: _Instruction) -> Lanes:
        assert one.arguments[-1] == "-1", "all lanes take part"
        mine = self._get(one.arguments[1], one.operation[-1])
        if one.operation[0] == "redux":
            return np.full(_LANES, {"min": np.min, "max": np.max, "add": np.sum}[one.operation[2]](mine), mine.dtype)
        assert one.operation[2] == "bfly"
        return mine[np.arange(_LANES) ^ int(one.arguments[2])]

    def _get(self, name: str, kind: str) -> Lanes:
        """A register or a number as this type."""
        dtype = np.dtype(_TYPES[kind])
        if name in self._registers:
            found = self._registers[name]
            declared = self._program.types.get(name)
            if declared is None:  # an operand
                return found.astype(dtype)
            assert np.dtype(_TYPES[declared]).itemsize == dtype.itemsize, (name, declared, kind)
            return found.view(dtype)
        if name.startswith("0f"):
            return np.full(_LANES, int(name[2:], 16), np.uint32).view(dtype)
        assert re.fullmatch(r"-?\d+", name), f"{name} is read before it is written"
        return np.full(_LANES, int(name)).astype(dtype)

    def _set(self, name: str, value: Lanes, active: Lanes) -> None:
        declared = self._program.types.get(name, "b32")
        if declared == "pred":
            kept = value
        else:  # the low bits of what was computed
            kept = value.view(f"u{value.dtype.itemsize}").astype(
                _TYPES[declared if declared[0] == "b" else f"b{declared[1:]}"]
            )
        if not active.all():
            assert name in self._registers, f"{name} is written by some lanes only"
            kept = np.where(active, kept, self._registers[name])
        self._registers[name] = kept

    def _words(self, one: _Instruction, place: str, words: int) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """The memory, and each lane's first word of so many in it."""
        found = re.fullmatch(r"\[([\w$]+)(?:\+(\d+))?\]", place)
        assert found, place
        addresses = self._registers[found[1]].astype(np.int64) + int(found[2] or 0)
        memory = self._memories[one.operation[1]]
        active = self._registers[one.predicate] if one.predicate else np.ones(_LANES, np.bool_)
        asked = addresses[active.astype(np.bool_)]
        assert not (asked % (4 * words)).any(), f"{place} is not aligned"
        assert not asked.size or (asked.min() >= 0 and asked.max() // 4 + words <= memory.size), f"{place} is outside"
        return memory, addresses // 4

    def _ld(self, one: _Instruction, active: Lanes) -> None:
        registers, kind = _names(one.arguments[0]), one.operation[-1]
        words = np.dtype(_TYPES[kind]).itemsize // 4
        memory, first = self._words(one, one.arguments[1], words * len(registers))
        for nth, register in enumerate(registers):
            value = np.zeros(_LANES, np.uint64)
            for word in range(words):
                read = memory[np.where(active, first + words * nth + word, 0)]
                value |= read.astype(np.uint64) << np.uint64(32 * word)
            self._set(register, value, active)

    def _st(self, one: _Instruction, active: Lanes) -> None:
        sources = _names(one.arguments[1])
        memory, first = self._words(one, one.arguments[0], len(sources))
        for nth, source in enumerate(sources):
            value = self._get(source, one.operation[-1])
            for lane in np.flatnonzero(active):
                memory[first[lane] + nth] = value[lane]

    def _atom(self, one: _Instruction, active: Lanes) -> None:
        assert one.operation[2] == "add"
        memory, first = self._words(one, one.arguments[1], 1)
        more, old = self._get(one.arguments[2], "u32"), np.zeros(_LANES, np.uint32)
        lanes = np.flatnonzero(active).tolist()
        for lane in self._chance.sample(lanes, len(lanes)):
            old[lane] = memory[first[lane]]
            memory[first[lane]] += more[lane]
        self._set(one.arguments[0], old, active)


def _names(braces: str) -> list[str]:
    return braces.strip("{}").replace(",", " ").split()
