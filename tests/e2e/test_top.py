"""``pdkv top`` at a running deployment: every worker is found by the router alone, and a dead address is a row."""

import json

from pdkv.verify.link_chasing import make_prompt
from tests import commands
from tests.e2e.deployment import Process, ask, token_ids
from tests.http import HTTP
from tests.ports import free_port


def test_once_shows_every_worker_as_json_and_as_a_table(deployment: Process) -> None:
    prompt = make_prompt(940, 300)
    assert token_ids(ask(deployment.url, prompt.token_ids, 4)) == list(prompt.expected(4))
    dead = f"http://127.0.0.1:{free_port()}"
    asked = ["top", "--router", deployment.url, "--worker", dead, "--interval", "0.1", "--once"]
    told = commands.pdkv(*asked, "--json")
    assert (told.returncode, told.stderr) == (0, "")
    view = json.loads(told.stdout)
    assert view["schema"] == "pdkv.top/v1"
    assert view["seconds"] >= 0.1
    assert view["router"] == {"url": deployment.url, "answers": True, "ready": True, "problem": ""}
    known = {worker["url"]: worker for worker in HTTP.get(f"{deployment.url}/health").json()["workers"]}
    *workers, gone = view["workers"]
    assert [(row["url"], row["role"]) for row in workers] == [(w["url"], w["role"]) for w in known.values()]
    for row in workers:
        assert (row["state"], row["circuit"], row["problem"]) == ("ready", "closed", "")
        figures = row["figures"]
        assert figures["peers"] == 1
        assert 0 <= figures["longest_silence_s"] < 65
        assert figures["tokens_per_s"] >= 0
        assert 0 <= figures["pages_used"] <= figures["pages_total"] > 0
    prefill, decode = (row["figures"] for row in workers)
    assert prefill["leases"] is not None
    assert prefill["bytes_per_s"] is prefill["first_token_p50_s"] is decode["leases"] is None
    assert decode["bytes_per_s"] >= 0
    assert (gone["url"], gone["state"], gone["figures"]["pages_total"]) == (dead, "unreachable", None)
    assert "cannot connect" in gone["problem"]

    told = commands.pdkv(*asked)
    assert (told.returncode, told.stderr) == (0, "")
    assert "\x1b" not in told.stdout
    lines = told.stdout.splitlines()
    assert lines[0].startswith(f"router {deployment.url.removeprefix('http://')} ready, 3 workers, rates over ")
    for url, worker in known.items():
        serving, moving = (line.split() for line in lines if line.startswith(url.removeprefix("http://")))
        assert serving[1:4] == [worker["role"], "ready", "closed"]
        assert moving[1].endswith(f"/{workers[list(known).index(url)]['figures']['pages_total']:,}")
    assert f"{dead.removeprefix('http://')}: {gone['problem']}" in lines
