"""The component that gives the router its clients' keys: where it looks for them, and who may read them."""

import posixpath
from pathlib import Path

import kubernetes_validate
from kubernetes_validate import utils

from pdkv.daemons.config import RouterConfig
from tests.deploy.manifests import main_container, pod_of, rendered_with, role_of

SECRET = {"secretName": "pdkv-api-keys", "defaultMode": 0o440}


def test_the_router_alone_reads_keys_and_sees_them_change(tmp_path: Path) -> None:
    objects = rendered_with("api-keys", tmp_path)
    told = {role_of(each): each for each in objects if each["kind"] in ("StatefulSet", "Deployment")}
    for role, each in told.items():
        assert ("pdkv-api-keys" in str(each)) is (role == "router")
    pod, container = pod_of(told["router"]), main_container(told["router"])
    variables = {one["name"]: one.get("value", "") for one in container["env"]}
    assert "api_keys" in RouterConfig.model_fields
    folder, name = posixpath.split(variables["PDKV_API_KEYS"])
    (mount,) = [one for one in container["volumeMounts"] if one["mountPath"] == folder]
    assert name == "api-keys", "as docs/deploy.md makes the Secret"
    assert mount["readOnly"]
    assert "subPath" not in mount, "which would never change"
    (volume,) = [one for one in pod["volumes"] if one["name"] == mount["name"]]
    assert volume["secret"] == SECRET
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
    for each in objects:
        kubernetes_validate.validate(each, utils.latest_version(), strict=True)
