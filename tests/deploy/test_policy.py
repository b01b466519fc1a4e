"""What every pod must have: probes, limits, no rights, time to drain; and a fence around pods that trust everybody."""

import pytest

from tests.deploy.containers import configuration, environment
from tests.deploy.manifests import (
    ALL,
    OVERLAYS,
    WITH_KEYS,
    Object,
    containers,
    kinds,
    main_container,
    objects,
    pod_of,
    role_of,
    workloads,
)

CLOSING_S = 10
"""After a drain: seconds for the last answers, the engine process and the sockets."""


@pytest.mark.parametrize("of", OVERLAYS)
def test_images_are_chosen_and_pinned(of: str) -> None:
    for container in containers(of):
        name, _, tag = container.spec["image"].rpartition(":")
        assert name, f"{container}: no tag"
        assert tag not in ("latest", "unset"), f"{container}: {tag}"
        assert container.spec["imagePullPolicy"] == "IfNotPresent"


@pytest.mark.parametrize("of", ALL)
def test_daemons_are_probed_on_their_admin_port(of: str) -> None:
    for each in workloads(of):
        container = main_container(each)
        assert "admin" in [port["name"] for port in container["ports"]]
        gets = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
        assert {get["port"] for get in gets.values()} == {"admin"}
        assert gets["readiness"]["path"] == "/readyz"
        assert gets["liveness"]["path"] == "/livez"
        assert gets["startup"]["path"] == "/startupz"


@pytest.mark.parametrize("of", ALL)
def test_every_container_has_requests_and_limits(of: str) -> None:
    for container in containers(of):
        resources = container.spec["resources"]
        for kind in ("requests", "limits"):
            assert {"cpu", "memory"} <= resources[kind].keys(), f"{container}: {kind}"


@pytest.mark.parametrize("of", ALL)
def test_no_container_has_more_rights_than_it_needs(of: str) -> None:
    for container in containers(of):
        pod, own = container.pod["securityContext"], container.spec["securityContext"]
        assert (pod["runAsNonRoot"], pod["runAsUser"], pod["runAsGroup"]) == (True, 10001, 10001), str(container)
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"]["drop"] == ["ALL"]
        needs_locked_memory = of == "gpu-rdma-1p1d" and "router" not in container.workload
        assert own["capabilities"].get("add", []) == (["IPC_LOCK"] if needs_locked_memory else [])
        assert not {"hostNetwork", "hostPID", "hostIPC"} & container.pod.keys()
        assert "privileged" not in own
        assert not any("hostPath" in volume for volume in container.pod["volumes"])


@pytest.mark.parametrize(("of", "level"), [("kind-tcp", "restricted"), ("gpu-rdma-1p1d", "privileged")])
def test_the_namespace_enforces_the_strictest_level_that_its_pods_allow(of: str, level: str) -> None:
    (namespace,) = kinds(of, "Namespace")
    labels = namespace["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == level
    assert labels["pod-security.kubernetes.io/warn"] == "restricted"


@pytest.mark.parametrize("of", ALL)
def test_what_is_written_to_is_a_volume(of: str) -> None:
    for container in containers(of):
        volumes = {volume["name"]: volume for volume in container.pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container.spec["volumeMounts"]}
        assert "emptyDir" in mounts["/tmp"]
        if container.spec["name"] == "worker":
            assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
            assert "emptyDir" in mounts["/cache"]
        for volume in volumes.values():
            assert "sizeLimit" in volume.get("emptyDir", {"sizeLimit": ""}), f"{container}: {volume['name']}"


@pytest.mark.parametrize("of", ALL)
def test_nobody_gets_a_token_of_the_cluster(of: str) -> None:
    accounts = {account["metadata"]["name"]: account for account in kinds(of, "ServiceAccount")}
    for each in workloads(of):
        pod = pod_of(each)
        assert pod["automountServiceAccountToken"] is False
        assert accounts[pod["serviceAccountName"]]["automountServiceAccountToken"] is False


@pytest.mark.parametrize("of", ALL)
def test_no_variables_are_made_up_for_services(of: str) -> None:
    """Of a Service pdkv-router they would begin with PDKV_, and pdkv refuses such variables that it does not know."""
    assert [pod_of(each)["enableServiceLinks"] for each in workloads(of)] == [False] * 3


@pytest.mark.parametrize("of", ALL)
def test_a_pod_has_the_time_that_its_drain_takes(of: str) -> None:
    for each in workloads(of):
        pause_s = main_container(each)["lifecycle"]["preStop"]["sleep"]["seconds"]
        drain_s = configuration(of, role_of(each)).drain_timeout
        assert pod_of(each)["terminationGracePeriodSeconds"] >= pause_s + drain_s + CLOSING_S, role_of(each)


@pytest.mark.parametrize("of", ALL)
def test_a_node_can_be_drained_even_under_a_single_pod(of: str) -> None:
    budgets = {budget["metadata"]["name"]: budget["spec"] for budget in kinds(of, "PodDisruptionBudget")}
    for each in workloads(of):
        spec = budgets[each["metadata"]["name"]]
        assert spec["maxUnavailable"] == 1
        assert spec["selector"] == each["spec"]["selector"]


@pytest.mark.parametrize("of", ALL)
def test_stateful_sets_have_their_headless_service(of: str) -> None:
    services = {service["metadata"]["name"]: service["spec"] for service in kinds(of, "Service")}
    for each in kinds(of, "StatefulSet"):
        assert each["spec"]["podManagementPolicy"] == "Parallel"
        service = services[each["spec"]["serviceName"]]
        assert service["clusterIP"] == "None"
        assert service["publishNotReadyAddresses"] is True
        assert service["selector"] == each["spec"]["selector"]["matchLabels"]


@pytest.mark.parametrize("of", ALL)
def test_what_has_no_keys_spells_insecure(of: str) -> None:
    keyed_workers = of in (WITH_KEYS, "gpu-rdma-1p1d")
    for each in workloads(of):
        config, container = configuration(of, role_of(each)), main_container(each)
        has_keys = keyed_workers and role_of(each) != "router"
        assert config.insecure is not has_keys
        assert ("--insecure" in container["args"]) is not has_keys, "spelt out where it is seen, not in a file"
        if has_keys:
            assert environment(container)["PDKV_CONTROL_KEYS"] == str(config.control_keys)
            _expect_keys_for_the_group_alone(pod_of(each), str(config.control_keys))
    assert ("pdkv-control-keys" in str(objects(of))) is keyed_workers, "else pods would wait for a Secret"


@pytest.mark.parametrize("of", ALL)
def test_all_stand_behind_a_default_deny(of: str) -> None:
    deny = next(p["spec"] for p in kinds(of, "NetworkPolicy") if p["metadata"]["name"] == "pdkv-default-deny")
    assert sorted(deny["policyTypes"]) == ["Egress", "Ingress"]
    assert "ingress" not in deny
    assert "egress" not in deny
    for each in workloads(of):
        labels = each["spec"]["template"]["metadata"]["labels"]
        assert deny["podSelector"]["matchLabels"].items() <= labels.items()


def _expect_keys_for_the_group_alone(pod: Object, folder: str) -> None:
    (container,) = pod["containers"]
    (mount,) = (mount for mount in container["volumeMounts"] if mount["mountPath"] == folder)
    assert mount["readOnly"] is True
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == mount["name"])
    assert volume["secret"] == {"secretName": "pdkv-control-keys", "defaultMode": 0o440}
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
