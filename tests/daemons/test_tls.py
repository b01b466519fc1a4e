"""The router's certificate: what files it takes, who sees which, and a router behind it."""

import asyncio
import datetime
import json
import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec

from pdkv.bench import http_clients
from pdkv.bench.serve_load import Load, Question
from pdkv.daemons.config import RouterConfig, load
from pdkv.daemons.tls import Certificate, shown
from pdkv.errors import ConfigError
from tests.daemons.conftest import Daemon, Fleet, wait_until
from tests.http import HTTP

HOST = "127.0.0.1"


class Files(NamedTuple):
    """A certificate of ``HOST``, and who signed it."""

    ca: trustme.CA
    chain: Path
    key: Path

    def renew(self, *, key: bool = True, until: datetime.datetime | None = None) -> None:
        issued = self.ca.issue_cert(HOST, not_after=until)
        self.chain.write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
        if key:
            self.key.write_bytes(issued.private_key_pem.bytes())

    @property
    def trusting(self) -> ssl.SSLContext:
        """A client's, which trusts this CA alone."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.ca.configure_trust(context)
        return context

    def flags(self) -> tuple[str, str]:
        return f"--tls-cert={self.chain}", f"--tls-key={self.key}"


def made(folder: Path) -> Files:
    files = Files(trustme.CA(), folder / "tls.crt", folder / "tls.key")
    files.renew()
    return files


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return made(tmp_path)


def seen(server: ssl.SSLContext, client: ssl.SSLContext) -> int:
    """The serial number of the certificate that a client gets."""
    return int(shown(server, client, HOST)["serialNumber"], 16)


def test_who_connects_after_a_renewal_sees_the_new_certificate(files: Files) -> None:
    certificate = Certificate(files.chain, files.key)
    first = seen(certificate.context, files.trusting)
    assert seen(certificate.context, files.trusting) == first
    for _ in range(2):
        files.renew()
        renewed = seen(certificate.context, files.trusting)
        assert renewed != first
        assert seen(certificate.context, files.trusting) == renewed
        first = renewed


def test_files_that_became_bad_leave_the_certificate_before_them(files: Files) -> None:
    certificate = Certificate(files.chain, files.key)
    first = seen(certificate.context, files.trusting)
    files.renew(key=False)  # half of a renewal: the old key beside the new certificate
    assert seen(certificate.context, files.trusting) == first
    files.key.unlink()
    assert seen(certificate.context, files.trusting) == first
    files.renew()
    assert seen(certificate.context, files.trusting) != first


@pytest.mark.parametrize("days", [-3, 0, 3, 400])
def test_when_it_ends_is_told_whether_that_is_past_or_not(files: Files, days: int) -> None:
    certificate = Certificate(files.chain, files.key)
    until = datetime.datetime.now(datetime.UTC).replace(microsecond=0) + datetime.timedelta(days=days)
    files.renew(until=until)
    assert certificate.ends_at() == until.timestamp()
    if days < 0:
        with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
            seen(certificate.context, files.trusting)


def test_a_certificate_that_is_for_clients_alone_is_refused(files: Files) -> None:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 7, now, now + datetime.timedelta(days=1))
    usage = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CLIENT_AUTH])
    made = builder.add_extension(usage, critical=True).sign(key, hashes.SHA256())
    files.chain.write_bytes(made.public_bytes(form.Encoding.PEM))
    files.key.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    with pytest.raises(ConfigError, match="clients refuse the certificate in .*purpose"):
        Certificate(files.chain, files.key)


def test_old_versions_of_tls_are_refused(files: Files) -> None:
    client = files.trusting
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        client.minimum_version, client.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        seen(Certificate(files.chain, files.key).context, client)


def test_files_that_are_no_certificate_and_key_are_refused_by_name(files: Files, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = made(tmp_path / "other")
    rubbish, none = tmp_path / "rubbish", tmp_path / "none"
    rubbish.write_text("no PEM")
    for chain, key, problem in (
        (none, files.key, f"cannot read {none}: No such file"),
        (files.chain, none, f"cannot read {none}: No such file"),
        (files.chain, tmp_path, f"cannot read {tmp_path}: Is a directory"),
        (files.chain, other.key, f"key in {other.key} is not that of the certificate in {files.chain}"),
        (rubbish, files.key, f"{rubbish} and {files.key} are no certificate and key"),
        (files.chain, rubbish, f"{files.chain} and {rubbish} are no certificate and key"),
        (files.key, files.chain, "are no certificate and key"),
    ):
        with pytest.raises(ConfigError, match=problem):
            Certificate(chain, key)


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_a_password(files: Files) -> None:
    plain = form.load_pem_private_key(files.key.read_bytes(), None)
    locked = form.BestAvailableEncryption(b"secret")
    files.key.write_bytes(plain.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, locked))
    with pytest.raises(ConfigError, match="key is encrypted"):
        Certificate(files.chain, files.key)


@pytest.mark.parametrize(("given", "lacks"), [("tls_cert", "tls_key"), ("tls_key", "tls_cert")])
def test_a_certificate_and_its_key_come_together(tmp_path: Path, given: str, lacks: str) -> None:
    workers = {"prefill_urls": ["http://p:1"], "decode_urls": ["http://d:1"]}
    with pytest.raises(ConfigError, match=f"{given} needs {lacks}"):
        load(RouterConfig, {**workers, given: tmp_path / "file"})


# ---- a router


@pytest.fixture(scope="module")
def shared_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return made(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def workers(shared_fleet: Fleet, checkpoint: Path) -> tuple[Daemon, Daemon]:
    return shared_fleet.worker("prefill", checkpoint, ready=True), shared_fleet.worker("decode", checkpoint, ready=True)


@pytest.fixture(scope="module")
def router(shared_fleet: Fleet, workers: tuple[Daemon, Daemon], shared_files: Files) -> Daemon:
    prefill, decode = workers
    router = shared_fleet.router([prefill], [decode], *shared_files.flags(), ready=False)
    wait_until(lambda: HTTP.get(router.admin + "/readyz").status_code == 200)
    return router


@pytest.fixture
def client(shared_files: Files) -> Iterator[httpx.Client]:
    with httpx.Client(verify=shared_files.trusting, trust_env=False) as client:
        yield client


def test_the_openai_client_is_answered_over_tls(router: Daemon, client: httpx.Client) -> None:
    assert router.url.startswith("https://")
    with openai.OpenAI(base_url=router.url + "/v1", api_key="any", http_client=client, max_retries=0) as asking:
        whole = asking.completions.create(model="link-chasing", prompt="n1>n2 n1", max_tokens=4, seed=1)
        assert whole.choices[0].text == "n0 n1 n2 n3"
        chunks = list(asking.completions.create(model="link-chasing", prompt=[1], max_tokens=4, seed=1, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == "n0 n1 n2 n3"


def test_the_metrics_tell_when_the_certificate_ends(router: Daemon, shared_files: Files) -> None:
    told = re.search(r"^pdkv_router_certificate_expiry_timestamp_seconds\S* (\S+)$", metrics(router), re.MULTILINE)
    assert told
    assert float(told[1]) == Certificate(shared_files.chain, shared_files.key).ends_at()


def metrics(router: Daemon) -> str:
    return HTTP.get(router.admin + "/metrics").text


def test_neither_strangers_to_the_ca_nor_plain_http_are_answered(router: Daemon, client: httpx.Client) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(router.url + "/health", verify=ssl.create_default_context(), trust_env=False)
    with pytest.raises(httpx.RemoteProtocolError):
        HTTP.get(router.url.replace("https://", "http://") + "/health")
    assert client.get(router.url + "/health").status_code == 200


def test_a_command_trusts_the_authorities_of_ssl_cert_file(router: Daemon, shared_files: Files, tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_bytes(shared_files.ca.cert_pem.bytes())
    trusting = top(router, SSL_CERT_FILE=str(authority))
    assert trusting["router"]["ready"]
    assert [row["state"] for row in trusting["workers"]] == ["ready", "ready"]
    assert "certificate verify failed" in top(router)["router"]["problem"]


def top(router: Daemon, **environment: str) -> dict[str, Any]:
    """Of a process of its own, since the client makes its trust when it is imported."""
    command = [sys.executable, "-m", "pdkv", "top", "--router", router.url, "--once", "--json"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PDKV_", "SSL_"))}
    told = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=False)
    return dict(json.loads(told.stdout))


def test_bench_serve_asks_over_tls(router: Daemon, shared_files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    with shared_files.ca.cert_pem.tempfile() as authority:
        monkeypatch.setenv("SSL_CERT_FILE", authority)
        load = Load(concurrency=1, requests=1, input_tokens=2, output_tokens=4)
        (answer,), _ = asyncio.run(http_clients.run(router.url, load, [Question((1, 2))] * 2, 30, lambda _: None))
    assert (answer.error, len(answer.tokens)) == ("", 4)


def test_a_router_ends_at_once_beside_connections_that_idle(
    fleet: Fleet, workers: tuple[Daemon, Daemon], files: Files
) -> None:
    prefill, decode = workers
    router = fleet.router([prefill], [decode], *files.flags(), ready=False)
    with httpx.Client(verify=files.trusting, trust_env=False) as client:
        wait_until(lambda: client.get(router.url + "/health").status_code == 200)
        router.process.send_signal(signal.SIGTERM)
        assert router.process.wait(timeout=20) == 143
