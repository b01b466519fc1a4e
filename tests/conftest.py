"""Torch's own threads, before anything imports torch: several test processes share the cores."""

import ctypes
import gc
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

# Loading torch, transformers and 3,000 tests is all growth: looking for garbage in it was a third of its time.
gc.set_threshold(20_000, 20, 20)

# Threads of torch that spin while they wait make a small model 20 times slower on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# No test hangs on how fast the machine is, or how busy.
settings.register_profile("pdkv", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pdkv")


def _has_gpu() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False  # told without torch, whose loading would hold up the process that directs the others
    import torch

    return torch.cuda.is_available()


if not _has_gpu():
    # Kernels run in Triton's interpreter. Triton reads this when it is imported itself, for its own library too, and
    # any test module may be the first to do so.
    os.environ["TRITON_INTERPRET"] = "1"

TESTS = Path(__file__).parent
SLOWEST = ("e2e", "transport", "verify", "daemons", "kernels", "m3", "bench", "deploy", "cli", "agent")
SHARING = {
    "completions": "three",
    "doctor": "three",
    "link_chasing": "three",
    "metrics": "three",
    "reuse": "three",
    "spans": "three",
    "streaming_overlap": "three",
    "verify_pages": "three",
    "lm_eval": "deployment",
    "openai": "deployment",
    "top": "deployment",
}
"""End-to-end tests that use one deployment for all of them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Folders that take longest come first, lest one core end them alone."""
    items.sort(key=_place)


def pytest_collection_finish() -> None:
    """What has been loaded stays, and is left out of collections."""
    gc.freeze()


def _place(item: pytest.Item) -> int:
    folder = item.path.relative_to(TESTS).parts[0]
    return SLOWEST.index(folder) if folder in SLOWEST else len(SLOWEST)


class ByFixture(LoadScopeScheduling):
    """What shares fixtures runs in one process: a file, and files that share a deployment.

    A scheduler of our own, since marks of pytest-xdist's groups have no effect with pytest 9.2: each test would go
    wherever there is room, and every fixture that is shared would be made by every process.
    """

    def __init__(self, config: pytest.Config, log: object) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return SHARING.get(Path(file).stem.removeprefix("test_"), file) if "/e2e/" in file else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    return ByFixture(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why tests were skipped, a line a reason: hundreds need a GPU, and what failed should not lie below them."""
    skipped = [report.longrepr for report in terminalreporter.stats.get("skipped", ())]
    reasons = Counter(str(told[2] if isinstance(told, tuple) else told).removeprefix("Skipped: ") for told in skipped)
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count} skipped: {reason}")
