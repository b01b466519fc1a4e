"""The component that sends spans: what daemons are told, and what their network lets out."""

from pathlib import Path
from urllib.parse import urlsplit

import kubernetes_validate
from kubernetes_validate import utils

from pdkv.daemons.tracing import is_wanted
from tests.deploy.manifests import ROLES, main_container, rendered_with, role_of


def test_every_daemon_sends_its_spans_where_its_network_lets_them(tmp_path: Path) -> None:
    objects = rendered_with(tmp_path, "tracing")
    (policy,) = [each["spec"] for each in objects if each["metadata"]["name"] == "pdkv-tracing"]
    (collector, names) = policy["egress"]
    (namespace,) = [peer["namespaceSelector"]["matchLabels"] for peer in collector["to"]]
    told = [each for each in objects if each["kind"] in ("StatefulSet", "Deployment")]
    assert sorted(map(role_of, told)) == sorted(ROLES)
    for each in told:
        assert policy["podSelector"]["matchLabels"].items() <= each["spec"]["template"]["metadata"]["labels"].items()
        variables = {one["name"]: one.get("value", "") for one in main_container(each)["env"]}
        assert is_wanted(variables)
        url = urlsplit(variables["OTEL_EXPORTER_OTLP_ENDPOINT"])
        assert url.hostname == f"otel-collector.{namespace['kubernetes.io/metadata.name']}"
        assert [port["port"] for port in collector["ports"]] == [url.port]
    assert {port["protocol"] for port in names["ports"] if port["port"] == 53} == {"UDP", "TCP"}
    for each in objects:
        kubernetes_validate.validate(each, utils.latest_version(), strict=True)
