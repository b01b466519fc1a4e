"""What a container's command, environment and mounted file mean to pdkv itself."""

import os
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import typer

from pdkv.cli import serve
from pdkv.daemons.config import DecodeConfig, PrefillConfig, RoleConfig, RouterConfig, load
from tests.deploy.manifests import Object, main_container, worker_settings, workload

SCHEMAS: dict[str, type[RoleConfig]] = {"prefill": PrefillConfig, "decode": DecodeConfig, "router": RouterConfig}
POD_IP = "10.0.0.1"


def environment(container: Object) -> dict[str, str]:
    """The variables of the manifest, with what Kubernetes would put in."""
    known = {"status.podIP": POD_IP}
    return {
        variable["name"]: variable["value"]
        if "value" in variable
        else known[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        for variable in container.get("env", [])
    }


def flags(args: list[str]) -> dict[str, Any]:
    """What ``pdkv`` makes of a command line: exits as the command would where it does not understand."""
    role, *rest = args
    group: Any = typer.main.get_group(serve.app)
    given = group.commands[role].make_context(role, rest).params
    return {
        name: value for name, value in given.items() if value not in (None, []) and name not in ("help_all", "config")
    }


def configuration(of: str, role: str) -> Any:
    """The role's configuration as its container would load it. Raises ConfigError as the container would end."""
    container = main_container(workload(of, role))
    env = environment(container)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, env, clear=True):
        path = None
        if "PDKV_CONFIG" in env:
            mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert str(Path(env["PDKV_CONFIG"]).parent) in mounts
            path = Path(folder) / Path(env["PDKV_CONFIG"]).name
            path.write_text(worker_settings(of), encoding="utf-8")
        return load(SCHEMAS[role], flags(container["args"]), path)
