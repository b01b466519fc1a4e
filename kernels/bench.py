"""Time the kernels against the ceilings of this GPU, and against vLLM's: ``python kernels/bench.py --help``.

An operation's parity test runs first; where it is red, or where nothing ran, no speed is printed.
"""

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from benchmarks import registry, rival
from benchmarks.timing import Rates, Result, measure, measure_rates

ROOT = Path(__file__).resolve().parent.parent


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
    if options.vllm:
        rival.load(options.vllm)
    setting, rates = _setting(), measure_rates()
    _print_head(setting, rates)
    question = registry.Question(options.shape, options.vllm is not None)
    results: list[Result] = []
    red = []
    for name in options.op or registry.OPERATIONS:
        benchmark = registry.find(name)
        if not _parity(benchmark.TESTS):
            red.append(name)
            continue
        _print_columns(name)
        for work in benchmark.works(question, rates):
            results.append(measure(name, work, rates))
            _print_line(results[-1])
    if options.json:
        _write(options.json, setting, rates, results)
    for name in red:
        print(f"bench: {name} is not measured, because its parity test failed", file=sys.stderr)
    return 1 if red else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the kernels; parity first, no speed on red.")
    parser.add_argument("--op", action="append", choices=list(registry.OPERATIONS), help="only this one; repeatable")
    parser.add_argument("--shape", action="append", default=[], help="only shapes so named, in part; repeatable")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--vllm", type=Path, help="an unpacked vLLM 0.33 wheel, whose kernels run beside ours")
    return parser.parse_args()


def _parity(tests: str) -> bool:
    """Run the test file in a process of its own, on this GPU; at least one test must have run."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--confcutdir", "tests/kernels"]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling
        command += ["-n", str(min(8, os.cpu_count() or 1)), "-p", "no:benchmark"]
    done = subprocess.run(
        [*command, "-m", "gpu", tests],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
        capture_output=True,
        text=True,
    )
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()]
    print(f"\nparity {tests}: {last[0]}", flush=True)
    if done.returncode == 0 and " passed" in last[0]:
        return True
    print(done.stdout[-4000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
    return False


def _setting() -> Setting:
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = subprocess.run(query, check=False, capture_output=True, text=True)
    return Setting(
        device=torch.cuda.get_device_name(),
        driver=driver.stdout.strip() or "unknown",
        torch=torch.__version__,
        triton=triton.__version__,
        revision=git.stdout.strip() or "unknown",
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        command=" ".join(["python", *sys.argv]),
    )


def _print_head(setting: Setting, rates: Rates) -> None:
    print(f"{setting.device}, driver {setting.driver}, torch {setting.torch}, triton {setting.triton}")
    print(f"revision {setting.revision}, {setting.date}: {setting.command}")
    print(f"ceilings: read {rates.read / 1e9:.0f} GB/s, copy {rates.copy / 1e9:.0f} GB/s (read + written), ", end="")
    print(f"bf16 {rates.bf16 / 1e12:.0f} TFLOP/s, fp8 {rates.fp8 / 1e12:.0f} TFLOP/s", flush=True)


def _print_columns(name: str) -> None:
    print(f"{name:<44} {'us':>9} {'GB/s':>7} {'TFLOP/s':>8} {'ceiling':>8} {'vLLM us':>9} {'vLLM/ours':>10}")


def _print_line(result: Result) -> None:
    rival_us = f"{result.rival_s * 1e6:9.1f}" if result.rival_s else f"{'-':>9}"
    ratio = f"{result.ratio:9.2f}x" if result.ratio else f"{'-':>10}"
    line = f"{result.shape:<44} {result.time_s * 1e6:9.1f} {result.bytes_per_s / 1e9:7.0f} "
    line += f"{result.flops_per_s / 1e12:8.1f} {result.share:8.0%} {rival_us} {ratio} {result.note}"
    print(line.rstrip(), flush=True)


def _write(path: Path, setting: Setting, rates: Rates, results: Sequence[Result]) -> None:
    everything = {"setting": asdict(setting), "rates": asdict(rates), "results": [asdict(r) for r in results]}
    path.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
