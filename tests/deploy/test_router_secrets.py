"""Components that give the router files out of a Secret: where it looks for them, who may read them, who sees them
change."""

import posixpath
from pathlib import Path

import kubernetes_validate
import pytest
from kubernetes_validate import utils

from pdkv.daemons.config import ENV_PREFIX, RouterConfig
from tests.deploy.manifests import Object, main_container, pod_of, rendered_with, role_of

FILES = {
    "api-keys": ("pdkv-api-keys", {"api_keys": "api-keys"}),  # as docs/deploy.md makes the Secret
    "tls": ("pdkv-router-tls", {"tls_cert": "tls.crt", "tls_key": "tls.key"}),  # as Secrets of kubernetes.io/tls are
}


def router_of(objects: list[Object], kind: str) -> Object:
    (found,) = [each for each in objects if each["kind"] == kind and role_of(each) == "router"]
    return found


@pytest.mark.parametrize("component", FILES)
def test_the_router_alone_reads_the_files_and_sees_them_change(component: str, tmp_path: Path) -> None:
    secret, files = FILES[component]
    objects = rendered_with(tmp_path, component)
    for each in objects:
        if each["kind"] in ("StatefulSet", "Deployment"):
            assert (secret in str(each)) is (role_of(each) == "router")
        kubernetes_validate.validate(each, utils.latest_version(), strict=True)
    deployment = router_of(objects, "Deployment")
    pod, container = pod_of(deployment), main_container(deployment)
    variables = {one["name"]: one.get("value", "") for one in container["env"]}
    for field, file in files.items():
        assert field in RouterConfig.model_fields
        folder, name = posixpath.split(variables[ENV_PREFIX + field.upper()])
        assert name == file
        (mount,) = [one for one in container["volumeMounts"] if one["mountPath"] == folder]
        assert mount["readOnly"]
        assert "subPath" not in mount, "which would never change"
        (volume,) = [one for one in pod["volumes"] if one["name"] == mount["name"]]
        assert volume["secret"] == {"secretName": secret, "defaultMode": 0o440}
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]


def test_the_service_of_a_router_with_a_certificate_says_so(tmp_path: Path) -> None:
    (port,) = router_of(rendered_with(tmp_path, "tls"), "Service")["spec"]["ports"]
    assert (port["name"], port["port"], port["targetPort"], port["appProtocol"]) == ("http", 8000, "http", "https")


def test_both_go_together(tmp_path: Path) -> None:
    container = main_container(router_of(rendered_with(tmp_path, *FILES), "Deployment"))
    given = {one["name"] for one in container["env"]}
    assert {ENV_PREFIX + field.upper() for _, files in FILES.values() for field in files} <= given
    mounted = [one["mountPath"] for one in container["volumeMounts"]]
    assert len(set(mounted)) == len(mounted)
