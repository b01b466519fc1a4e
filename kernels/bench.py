"""Time the kernels against the ceilings of this GPU, and against vLLM's: ``python kernels/bench.py --help``.

An operation's parity test runs first; where it is red, or where nothing ran, no speed is printed. ``--check FILE`` runs
only those tests, all operations' at the same time, and ``--checked FILE`` believes what they said of the same sources
on the same kind of GPU; ``--compile`` only makes Triton compile what will be timed, several processes at the same time
if need be. So the part that needs the GPU for itself is short.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from benchmarks import arena_case, parity, registry, report, rival
from benchmarks.timing import REPLAY_S, Rates, Result, measure, measure_rates

ROOT = parity.ROOT
_QUICK_S = 0.015
"""Replays of a graph that count, with --quick: times within some 2 %."""


@dataclass(frozen=True)
class Setting:
    """Where and with what the numbers were measured."""

    device: str
    driver: str
    torch: str
    triton: str
    revision: str
    date: str
    command: str


def main() -> int:
    options = _parse()
    if not torch.cuda.is_available():
        print("bench: no CUDA device; the parity tests run without one: pytest tests/kernels", file=sys.stderr)
        return 2
    names = options.op or list(registry.OPERATIONS)
    tests = sorted({test for name in names for test in registry.find(name).TESTS})
    if options.check:
        outcome = _parity(tests, options.check.with_suffix(".log"))
        parity.write(outcome, options.check)
        return 0 if all(outcome.green.values()) else 1
    if options.vllm:
        rival.load(options.vllm)
    if options.compile:
        return _compile(names, options)
    known = parity.read(options.checked) if options.checked else {}
    setting, rates = _setting(), measure_rates()
    print(report.head(asdict(setting), rates), flush=True)
    question = registry.Question(options.shape, options.vllm is not None)
    results: list[Result] = []
    red = []
    for name in names:
        benchmark = registry.find(name)
        if missing := [test for test in benchmark.TESTS if test not in known]:
            with tempfile.TemporaryDirectory() as folder:
                known |= _parity(missing, Path(folder) / "log").green
        if not all(known[test] for test in benchmark.TESTS):
            red.append(name)
            continue
        print(report.columns(name))
        for work in benchmark.works(question, rates):
            results.append(measure(name, work, rates, _QUICK_S if options.quick else REPLAY_S))
            print(report.line(results[-1]), flush=True)
            _write(options, setting, rates, results)
            del work  # or the next shape's memory would be sought beside it, and other memory may be slower
    for name in red:
        print(f"bench: {name} is not measured, because its parity test failed", file=sys.stderr)
    return 1 if red else 0


def _compile(names: Sequence[str], options: argparse.Namespace) -> int:
    """Run each shape once, in little memory, since others may do the same."""
    arena_case.shrink()
    question = registry.Question(options.shape, options.vllm is not None)
    for name in names:
        for work in registry.find(name).works(question, Rates(1.0, 1.0, 1.0, 1.0)):
            for calls in (work.calls, work.rival):
                for call in calls[:1]:
                    call()
            torch.cuda.synchronize()
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the kernels; parity first, no speed on red.")
    parser.add_argument("--op", action="append", choices=list(registry.OPERATIONS), help="only this one; repeatable")
    parser.add_argument("--shape", action="append", default=[], help="only shapes so named, in part; repeatable")
    parser.add_argument("--quick", action="store_true", help="fewer replays: times within some 2 %%")
    parser.add_argument("--json", type=Path, help="also write everything to this file, line by line as it comes")
    parser.add_argument("--markdown", type=Path, help="also write tables to this file")
    parser.add_argument("--vllm", type=Path, help="an unpacked vLLM 0.33 wheel, whose kernels run beside ours")
    parity_of = parser.add_mutually_exclusive_group()
    parity_of.add_argument("--compile", action="store_true", help="compile what would be timed, and time nothing")
    parity_of.add_argument(
        "--check",
        type=Path,
        help="run the parity tests alone, and write what they said to this file, pytest's own words to one beside it",
    )
    parity_of.add_argument(
        "--checked", type=Path, help="such a file: tests that passed on these sources do not run again"
    )
    return parser.parse_args()


def _parity(tests: Sequence[str], log: Path) -> parity.Outcome:
    outcome = parity.run(tests, log)
    for test, green in outcome.green.items():
        print(f"parity {test}: {'passed' if green else 'FAILED'}")
    print(outcome.summary, flush=True)
    if outcome.details:
        print(outcome.details, file=sys.stderr)
    return outcome


def _setting() -> Setting:
    return Setting(
        device=torch.cuda.get_device_name(),
        driver=_said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0") or "unknown",
        torch=torch.__version__,
        triton=triton.__version__,
        revision=_said("git", "describe", "--always", "--dirty") or f"of sources {parity.sources()}",
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        command=" ".join(["python", *sys.argv]),
    )


def _said(*command: str) -> str:
    """What a program prints, nothing where there is no such program."""
    try:
        return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _write(options: argparse.Namespace, setting: Setting, rates: Rates, results: Sequence[Result]) -> None:
    """All there is so far, so that a run that is cut off leaves what it has measured."""
    if options.json:
        everything = {"setting": asdict(setting), "rates": asdict(rates), "results": [asdict(r) for r in results]}
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(report.markdown(asdict(setting), rates, results))


if __name__ == "__main__":
    sys.exit(main())
