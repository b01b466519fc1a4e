"""The parity tests that stand before every speed: on this GPU, all that are asked for in one process of their own."""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
_SOURCES = ("kernels/pdkv_kernels", "tests/kernels")


@dataclass(frozen=True)
class Outcome:
    """What pytest said."""

    green: dict[str, bool]  # of each test file: all its GPU tests passed, and there were some
    summary: str
    details: str  # names and tracebacks of what failed; empty if nothing did


def run(tests: Sequence[str], log: Path) -> Outcome:
    """Run the GPU tests of these files, paths from the repository's root; log gets what pytest prints, as it comes."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += ["--confcutdir", "tests/kernels"]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling
        command += ["-n", str(min(12, os.cpu_count() or 1)), "-p", "no:benchmark"]
    with log.open("w") as file:
        environment = {**os.environ, "PYTHONPATH": path}
        command += ["-m", "gpu", *tests]
        subprocess.run(command, cwd=ROOT, env=environment, check=False, stdout=file, stderr=subprocess.STDOUT)
    output = log.read_text()
    green = {test: is_green(output, test) for test in tests}
    summary = (output.strip().splitlines() or ["pytest said nothing"])[-1]
    return Outcome(green, summary, "" if all(green.values()) else _failures(output))


def _failures(output: str) -> str:
    """From the first traceback on, or the end, if there is none."""
    start = max(output.find("= FAILURES ="), output.find("= ERRORS ="))
    return output[start if start >= 0 else -6000 :][:30_000]


def is_green(output: str, test: str) -> bool:
    """Of pytest's verbose output: a line says PASSED of the file, and none says otherwise."""
    at = re.escape(test) + "::"
    word = "(PASSED|FAILED|ERROR)"  # before the test's name with xdist, else behind it
    outcomes = {a or b for a, b in re.findall(rf"\b{word} {at}|{at}\S+ {word}\b", output)}
    return outcomes == {"PASSED"} and not re.search(f"crashed while running '{at}", output)


def write(outcome: Outcome, file: Path) -> None:
    """Keep what was said, and of what, for ``read``."""
    file.write_text(json.dumps({**_subject(), "tests": outcome.green}, indent=1) + "\n")


def read(file: Path) -> dict[str, bool]:
    """What ``write`` kept. SystemExit if it was of other sources or another kind of GPU."""
    try:
        said = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"bench: {file} holds no outcome of --check: {error}") from error
    for key, now in _subject().items():
        if said[key] != now:
            raise SystemExit(f"bench: {file} is of another {key} ({said[key]}, not {now}): run --check again")
    tests: dict[str, bool] = said["tests"]
    return tests


def sources() -> str:
    """A digest of the kernels and their tests."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((ROOT / folder).glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _subject() -> dict[str, str]:
    """What a parity test is of."""
    return {"sources": sources(), "device": torch.cuda.get_device_name()}
