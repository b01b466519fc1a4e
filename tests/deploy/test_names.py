"""Every port, flag, variable and key in the manifests is one that the code knows, and all that must agree agrees."""

from typing import Any

import pytest
import typer

from pdkv.cli import demo, doctor
from pdkv.daemons.config import DNS_SCHEME, Address
from tests.deploy.containers import POD_IP, configuration, environment
from tests.deploy.manifests import ALL, ROLES, containers, kinds, main_container, workload


def _ports(of: str, role: str) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in main_container(workload(of, role))["ports"]}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("of", ALL)
def test_a_container_listens_where_its_manifest_says(of: str, role: str) -> None:
    config = configuration(of, role)  # every flag, PDKV_* variable and key of pdkv.yaml is checked by this
    listens = {"http": config.listen, "admin": config.admin_listen}
    if role == "prefill":
        listens["control"] = config.control_listen
    assert {name: Address(text).port for name, text in listens.items()} == _ports(of, role)
    assert {Address(text).host for text in listens.values()} == {"0.0.0.0"}, "probes and peers come from outside"
    defaults = type(config).model_fields
    assert Address(config.listen).port == Address(defaults["listen"].default).port, "as documented everywhere"
    assert Address(config.admin_listen).port == Address(defaults["admin_listen"].default).port


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("of", ALL)
def test_workers_advertise_the_address_of_their_pod_and_find_their_model(of: str, role: str) -> None:
    config = configuration(of, role)
    assert config.advertise_host == POD_IP
    assert str(config.model) in [m["mountPath"] for m in main_container(workload(of, role))["volumeMounts"]]
    assert config.threads > 0, "0 would be one thread a core of the node"
    assert config.require_transport == ("rdma" if of == "gpu-rdma-1p1d" else None)


@pytest.mark.parametrize("of", ALL)
def test_init_containers_run_commands_that_there_are(of: str) -> None:
    commands: dict[str, Any] = {**_commands(demo.app), **_commands(doctor.app)}
    for container in containers(of):
        if container.is_init:
            command, *rest = container.spec["args"]
            commands[command].make_context(command, list(rest))


def _commands(app: typer.Typer) -> dict[str, Any]:
    group: Any = typer.main.get_group(app)
    return dict(group.commands)


@pytest.mark.parametrize("of", ALL)
def test_the_router_asks_for_names_that_services_have(of: str) -> None:
    config = configuration(of, "router")
    services = {service["metadata"]["name"]: service["spec"] for service in kinds(of, "Service")}
    for role, targets in (("prefill", config.prefill_urls), ("decode", config.decode_urls)):
        (target,) = targets
        assert target.startswith(DNS_SCHEME)
        address = Address(target.removeprefix(DNS_SCHEME))
        assert services[address.host]["selector"] == workload(of, role)["spec"]["selector"]["matchLabels"]
        assert address.port == _ports(of, role)["http"]


@pytest.mark.parametrize("of", ALL)
def test_services_lead_to_ports_that_their_pods_have(of: str) -> None:
    for service in kinds(of, "Service"):
        role = service["spec"]["selector"]["app.kubernetes.io/component"]
        for port in service["spec"]["ports"]:
            assert _ports(of, role)[port["targetPort"]] == port["port"]
        assert role != "router" or [port["name"] for port in service["spec"]["ports"]] == ["http"]


def _allowed(of: str, role: str, direction: str) -> set[tuple[str, object]]:
    """Who may be reached (egress) or may reach (ingress), and on which port or range."""
    found: set[tuple[str, object]] = set()
    for policy in kinds(of, "NetworkPolicy"):
        if policy["spec"]["podSelector"]["matchLabels"].get("app.kubernetes.io/component") != role:
            continue
        for rule in policy["spec"].get(direction, []):
            for peer in rule["from" if direction == "ingress" else "to"]:
                labels = peer.get("podSelector", {}).get("matchLabels", {})
                who = labels.get("app.kubernetes.io/component") or labels.get("k8s-app") or "anybody"
                found |= {(who, (port["port"], port.get("endPort", port["port"]))) for port in rule["ports"]}
    return found


@pytest.mark.parametrize("of", ALL)
def test_the_fence_lets_through_what_the_daemons_need_and_nothing_else(of: str) -> None:
    http = {role: (_ports(of, role)["http"],) * 2 for role in ROLES}
    control = (_ports(of, "prefill")["control"],) * 2
    low, high = map(int, environment(main_container(workload(of, "decode")))["UCX_TCP_PORT_RANGE"].split("-"))
    assert environment(main_container(workload(of, "prefill")))["UCX_TCP_PORT_RANGE"] == f"{low}-{high}"
    data = (low, high)
    assert control[0] < low, "the control port is not one that UCX may take"
    dns = {("kube-dns", (53, 53)), ("anybody", (53, 53))}
    assert _allowed(of, "router", "ingress") == {("anybody", http["router"])}
    assert _allowed(of, "router", "egress") == {("prefill", http["prefill"]), ("decode", http["decode"])} | dns
    assert _allowed(of, "prefill", "ingress") == {
        ("router", http["prefill"]),
        ("decode", control),
        ("decode", data),
    }
    assert _allowed(of, "prefill", "egress") == {("decode", data)}
    assert _allowed(of, "decode", "ingress") == {("router", http["decode"]), ("prefill", data)}
    assert _allowed(of, "decode", "egress") == {("prefill", control), ("prefill", data)}
