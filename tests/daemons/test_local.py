"""What ``pdkv up`` starts: the command lines of its children."""

import os
from pathlib import Path

import pytest

from pdkv.daemons.config import Address, ServedConfig, UpConfig, flag_name, load
from pdkv.daemons.gpu_order import VARIABLE, visible_gpus
from pdkv.daemons.local import Ports, child_specs, curl_line

ROUTER = Ports(Address("127.0.0.1:8000"), Address("127.0.0.1:8090"))
WORKERS = [Ports(Address(f"127.0.0.1:{port}"), Address(f"127.0.0.1:{port + 100}")) for port in (1, 2, 3)]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PDKV_"):
            monkeypatch.delenv(name)


def _config(**flags: object) -> UpConfig:
    return load(UpConfig, {"model": Path("/models/m"), "num_prefill": 1, "num_decode": 2, **flags})


def _value(args: tuple[str, ...], flag: str) -> str:
    return args[args.index(flag) + 1]


def test_every_child_has_its_role_and_address() -> None:
    specs = child_specs(_config(), ROUTER, WORKERS)
    assert [spec.name for spec in specs] == ["prefill-0", "decode-0", "decode-1", "router"]
    assert [spec.args[0] for spec in specs] == ["prefill", "decode", "decode", "router"]
    ports = [(_value(spec.args, "--listen"), _value(spec.args, "--admin-listen")) for spec in specs]
    assert ports == [*WORKERS, ROUTER]
    router = specs[-1].args
    assert _value(router, "--prefill") == "http://127.0.0.1:1"
    assert [router[i + 1] for i, arg in enumerate(router) if arg == "--decode"] == [
        "http://127.0.0.1:2",
        "http://127.0.0.1:3",
    ]


def test_workers_get_every_setting_that_was_made() -> None:
    made = {
        "served_model_name": "name",
        "max_model_len": 1000,
        "max_batch": 3,
        "num_pages": 40,
        "max_prompts": 16,
        "prefill_chunk": 256,
        "dtype": "bfloat16",
        "transport": "ucx",
        "require_transport": "tcp",
        "nvlink_blocks": 32,
        "ucx_tls": "tcp,self",
        "ucx_library": "/opt/libucp.so",
        "lease_ttl_s": 3.0,
        "kv_dtype": "fp8",
        "index_dtype": "fp8",
        "index_topk_freq": 4,
        "index_topk_pattern": "CSSC",
        "index_skip_topk_offset": 1,
        "device": "cuda",
        "gpu_memory_utilization": 0.4,
        "load_format": "dummy",
        "control_keys": "/keys",
    }
    switched_on = {"no_prefix_cache", "batch_invariant"}
    assert set(made) | switched_on | {"model", "log_level", "log_format"} == set(ServedConfig.model_fields)
    specs = child_specs(_config(**made, no_prefix_cache=True, batch_invariant=True), ROUTER, WORKERS)
    for spec in specs[:-1]:
        assert switched_on <= {arg.removeprefix("--").replace("-", "_") for arg in spec.args}
        for field, value in made.items():
            assert _value(spec.args, flag_name(ServedConfig, field)) == str(value)


def test_cores_are_shared_out_and_never_below_one() -> None:
    cores = len(os.sched_getaffinity(0))
    for spec in child_specs(_config(), ROUTER, WORKERS)[:-1]:
        assert _value(spec.args, "--threads") == str(max(1, cores // 3))
    assert _value(child_specs(_config(threads=5), ROUTER, WORKERS)[0].args, "--threads") == "5"


def test_the_curl_line_fits_the_checkpoint(tmp_path: Path) -> None:
    config = load(UpConfig, {"model": tmp_path / "m", "served_model_name": "shown"})
    assert '"prompt": [1, 2, 3]' in curl_line(config, "http://h:1")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    line = curl_line(config, "http://h:1")
    assert '"prompt": "Hello"' in line
    assert '"model": "shown"' in line
    assert line.startswith("curl http://h:1/v1/completions -H 'Content-Type")
    guarded = load(UpConfig, {"model": tmp_path / "m", "api_keys": tmp_path / "keys"})
    assert '-H "Authorization: Bearer $KEY" ' in curl_line(guarded, "http://h:1")


def test_each_role_gets_its_own_number_of_ranks() -> None:
    specs = child_specs(_config(prefill_tp=2, decode_tp=4, ep=True, speculative_tokens=3), ROUTER, WORKERS)
    prefill, decode = specs[0].args, specs[1].args
    assert (_value(prefill, "--tp"), _value(decode, "--tp")) == ("2", "4")
    assert _value(decode, "--speculative-tokens") == "3"
    assert "--speculative-tokens" not in prefill
    assert _value(prefill, "--layer-groups") == "4"
    assert "--layer-groups" not in decode
    assert _value(decode, "--max-pull-gbps") == "0.0"
    assert "--max-pull-gbps" not in prefill
    assert _value(decode, "--verify-pages") == "off"
    assert "--verify-pages" not in prefill
    assert "--ep" in prefill
    assert "--ep" in decode


def test_workers_get_gpus_of_their_own_and_see_the_others() -> None:
    """In turns where there are too few; and nothing is said where there is one, or none."""
    two = [dict(spec.env) for spec in child_specs(_config(device="cuda"), ROUTER, WORKERS, ("4", "GPU-b"))]
    assert two == [{VARIABLE: "4,GPU-b"}, {VARIABLE: "GPU-b,4"}, {VARIABLE: "4,GPU-b"}, {}]
    ranks = _config(device="cuda", prefill_tp=2, decode_tp=1)
    four = [dict(spec.env) for spec in child_specs(ranks, ROUTER, WORKERS, "0123")]
    assert four == [{VARIABLE: "0,1,2,3"}, {VARIABLE: "2,3,0,1"}, {VARIABLE: "3,0,1,2"}, {}]
    for gpus in ((), ("0",)):
        assert all(not spec.env for spec in child_specs(_config(device="cuda"), ROUTER, WORKERS, gpus))


def test_gpus_are_those_that_cuda_may_see() -> None:
    assert visible_gpus({VARIABLE: "3, 1"}) == ("3", "1")
    assert visible_gpus({VARIABLE: ""}) == ()
