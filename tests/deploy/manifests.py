"""The manifests as they are applied: overlays rendered by kubectl, the base read from its files."""

import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
WITH_KEYS = "kind-tcp with keys"
"""The overlay, once the lines that are commented out in it are not."""
OVERLAYS = ("kind-tcp", WITH_KEYS, "gpu-rdma-1p1d")
BASE = "base"
"""Its files as they lie there, so that something is checked where there is no kubectl."""
ALL = (BASE, *OVERLAYS)
OLDEST_KUBECTL = (1, 28)
ROLES = ("prefill", "decode", "router")

Object = dict[str, Any]


class Container(NamedTuple):
    """A container with the pod that it is in."""

    workload: str
    pod: Object
    spec: Object
    is_init: bool

    def __str__(self) -> str:
        return f"{self.workload}/{self.spec['name']}"


def objects(of: str) -> list[Object]:
    """All objects of an overlay, or of the base."""
    return _from_files() if of == BASE else _rendered(of)


def kinds(of: str, *wanted: str) -> list[Object]:
    return [each for each in objects(of) if each["kind"] in wanted]


def workloads(of: str) -> list[Object]:
    """What has pods: StatefulSets and Deployments."""
    found = kinds(of, "StatefulSet", "Deployment")
    assert sorted(role_of(each) for each in found) == sorted(ROLES), "one a role"
    return found


def role_of(each: Object) -> str:
    return str(each["metadata"]["labels"]["app.kubernetes.io/component"])


def workload(of: str, role: str) -> Object:
    return next(each for each in workloads(of) if role_of(each) == role)


def pod_of(each: Object) -> Object:
    spec: Object = each["spec"]["template"]["spec"]
    return spec


def main_container(each: Object) -> Object:
    """The one that is the daemon."""
    (container,) = pod_of(each)["containers"]
    return dict(container)


def containers(of: str) -> Iterator[Container]:
    for each in workloads(of):
        pod = pod_of(each)
        for kind in ("initContainers", "containers"):
            for spec in pod.get(kind, []):
                yield Container(each["metadata"]["name"], pod, spec, kind == "initContainers")


def worker_settings(of: str) -> str:
    """The workers' pdkv.yaml, as the overlay gives it."""
    if of == BASE:
        return (DEPLOY / "base/pdkv.yaml").read_text(encoding="utf-8")
    (found,) = kinds(of, "ConfigMap")
    return str(found["data"]["pdkv.yaml"])


def kubectl() -> str:
    """The path of a kubectl that is new enough; skips the test, saying so, where there is none."""
    found = shutil.which("kubectl")
    if found is None:
        pytest.skip("no kubectl: overlays are neither rendered nor validated here, only the base's files")
    told = subprocess.run([found, "version", "--client", "-o", "json"], capture_output=True, text=True, check=True)
    version = json.loads(told.stdout)["clientVersion"]
    number = (int(version["major"]), int(re.match(r"\d+", version["minor"]).group()))  # type: ignore[union-attr]
    if number < OLDEST_KUBECTL:
        pytest.skip(f"kubectl {number[0]}.{number[1]} is older than 1.28: overlays are not rendered here")
    return found


def rendered_with(folder: Path, *components: str) -> list[Object]:
    """All objects of ``kind-tcp`` with components, by an overlay in ``folder``."""
    overlay = os.path.relpath(DEPLOY / "overlays/kind-tcp", folder)
    roots = [os.path.relpath(DEPLOY / "components" / each, folder) for each in components]
    (folder / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nnamespace: pdkv\n"
        f"resources: [{overlay}]\ncomponents: [{', '.join(roots)}]\n"
    )
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return [each for each in yaml.safe_load_all(done.stdout) if each]


@functools.cache
def _rendered(overlay: str) -> list[Object]:
    with tempfile.TemporaryDirectory() as folder:
        deploy = Path(shutil.copytree(DEPLOY, Path(folder) / "deploy"))
        if overlay == WITH_KEYS:
            _uncomment(deploy / "overlays/kind-tcp/kustomization.yaml")
        path = str(deploy / "overlays" / overlay.removesuffix(" with keys"))
        done = subprocess.run([kubectl(), "kustomize", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, f"kustomize warns: {done.stderr}"
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def _uncomment(kustomization: Path) -> None:
    commented = "# components:\n#   - ../../components/keys\n"
    text = kustomization.read_text(encoding="utf-8")
    assert commented in text
    kustomization.write_text(text.replace(commented, commented.replace("# ", "")), encoding="utf-8")


@functools.cache
def _from_files() -> list[Object]:
    listed = yaml.safe_load((DEPLOY / "base/kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    return [each for name in listed for each in yaml.safe_load_all((DEPLOY / "base" / name).read_text()) if each]
