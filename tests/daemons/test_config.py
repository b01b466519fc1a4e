"""Where a setting comes from, and what becomes of one that nobody knows."""

import os
from pathlib import Path

import pytest
import yaml

from pdkv.daemons.config import (
    ROLES,
    Address,
    DecodeConfig,
    PrefillConfig,
    RouterConfig,
    UpConfig,
    child_environment,
    flag_name,
    load,
)
from pdkv.errors import ConfigError


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PDKV_"):
            monkeypatch.delenv(name)


def _yaml(folder: Path, **content: object) -> Path:
    path = folder / "pdkv.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _yaml(tmp_path, model="m", max_batch=1, max_model_len=1, prefill_chunk=1)
    monkeypatch.setenv("PDKV_MAX_BATCH", "2")
    monkeypatch.setenv("PDKV_MAX_MODEL_LEN", "2")
    config = load(PrefillConfig, {"max_batch": 3}, file)
    assert (config.max_batch, config.max_model_len, config.prefill_chunk, config.lease_ttl_s) == (3, 2, 1, 10.0)
    monkeypatch.setenv("PDKV_CONFIG", str(file))
    assert load(PrefillConfig, {}).prefill_chunk == 1


def test_lists_come_from_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDKV_PREFILL_URLS", "http://a:1,http://b:2/")
    config = load(RouterConfig, {}, _yaml(tmp_path, decode_urls=["http://c:3"]))
    assert (config.prefill_urls, config.decode_urls) == (("http://a:1", "http://b:2"), ("http://c:3",))


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'max_bach'; did you mean max_batch\?"):
        load(PrefillConfig, {"model": "m"}, _yaml(tmp_path, max_bach=3))


def test_an_unknown_variable_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDKV_TRANSPROT", "ucx")
    with pytest.raises(
        ConfigError, match=r"unknown environment variable PDKV_TRANSPROT; did you mean PDKV_TRANSPORT\?"
    ):
        load(PrefillConfig, {"model": "m"})


def test_a_variable_of_another_role_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDKV_NUM_PREFILL", "3")
    load(PrefillConfig, {"model": "m"})
    assert load(UpConfig, {"model": "m"}).num_prefill == 3


@pytest.mark.parametrize(
    ("flags", "variables", "content", "message"),
    [
        ({}, {}, {}, "--model is missing"),
        ({"model": "m", "max_batch": "x"}, {}, {}, "--max-batch: Input should be a valid integer"),
        ({"model": "m"}, {"PDKV_MAX_BATCH": "0"}, {}, "PDKV_MAX_BATCH: Input should be greater"),
        ({"model": "m"}, {}, {"max_batch": "x"}, "max_batch: Input should be a valid integer"),
        ({"model": "m", "listen": "nowhere"}, {}, {}, "--listen: expected HOST:PORT"),
        (
            {"model": "m", "transport": "pigeon"},
            {},
            {},
            "--transport: Input should be 'auto', 'nixl', 'nvlink', 'shm', 'sockets' or",
        ),
        ({"model": "m"}, {}, [1], "must hold keys and values"),
    ],
)
def test_wrong_values_name_their_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict, variables: dict, content: object, message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "pdkv.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as refused:
        load(DecodeConfig, flags, file)
    assert message in str(refused.value)
    assert refused.value.exit_code == 2


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(PrefillConfig, {}, tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load(PrefillConfig, {}, tmp_path / "broken.yaml")


@pytest.mark.parametrize("field", ["listen", "control_listen", "admin_listen"])
def test_only_loopback_unless_insecure_is_spelled_out(field: str) -> None:
    flags = {"model": "m", field: "10.0.0.1:1"}
    with pytest.raises(ConfigError, match=r"does not authenticate its peers: .* Give --control-keys .*--insecure"):
        load(DecodeConfig, flags)
    assert load(DecodeConfig, {**flags, "insecure": True}).insecure
    assert not load(DecodeConfig, {**flags, "control_keys": "keys"}).insecure, "and with keys it need not be"


def test_the_folder_of_keys_is_found_as_every_setting_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pdkv.yaml"
    file.write_text(yaml.safe_dump({"control_keys": "/yaml"}))
    assert load(PrefillConfig, {"model": "m"}).control_keys is None
    assert load(PrefillConfig, {"model": "m"}, file).control_keys == Path("/yaml")
    monkeypatch.setenv("PDKV_CONTROL_KEYS", "/env")
    assert load(PrefillConfig, {"model": "m"}, file).control_keys == Path("/env")
    assert load(UpConfig, {"model": "m", "control_keys": "/flag"}, file).control_keys == Path("/flag")


def test_a_routers_admin_port_beyond_loopback_is_spelled_out_whatever_keys_workers_have() -> None:
    flags = {"prefill_urls": ["http://a:1"], "decode_urls": ["http://b:1"], "admin_listen": "10.0.0.1:1"}
    with pytest.raises(ConfigError, match="end this router"):
        load(RouterConfig, flags)
    assert load(RouterConfig, {**flags, "insecure": True}).insecure


def test_peers_are_told_an_address_that_they_can_reach() -> None:
    flags = {"model": "m", "control_listen": "0.0.0.0:7400", "insecure": True}
    with pytest.raises(ConfigError, match="--advertise-host"):
        load(PrefillConfig, flags)
    load(PrefillConfig, {**flags, "advertise_host": "10.0.0.1"})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"device": "cpu"}, "--batch-invariant needs --device cuda"),
        ({"decode_tp": 2}, "one rank a worker: set --tp to 1"),
        ({"speculative_tokens": 3}, "no --speculative-tokens"),
    ],
)
def test_what_would_make_batch_invariance_a_lie_is_refused(flags: dict[str, object], message: str) -> None:
    asked = {"model": "m", "device": "cuda", "batch_invariant": True, **flags}
    with pytest.raises(ConfigError, match=message):
        load(UpConfig, asked)
    workers = {"tp" if name == "decode_tp" else name: value for name, value in asked.items()}
    with pytest.raises(ConfigError, match=message):
        load(DecodeConfig, workers)
    assert load(UpConfig, {**asked, "batch_invariant": False}).batch_invariant is False


def test_addresses() -> None:
    assert (Address("[::1]:80").host, Address("::1:80").port) == ("::1", 80)
    assert Address("[::1]:80").is_loopback
    assert Address("localhost:1").is_loopback
    assert not Address("example.org:1").is_loopback
    for wrong in ("", "a", ":1", "a:", "a:70000", "a:-1"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            Address(wrong)


def test_flags_of_a_role_are_distinct() -> None:
    for role in ROLES:
        flags = [flag_name(role, field) for field in role.model_fields]
        assert len(set(flags)) == len(flags)


def test_children_get_their_settings_as_flags_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDKV_MODEL", "m")
    assert "PDKV_MODEL" not in child_environment()
    assert child_environment(OMP_WAIT_POLICY="PASSIVE")["OMP_WAIT_POLICY"] == "PASSIVE"
