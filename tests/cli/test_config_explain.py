"""``pdkv config explain``: one setting in words, whatever it is called, for every role that has it."""

import json

import pytest
from typer.testing import CliRunner, Result

from pdkv.cli import app
from pdkv.daemons.config import ROLES, flag_name, flag_of


def pdkv(*args: str) -> Result:
    return CliRunner().invoke(app, ["config", "explain", *args])


def meanings(*args: str) -> list[dict[str, object]]:
    told = pdkv("--json", *args)
    assert told.exit_code == 0, told.stderr
    document = json.loads(told.stdout)
    assert document["schema"] == "pdkv.config-explain/v1"
    return list(document["meanings"])


@pytest.mark.parametrize("key", ["max_batch", "max-batch", "PDKV_MAX_BATCH", "--max-batch"])
def test_a_setting_is_known_by_its_key_its_variable_and_its_flag(key: str) -> None:
    (found,) = meanings("--", key)
    assert found["roles"] == ["prefill", "decode", "up"]
    assert (found["name"], found["flag"], found["variable"]) == ("max_batch", "--max-batch", "PDKV_MAX_BATCH")
    assert (found["values"], found["default"], found["required"]) == ("a whole number, at least 1", 8, False)


def test_roles_in_which_a_setting_differs_are_told_apart() -> None:
    found = {role: meaning for meaning in meanings("drain_timeout") for role in meaning["roles"]}  # type: ignore[attr-defined]
    assert [found[role]["default"] for role in ("prefill", "decode", "router", "up")] == [60.0, 300.0, 30.0, 8.0]
    assert found["up"]["values"] == "a number, more than 0, at most 10"
    told = pdkv("drain_timeout").stdout
    assert told.count("drain_timeout: ") == 4
    assert {meaning["name"] for meaning in meanings("--", "--prefill")} == {"prefill_urls", "num_prefill"}


def test_what_must_be_set_and_what_is_chosen_from_is_said() -> None:
    assert "none: it must be set" in pdkv("model").stdout
    told = pdkv("require_transport").stdout
    assert "rdma | cuda_ipc | shm | tcp or nothing" in told
    assert "--lease-ttl (see --help-all)" in pdkv("lease_ttl").stdout


def test_a_setting_that_nobody_has_ends_with_2() -> None:
    told = pdkv("max_bach")
    assert told.exit_code == 2
    assert "did you mean max_batch?" in told.stderr
    assert pdkv("reuse_port").exit_code == 2, "between our own processes"


def test_every_setting_can_be_explained() -> None:
    names = {(schema, field) for schema in ROLES for field in schema.model_fields}
    for key in sorted({flag_name(s, f) for s, f in names if not flag_of(s, f).hidden}):
        assert all(meaning["description"] and meaning["values"] for meaning in meanings("--", key))
