"""Every overlay renders, and all that comes out is what Kubernetes 1.30 and 1.34 accept, to the last field name."""

import functools
import subprocess
import sys
from collections.abc import Iterator

import kubernetes_validate
import pytest
from kubernetes_validate import utils

from tests.deploy.manifests import ALL, DEPLOY, OVERLAYS, ROOT, kinds, objects

VERSIONS = ("1.30", "1.34")


@pytest.fixture(autouse=True)
def _schemas_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "schema_contents", _schema)


_schema = functools.cache(utils.schema_contents)


def _complaints(version: str, *of: dict) -> Iterator[str]:
    """What strict validation finds; a kind that it has no schema for is an error here, not a warning."""
    for each in of:
        name = f"{each.get('kind')}/{each.get('metadata', {}).get('name')}"
        try:
            validated = kubernetes_validate.validate(each, version, strict=True)
        except kubernetes_validate.ValidationError as exc:
            yield f"{name}: {'.'.join(map(str, exc.path))}: {exc.message}"
        except kubernetes_validate.SchemaNotFoundError as exc:
            yield f"{name}: {exc.message}"
        else:
            assert validated == version, "there is a schema of just this version"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("of", ALL)
def test_every_object_is_valid(of: str, version: str) -> None:
    assert list(_complaints(version, *objects(of))) == []


def test_validation_notices_a_misspelt_field_and_an_unknown_kind() -> None:
    router = next(each for each in objects("base") if each["kind"] == "Deployment")
    wrong = {**router, "spec": {**router["spec"], "replica": 2}}
    assert "replica" in next(_complaints("1.34", wrong))
    assert "schema" in next(_complaints("1.34", {**router, "kind": "Deploiment"}))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_a_whole_deployment_in_one_namespace(overlay: str) -> None:
    found = objects(overlay)
    (namespace,) = kinds(overlay, "Namespace")
    assert {each["metadata"].get("namespace", namespace["metadata"]["name"]) for each in found} == {
        namespace["metadata"]["name"]
    }
    counted = {kind: len(kinds(overlay, kind)) for kind in {each["kind"] for each in found}}
    assert counted == {
        "Namespace": 1,
        "ServiceAccount": 3,
        "ConfigMap": 1,
        "StatefulSet": 2,
        "Deployment": 1,
        "Service": 3,
        "PodDisruptionBudget": 3,
        "NetworkPolicy": 5,
    }


def test_yaml_is_clean() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "yamllint", "--strict", "-c", str(ROOT / ".yamllint.yaml"), str(DEPLOY)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
