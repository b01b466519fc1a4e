"""A race of real processes, small: what is reported, and that wrong bytes or an error score nothing."""

import importlib.util
import json
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from pdkv.bench import chart, race
from pdkv.bench.geometry import Workload
from pdkv.bench.ground import HostJudge
from pdkv.bench.lane import Lane
from pdkv.bench.memories import gpu_names
from pdkv.bench.mover import MOVERS
from pdkv.bench.tools import launch_of
from pdkv.errors import ConfigError

SMALL = race.Plan(Workload(256), repeats=2)


def by_contestant(report: race.Report, path: str, layout: str) -> dict[str, race.Result]:
    return {r.contestant: r for r in report.results if r.layout == layout and r.path in (path, "memcpy")}


@pytest.fixture(scope="module")
def report() -> race.Report:
    heard: list[str] = []
    made = race.run(msgspec.structs.replace(SMALL, rivals=("nixl", "mooncake"), tools=Path("/nowhere")), heard.append)
    assert any("pdkv, turn 2" in step for step in heard)
    return made


def test_every_path_and_layout_is_raced(report):
    assert report.num_bytes == 2 * 2_961_408
    for path in ("shm", "tcp"):
        for layout, spans in (("arena", 2), ("per-layer", 2 * 297)):
            ours = by_contestant(report, path, layout)["pdkv"]
            assert (ours.correct, ours.path, ours.spans, ours.error) == (True, path, spans, "")
            assert 0 < ours.gbps.min <= ours.gbps.median <= ours.gbps.max
            assert ours.wire_ms > 0
            ceiling = by_contestant(report, path, layout)["ceiling"]
            assert (ceiling.correct, ceiling.spans) == (True, 2), "the ceiling copies rows, whatever the layout"


def test_rivals_that_are_not_installed_score_nothing_and_say_so(report):
    nixl = by_contestant(report, "shm", "arena")["nixl"]
    assert not nixl.correct
    assert nixl.gbps.max == 0
    assert "make bench-tools" in nixl.error
    assert report.left_out == ("mooncake has no way over shm",)


def test_report_in_all_its_forms(report):
    fields = json.loads(msgspec.json.encode(report))["results"][0]
    for name in ("contestant", "path", "layout", "correct", "gbps", "spans", "post_ms", "wire_ms", "cpu_s"):
        assert name in fields
    assert set(fields["gbps"]) == {"median", "min", "max"}
    text = chart.table(report)
    assert "left out: mooncake has no way over shm" in text
    assert text.count("failed") == 6, "nixl over two paths, mooncake over one, in two layouts"
    drawn = ElementTree.fromstring(chart.svg(report))
    assert len(drawn.findall("{*}rect")) == 1 + len(report.results)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("Lossy", "2 of 2 spans came over wrong"),
        ("Failing", "ZeroDivisionError: inside a foreign library"),
        ("Dying", "its process ended with status 9"),
    ],
)
def test_contestants_that_lie_fail_or_die_score_nothing(kind, why, tmp_path, monkeypatch):
    """The child takes its movers from a module that replaces one of them."""
    (tmp_path / "sitecustomize.py").write_text(
        f"from pdkv.bench import mover\nmover.MOVERS['ucx'] = 'tests.bench.bad_movers:{kind}'\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    plan = msgspec.structs.replace(SMALL, rivals=("ucx",), paths=("shm",), layouts=("arena",), repeats=1)
    results = by_contestant(race.run(plan, lambda _: None), "shm", "arena")
    assert not results["ucx"].correct
    assert why in results["ucx"].error
    assert results["ucx"].gbps == race.Spread(0, 0, 0)
    assert results["pdkv"].correct, "and the others go on"


def test_the_way_is_woken_right_before_every_move_that_counts(monkeypatch):
    """Comparing takes each contestant another while: links slept before some moves and not before others."""
    heard = []
    for owner, name in ((HostJudge, "poison"), (HostJudge, "wake"), (HostJudge, "num_wrong"), (Lane, "move")):
        monkeypatch.setattr(owner, name, _told(heard, name, getattr(owner, name)))
    plan = msgspec.structs.replace(SMALL, paths=("shm",), layouts=("arena",), repeats=1)
    race.run(plan, lambda _: None)
    checked = heard[heard.index("poison") :]
    assert checked == ["poison", "wake", "move", "num_wrong"] * 4, "two contestants, warming up and once more"


def _told(heard, name, method):
    def called(*arguments):
        heard.append(name)
        return method(*arguments)

    return called


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"paths": ("pigeon",)}, "path 'pigeon' is not one of shm, tcp, cuda_ipc"),
        ({"layouts": ("rows",)}, "layout 'rows'"),
        ({"rivals": ("rsync",)}, "rival 'rsync' is not one of nixl, mooncake, ucx"),
        ({"paths": ()}, "at least one path"),
    ],
)
def test_a_plan_of_what_there_is_not(changes, told):
    with pytest.raises(ConfigError, match=told):
        race.checked(msgspec.structs.replace(SMALL, **changes))


@pytest.mark.skipif(bool(gpu_names()), reason="there is a GPU")
def test_gpus_that_there_are_not():
    assert race.paths_of("auto") == race.paths_of("cpu") == ("shm", "tcp")
    assert race.paths_of("cuda") == ("cuda_ipc",)
    with pytest.raises(ConfigError, match="device 'gpu' is not one of auto, cpu, cuda"):
        race.paths_of("gpu")
    with pytest.raises(ConfigError, match="wants GPU 0, and this machine has 0 NVIDIA GPUs"):
        race.run(msgspec.structs.replace(SMALL, paths=("cuda_ipc",)), lambda _: None)


def test_every_contestant_has_its_module():
    for name, mover in MOVERS.items():
        assert importlib.util.find_spec(mover.partition(":")[0]) is not None, name


def test_tools_keep_nixl_on_its_path(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").touch()
    assert launch_of("nixl", "tcp", tmp_path).environment["UCX_TLS"] == "tcp"
    assert "tcp" not in launch_of("nixl", "shm", tmp_path).environment["UCX_TLS"]
