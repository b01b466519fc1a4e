"""What the bench prints, and the same as Markdown tables."""

from collections.abc import Mapping, Sequence

from benchmarks.timing import Rates, Result


def head(setting: Mapping[str, str], rates: Rates) -> str:
    """The machine and its ceilings."""
    return "\n".join([_machine(setting), setting["command"], _ceilings(rates)])


def columns(name: str) -> str:
    """The heading of an operation's lines."""
    return (
        f"\n{name:<34} {'us':>9} {'GB/s':>6} {'TFLOP/s':>8} {'ceiling':>8} "
        f"{'vLLM us':>9} {'vLLM/ours':>10} {'asked us':>9} {'host us':>8}"
    )


def line(result: Result) -> str:
    """One shape. A time that is longer than asked for is marked."""
    ratio = f"{result.ratio:.2f}x" if result.ratio else "-"
    return (
        f"{result.shape:<34} {result.time_s * 1e6:9.1f} {result.bytes_per_s / 1e9:6.0f} "
        f"{result.flops_per_s / 1e12:8.1f} {result.share:8.0%} {_us(result.rival_s):>9} {ratio:>10} "
        f"{_asked(result):>9} {_us(result.host_s):>8} {result.note}"
    ).rstrip()


def markdown(setting: Mapping[str, str], rates: Rates, results: Sequence[Result]) -> str:
    """A table for each operation. Bold: longer than asked for."""
    lines = [_machine(setting), "", "```", setting["command"], "```", "", _ceilings(rates)]
    for name in dict.fromkeys(result.operation for result in results):
        lines += ["", f"### {name}", "", "| shape | us | share of the ceiling | vLLM us | x | asked us | host us | |"]
        lines.append("|---|---|---|---|---|---|---|---|")
        for result in results:
            if result.operation == name:
                ratio = f"{result.ratio:.2f}" if result.ratio else ""
                cells = [result.shape, _us(result.time_s), f"{result.share:.0%}", _us(result.rival_s), ratio]
                cells += [f"**{_us(result.asked_s)}**" if _short(result) else _us(result.asked_s)]
                lines.append("| " + " | ".join([*cells, _us(result.host_s), result.note]) + " |")
    return "\n".join(lines) + "\n"


def _machine(setting: Mapping[str, str]) -> str:
    versions = f"torch {setting['torch']}, triton {setting['triton']}"
    when = f"revision {setting['revision']}, {setting['date']}"
    return f"{setting['device']}, driver {setting['driver']}, {versions}, {when}"


def _ceilings(rates: Rates) -> str:
    memory = f"read {rates.read / 1e9:.0f} GB/s, copy {rates.copy / 1e9:.0f} GB/s (read + written)"
    return f"ceilings: {memory}, bf16 {rates.bf16 / 1e12:.0f} TFLOP/s, fp8 {rates.fp8 / 1e12:.0f} TFLOP/s"


def _us(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.1f}"


def _short(result: Result) -> bool:
    return result.asked_s is not None and result.time_s > result.asked_s


def _asked(result: Result) -> str:
    return _us(result.asked_s) + ("!" if _short(result) else "")
