"""``pdkv matrix``: what is refused before any worker is started, and what workers are told of a GPU."""

import pytest
from typer.testing import CliRunner

from pdkv.cli import app
from pdkv.verify.matrix import MatrixOptions


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("--device", "tpu"), "expected cpu or cuda"),
        (("--tp", "1,3"), "1, 2, 4 or 8 ranks"),
        (("--cache", "fp8"), "KV/INDEX"),
    ],
)
def test_what_cannot_be_tried_is_refused(given: tuple[str, str], named: str):
    told = CliRunner().invoke(app, ["matrix", *given], env={"COLUMNS": "200"})
    assert told.exit_code == 2
    assert named in " ".join(told.stderr.split())


def test_all_workers_together_leave_a_part_of_the_gpu():
    assert MatrixOptions().device_flags == ()
    flags = MatrixOptions(ranks=(1, 2), device="cuda").device_flags
    assert flags == ("--device", "cuda", "--gpu-memory-utilization", "0.200")
