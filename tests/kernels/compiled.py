"""Compile what the engine launches for a device that is not there: ``python -m tests.kernels.compiled sm_90``.

One line of JSON for every kernel compiled. It must be a process of its own: Triton reads when it is imported whether
kernels are interpreted.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pdkv_kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_90": (GPUTarget("cuda", 90, 32), 232_448),
    "sm_89": (GPUTarget("cuda", 89, 32), 101_376),
    "sm_80": (GPUTarget("cuda", 80, 32), 166_912),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65_536),
}
"""Devices, and the bytes that threads of one program may share on each."""

_ROOT = Path(__file__).parents[2]
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_MEMORY = re.compile(r"\b(LDG|STG|LD|ST|LDGSTS|ATOMG?|RED|UBLKCP|UTMALDG)\b")
_WRITE = re.compile(r"\b(STG|ST|ATOMG?|RED|UTMASTG)\b")
_WAIT = "ACQBULK"
HINTING = {"index_scan._scan_kernel", "index_ring._ring_kernel"}
"""Kernels that read memory before their turn: only to hint to the cache, from numbers that they read again in it, or
where it is promised to be settled. None writes any before it."""
HOPPERS = {"index_choice._choose_kernel", "index_ring._ring_kernel", "attend_ring._attend_kernel"}
"""Kernels that nothing but a Hopper runs."""
_MOST_PROGRAMS = 65_535
"""Of a grid, in its second and third dimension."""


@dataclass(frozen=True)
class Compiled:
    """One kernel as one case launches it."""

    case: str
    kernel: str  # module.function
    grid: list[int]
    seconds: float  # of a processor
    shared: int = 0  # bytes
    registers: int = 0  # of a thread
    spilled: int = 0  # bytes of a thread's own memory, where registers do not suffice
    instructions: int = 0  # 0: not counted
    chained: bool = False  # launched before the kernel in front of it has ended
    early: int = 0  # instructions that reach memory before it has
    early_writes: int = 0  # those of them that write, up to where every way through the kernel has waited
    error: str = ""


def compiled(target: str, *options: str) -> list[Compiled]:
    """What a process of its own compiles for the target; AssertionError, with all it said, if that process fails."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), str(_ROOT / "kernels")])
    command = [sys.executable, "-m", "tests.kernels.compiled", target, *options]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return [Compiled(**json.loads(line)) for line in done.stdout.splitlines()]


def launched_kernels(target: str) -> set[str]:
    """module.function of every kernel that some function of ``pdkv_kernels`` launches there, by the sources' words."""
    found = set()
    for path in Path(pdkv_kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_launch = isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
            if is_launch and isinstance(node.func.value, ast.Name):
                found.add(f"{path.stem}.{node.func.value.id}")
    return found if target == "sm_90" else found - HOPPERS


class _Absent:
    """In place of Triton's driver: says what a device would be. It owns nothing."""

    def __init__(self, target: GPUTarget, shared: int) -> None:
        self._target = target
        self.utils = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": shared})

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int = 0) -> int:
        return 0


class _Compiler:
    """Takes every launch of this process for a request to compile, and tells on stdout what came of it."""

    def __init__(self, target: str, is_brief: bool) -> None:
        self.case = ""
        self._is_brief = is_brief
        self._seen: set[int] = set()
        triton.runtime.driver.set_active(_Absent(*TARGETS[target]))
        ask = JITFunction.run

        def run(kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
            del warmup
            name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
            is_chained = options.get("launch_pdl", False)
            self._compile(name, grid, is_chained, lambda: ask(kernel, *args, grid=grid, warmup=True, **options))

        JITFunction.run = run

    def _compile(self, name: str, grid: tuple[int, ...], is_chained: bool, ask: Callable[[], Any]) -> None:
        begun = _processor_seconds()
        try:
            assert max(grid[1:], default=1) <= _MOST_PROGRAMS, f"no device launches {grid}"
            made = ask()
        except Exception as error:  # noqa: BLE001  what went wrong is the answer
            seconds = _processor_seconds() - begun
            _tell(Compiled(self.case, name, list(grid), seconds, error=f"{type(error).__name__}: {error}"[-2000:]))
            return
        if id(made) in self._seen:
            return
        self._seen.add(id(made))
        seconds = _processor_seconds() - begun
        use = _nvidia(made.asm["cubin"], is_chained, self._is_brief) if "cubin" in made.asm else _amd(made.asm)
        _tell(Compiled(self.case, name, list(grid), seconds, made.metadata.shared, chained=is_chained, **use))


def _processor_seconds() -> float:
    """Of this process and of the assemblers that it has run."""
    return sum(os.times()[:4])


def _tell(one: Compiled) -> None:
    sys.stdout.write(json.dumps(asdict(one)) + "\n")
    sys.stdout.flush()


def _nvidia(cubin: bytes, is_chained: bool, is_brief: bool) -> dict[str, int]:
    """To look at instructions costs more than to make them: briefly only at those of kernels that wait."""
    looks = is_chained or not is_brief
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_CUOBJDUMP, "--dump-resource-usage", *(["--dump-sass"] if looks else []), file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found, text
    registers, stack, local = map(int, found.groups())
    use = {"registers": registers, "spilled": stack + local}
    if not looks:
        return use
    lines = [line for line in text.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)]
    waits = [nth for nth, line in enumerate(lines) if _WAIT in line]
    assert bool(waits) == is_chained, "a kernel waits for the one in front of it where it may start before its end"
    early = sum(bool(_MEMORY.search(line)) for line in lines[: waits[0]]) if waits else 0
    early_writes = sum(bool(_WRITE.search(line)) for line in lines[: waits[-1]]) if waits else 0
    return {**use, "instructions": len(lines), "early": early, "early_writes": early_writes}


def _amd(asm: dict[str, Any]) -> dict[str, int]:
    assert asm["hsaco"]
    text = asm["amdgcn"]
    found = [re.search(rf"\.{name}:\s+(\d+)", text) for name in ("vgpr_count", "private_segment_fixed_size")]
    registers, spilled = (int(one[1]) if one else 0 for one in found)
    count = len(re.findall(r"^\t(?:[vs]|ds|buffer|global|flat)_", text, re.MULTILINE))
    return {"registers": registers, "spilled": spilled, "instructions": count}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile what the engine launches, without a device.")
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--brief", action="store_true", help="a few cases, which reach every kernel")
    parser.add_argument("--only", default="", help="cases with this in their name")
    options = parser.parse_args()
    assert not triton.knobs.runtime.interpret, "TRITON_INTERPRET is set: nothing would be compiled"
    from tests.kernels.launch_cases import BRIEF, Case, cases  # noqa: PLC0415  imports kernels

    chosen: Iterator[Case] = iter(BRIEF) if options.brief else cases()
    compiler = _Compiler(options.target, options.brief)
    for case in chosen:
        if options.only in case.name:
            compiler.case = case.name
            case.launch()


if __name__ == "__main__":
    main()
