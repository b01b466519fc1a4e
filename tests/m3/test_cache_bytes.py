"""The table of docs/cache.md is what the code lays out."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_documented_bytes_are_those_of_the_layout():
    script = runpy.run_path(str(ROOT / "scripts" / "cache_bytes.py"))
    lines = list(script["table"]())
    assert "\n".join(lines) in (ROOT / "docs" / "cache.md").read_text()
    assert "| fp8 | fp8 | 4 | 15 | 65,280 | 17,760 | 5,376 (23%) |" in lines, "42 regions of 128 bytes less"
