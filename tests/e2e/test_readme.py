"""The README's commands, as they stand there: only the port and the way to ``pdkv`` are this test's own."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from pdkv.verify.link_chasing import node_token, vocabulary
from tests.e2e.deployment import Process, running
from tests.ports import free_port

README = Path(__file__).parents[2] / "README.md"
RUN_BY_CI_ITSELF = ("make demo",)


def commands() -> list[str]:
    """Every command in a fenced block, continued lines joined."""
    text = README.read_text()
    assert "`make test`" in text
    blocks = re.findall(r"^```(?:text)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.startswith(("make ", ".venv/bin/pdkv ", "curl "))]


def test_the_quickstart_does_what_it_says(tmp_path: Path) -> None:
    found = [command for command in commands() if command not in RUN_BY_CI_ITSELF]
    demo_model, up, *curls = found
    port = free_port()
    pdkv = shlex.quote(str(Path(sys.executable).with_name("pdkv")))
    subprocess.run(demo_model.replace(".venv/bin/pdkv", pdkv), shell=True, check=True, cwd=tmp_path, timeout=60)
    words = shlex.split(up.replace("--port 8000", f"--port {port}"))
    assert words[:2] == [".venv/bin/pdkv", "up"]
    arguments = [str(tmp_path / "checkpoint") if word == "./checkpoint" else word for word in words[2:]]
    with running(Process("up", f"http://127.0.0.1:{port}", arguments, tmp_path / "up.log")):
        asked = [curl.replace(":8000/", f":{port}/") for curl in curls]
        completion, chat = [
            json.loads(subprocess.run(curl, shell=True, check=True, capture_output=True, text=True, timeout=60).stdout)
            for curl in asked
        ]
    assert completion["choices"][0]["text"].split() == ["n2", "n3"]
    assert chat["choices"][0]["message"]["content"].split() == ["n2", "n3"]
    assert vocabulary()[node_token(2)] == "n2"
