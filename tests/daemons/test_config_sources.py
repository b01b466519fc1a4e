"""What ``pdkv config show`` is told: values, origins, and no secret."""

import os
from typing import Annotated

import pytest

from pdkv.daemons.config import Flag, PrefillConfig, RoleConfig, flag_of
from pdkv.daemons.config_sources import explain


class _Secretive(RoleConfig):
    password: Annotated[str, Flag(secret=True)] = ""


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PDKV_"):
            monkeypatch.delenv(name)


def test_a_secret_is_never_shown() -> None:
    by_name = {setting.name: setting for setting in explain(_Secretive, {"password": "tell-nobody"}, None).settings}
    assert bytes(by_name["password"].value) == b'"(secret)"'
    unset = {setting.name: setting for setting in explain(_Secretive, {}, None).settings}
    assert bytes(unset["password"].value) == b'""'


def test_values_are_the_checked_ones_when_all_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDKV_MAX_BATCH", "7")
    explained = explain(PrefillConfig, {"model": "m"}, None)
    by_name = {setting.name: setting for setting in explained.settings}
    assert explained.error is None
    assert bytes(by_name["max_batch"].value) == b"7"
    assert (by_name["max_batch"].source, by_name["max_batch"].where) == ("env", "PDKV_MAX_BATCH")
    hidden = {field for field in PrefillConfig.model_fields if flag_of(PrefillConfig, field).hidden}
    assert set(by_name) == set(PrefillConfig.model_fields) - hidden


def test_values_are_as_given_when_something_is_wrong() -> None:
    explained = explain(PrefillConfig, {"max_batch": "many"}, None)
    by_name = {setting.name: setting for setting in explained.settings}
    assert bytes(by_name["max_batch"].value) == b'"many"'
    assert by_name["model"].source == "missing"
    assert "--max-batch" in str(explained.error)
