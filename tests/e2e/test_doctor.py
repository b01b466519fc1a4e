"""``pdkv doctor`` and ``pdkv describe`` against this machine and against running workers."""

import json
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from pdkv.transport.nixl_agent import installed_nixl
from tests.checkpoints import write_random_checkpoint
from tests.commands import pdkv
from tests.e2e.deployment import Trio
from tests.ports import free_port

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and nothing wrong")


def checks(done: CompletedProcess[str]) -> dict[str, dict[str, str]]:
    report = json.loads(done.stdout)
    assert report["schema"] == "pdkv.doctor/v1"
    return {check["id"]: check for check in report["checks"]}


def test_this_machine_with_a_model_is_fit(link_chasing_model: Path) -> None:
    done = pdkv("doctor", "--model", str(link_chasing_model), "--max-model-len", "4096", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = checks(done)
    assert {"python", "torch", "ucx", "ucx-self-test", "memlock", "shm", "model", "block-size", "arena"} <= found.keys()
    assert found["ucx-self-test"]["status"] == "ok"
    assert found["nixl"]["status"] == ("ok" if installed_nixl() else "skip")
    assert found["peer"]["status"] == "skip"


def test_a_peer_is_greeted_probed_and_measured(three: Trio, link_chasing_model: Path) -> None:
    flags = ("--model", str(link_chasing_model), "--peer", three.prefill.url, "--max-model-len", "4096", "--json")
    done = pdkv("doctor", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    found = checks(done)
    assert found["peer-handshake"]["status"] == "ok"
    assert "over shm" in found["peer-probe"]["evidence"]
    assert "64 KiB" in found["peer-bandwidth"]["evidence"]
    slow = pdkv("doctor", *flags, "--min-gbps", "100000")
    assert slow.returncode == 3
    assert checks(slow)["peer-bandwidth"]["status"] == "fail"


def test_a_peer_with_another_model_is_refused_by_name(three: Trio, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, seed=1)
    done = pdkv("doctor", "--model", str(tmp_path), "--peer", three.prefill.url, "--max-model-len", "4096", "--json")
    assert done.returncode == 3
    assert "model fingerprint" in checks(done)["peer"]["evidence"]


def test_a_peer_that_stores_otherwise_is_refused_by_name(three: Trio, link_chasing_model: Path) -> None:
    stored = ("--kv-dtype", "fp8", "--index-dtype", "fp8", "--index-topk-freq", "2")
    flags = ("--model", str(link_chasing_model), "--peer", three.prefill.url, "--max-model-len", "4096", "--json")
    done = pdkv("doctor", *flags, *stored)
    assert done.returncode == 3, done.stdout + done.stderr
    told = checks(done)["peer"]["evidence"]
    for words in (
        "kv dtype: prefill has float32, decode has float8_e4m3fn",
        "index dtype: prefill has float32, decode has float8_e4m3fn",
        "scale convention: prefill has none, decode has per-token-head-f32-absmax/448-e4m3fn",
        "index schedule: prefill has all, decode has layers 1, 3 select",
    ):
        assert words in told, told


@pytest.mark.parametrize(
    ("flags", "check", "told"),
    [
        (("--model", "/nowhere"), "model", "/nowhere"),
        (("--require-transport", "rdma"), "ucx", "without InfiniBand"),
        pytest.param(("--require-transport", "cuda_ipc"), "nvlink", "NVIDIA", marks=without_gpu),
        (("--ucx-library", "/nowhere"), "ucx", "/nowhere"),
    ],
)
def test_what_is_wrong_is_found_and_told(flags: tuple[str, ...], check: str, told: str) -> None:
    done = pdkv("doctor", *flags, "--json")
    assert done.returncode == 3, done.stdout + done.stderr
    found = checks(done)[check]
    assert found["status"] == "fail"
    assert told in found["evidence"]


def test_nobody_at_the_peers_address(link_chasing_model: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = pdkv("doctor", "--model", str(link_chasing_model), "--peer", url)
    assert done.returncode == 3
    assert f"no pdkv worker answers at {url}" in done.stdout


def test_an_inherited_ucx_setting_is_pointed_out() -> None:
    done = pdkv("doctor", "--json", UCX_TLS="tcp")
    assert "it leaves out RDMA" in checks(done)["ucx-environment"]["evidence"]


def test_a_worker_describes_itself(three: Trio) -> None:
    done = pdkv("describe", three.prefill.url)
    assert done.returncode == 0, done.stderr
    for word in ("prefill worker", str(three.prefill.info()["incarnation"]), "index_k", "layers 1..3", "leases"):
        assert word in done.stdout
    machine = json.loads(pdkv("describe", three.decode.url, "--json").stdout)
    assert machine["schema"] == "pdkv.describe/v1"
    assert machine["info"]["role"] == "decode"
    assert machine["status"]["pages_free"] == machine["status"]["pages_usable"]
    nobody = pdkv("describe", f"http://127.0.0.1:{free_port()}")
    assert nobody.returncode == 1
    assert "no pdkv worker answers" in nobody.stderr
