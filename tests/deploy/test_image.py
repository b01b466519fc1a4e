"""The Dockerfile: linted, in step with the package, and its health check asked about a real daemon. None is built."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pdkv
from pdkv.__main__ import main
from pdkv.daemons.config import ENV_PREFIX, ROLES, Address, DecodeConfig, PrefillConfig, RouterConfig
from tests.daemons.conftest import Daemon
from tests.deploy.manifests import OVERLAYS, ROOT, containers
from tests.http import HTTP

DOCKERFILE = ROOT / "docker/Dockerfile"
HEALTHCHECK = ROOT / "docker/healthcheck.py"
TEXT = DOCKERFILE.read_text(encoding="utf-8")
INSTRUCTIONS = re.sub(r"^\s*#.*\n", "", TEXT, flags=re.MULTILINE).replace("\\\n", " ")


def _lines(instruction: str) -> list[str]:
    return re.findall(rf"^{instruction} (.*)$", INSTRUCTIONS, flags=re.MULTILINE)


def _pins() -> dict[str, str]:
    lines = (ROOT / "docker/constraints.txt").read_text(encoding="utf-8").splitlines()
    return {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in lines if line and not line.startswith("#"))
    }


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [hadolint, "--failure-threshold", "style", str(DOCKERFILE)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(re.findall(r"hadolint ignore=(\S+)", TEXT)) == {"DL3008"}, "Debian's packages come without versions"


def test_images_run_as_nobody_in_particular_and_end_on_sigterm() -> None:
    assert _lines("USER") == ["10001:10001"] * 3
    assert _lines("ENTRYPOINT") == ['["tini", "--", "pdkv"]']
    assert _lines("STOPSIGNAL") == ["SIGTERM"]
    assert "latest" not in INSTRUCTIONS


def test_base_images_are_pinned() -> None:
    (base,) = [line.removeprefix("PYTHON_IMAGE=") for line in _lines("ARG") if line.startswith("PYTHON_IMAGE")]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?", base)
    stages = {line.partition(" AS ")[2] for line in _lines("FROM")}
    assert {line.partition(" AS ")[0] for line in _lines("FROM")} <= {"${PYTHON_IMAGE}", *stages}


def test_versions_agree() -> None:
    assert f"VERSION={pdkv.__version__}" in _lines("ARG")
    stages = {line.partition(" AS ")[2] for line in _lines("FROM")}
    for overlay in OVERLAYS:
        for container in containers(overlay):
            version, _, target = container.spec["image"].rpartition(":")[2].partition("-")
            assert version == pdkv.__version__
            assert target in stages
    torch = _pins()["torch"]
    assert f'"torch=={torch}+cpu"' in INSTRUCTIONS
    assert f"torch=={torch}" in (ROOT / "constraints-cpu.txt").read_text(encoding="utf-8")


def test_every_dependency_is_pinned_to_a_version_that_we_allow() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    pins = _pins()
    for text in [*wanted, *extras["ucx"], *extras["engine"], *extras["serve"], *extras["otel"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_variables_of_the_image_are_known_to_pdkv() -> None:
    known = {ENV_PREFIX + name.upper() for role in ROLES for name in role.model_fields}
    assert set(re.findall(r"\b(PDKV_[A-Z_]+)=", " ".join(_lines("ENV")))) <= known


def test_the_build_context_holds_what_is_copied_and_little_else() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {path for line in _lines("COPY") if not line.startswith("--from") for path in line.split()[:-1]}
    assert copied == allowed
    assert all((ROOT / path).exists() for path in copied)


def _healthcheck(**env: str) -> int:
    return subprocess.run([sys.executable, "-I", str(HEALTHCHECK)], env=env, check=False, timeout=60).returncode


def test_the_health_check_asks_a_daemon_whether_it_lives() -> None:
    router = Daemon(
        main, "router", "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--prefill=http://127.0.0.1:1",
        "--decode=http://127.0.0.1:1",
    )  # fmt: skip
    try:
        admin = str(router.wait_for_event("listening")["admin"])
        assert HTTP.get(f"http://{admin}/readyz").status_code == 503
        assert _healthcheck(PDKV_ADMIN_LISTEN=admin) == 0, "a router without workers is not ready, but lives"
    finally:
        router.kill()
    assert _healthcheck(PDKV_ADMIN_LISTEN=admin) == 1


def test_the_health_check_knows_where_the_daemons_listen() -> None:
    ports = {
        Address(role.model_fields["admin_listen"].default).port for role in (RouterConfig, PrefillConfig, DecodeConfig)
    }
    (listed,) = re.findall(r"^ADMIN_PORTS = \(([\d, ]+)\)$", HEALTHCHECK.read_text(), flags=re.MULTILINE)
    assert {int(port) for port in listed.split(",")} == ports
