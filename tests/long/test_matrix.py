"""``pdkv matrix``: a corner of it, with real workers and a cache that loses precision."""

import json
import os
import subprocess
import sys


def test_pairs_of_ranks_answer_exactly_in_a_lossy_cache() -> None:
    command = [sys.executable, "-m", "pdkv", "matrix", "--tp", "1,4", "--cache", "fp8/fp8", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["schema"] == "pdkv.matrix/v1"
    cells = {(c["prefill_tp"], c["decode_tp"]): c for c in report["cells"]}
    assert set(cells) == {(1, 1), (1, 4), (4, 1), (4, 4)}
    assert all(c["first_wrong_step"] is None for c in cells.values())
    page, index = 589_824, 3 * 16_384
    heads = page - index
    assert cells[1, 1]["bytes_per_page"] == cells[4, 1]["bytes_per_page"] == page
    assert cells[1, 4]["bytes_per_page"] == cells[4, 4]["bytes_per_page"] == heads + 4 * index
    for (prefill, decode), cell in cells.items():
        sources = prefill if decode == 1 else 1
        assert cell["spans_per_page"] <= decode * (1 + sources)
        assert min(cell["prefill_peak_rss"], cell["decode_peak_rss"]) > 50 << 20
