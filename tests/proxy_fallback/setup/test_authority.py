"""The CA, as real verifiers see what mitmproxy signs with it."""

from __future__ import annotations

import datetime
import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from halton_meter.providers.registry import Registry
from proxy_fallback.setup import authority
from proxy_fallback.setup.authority import (
    AuthorityError,
    accepted_hosts,
    constraint_names,
    ensure_authority,
    read_authority,
)

NOW = datetime.datetime.now(datetime.UTC)
YEAR = datetime.timedelta(days=365)
HOSTS = ("api.anthropic.com", "*.openai.azure.com", "llm.example.com:8443", "localhost")


def issue(folder: Path, host: str, into: Path) -> Path:
    """A leaf for a host, made by mitmproxy's own certificate store; chain and key in one file."""
    from cryptography.hazmat.primitives import serialization
    from mitmproxy.certs import CertStore

    store = CertStore.from_store(folder, "mitmproxy", 2048)
    entry = store.get_cert(host, [x509.DNSName(host)], None)
    file = into / f"{host}.pem"
    key = entry.privatekey.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    file.write_bytes(entry.cert.to_pem() + key)
    return file


class Server:
    """A TLS server on loopback that answers every request with 200."""

    def __init__(self, leaf: Path) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(leaf)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                raw, _ = self._listener.accept()
                with self._context.wrap_socket(raw, server_side=True) as tls:
                    tls.recv(65536)
                    tls.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            except ssl.SSLError:
                continue
            except OSError:
                if self._listener.fileno() < 0:
                    return

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("home") / "proxy-ca"
    ensure_authority(made, HOSTS, NOW)
    return made


@pytest.fixture(params=["api.anthropic.com", "mine.openai.azure.com", "bank.example"])
def host(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(folder: Path, host: str, tmp_path: Path) -> Iterator[Server]:
    running = Server(issue(folder, host, tmp_path))
    yield running
    running.close()


def permitted(host: str) -> bool:
    return host != "bank.example"


def test_openssl_accepts_provider_hosts_and_no_other(
    folder: Path, host: str, tmp_path: Path
) -> None:
    leaf = issue(folder, host, tmp_path)
    done = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-CAfile", folder / "mitmproxy-ca-cert.pem", leaf],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) is permitted(host), done.stderr
    if not permitted(host):
        assert "permitted subtree violation" in done.stderr


def test_python_accepts_provider_hosts_and_no_other(
    folder: Path, host: str, server: Server
) -> None:
    context = ssl.create_default_context(cafile=str(folder / "mitmproxy-ca-cert.pem"))
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=120)
    if permitted(host):
        context.wrap_socket(raw, server_hostname=host).close()
    else:
        with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree violation"):
            context.wrap_socket(raw, server_hostname=host)


def test_curl_accepts_provider_hosts_and_no_other(folder: Path, host: str, server: Server) -> None:
    done = subprocess.run(
        [
            *("curl", "-s", "--noproxy", "*", "--cacert", folder / "mitmproxy-ca-cert.pem"),
            *("--resolve", f"{host}:{server.port}:127.0.0.1", f"https://{host}:{server.port}/"),
        ],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
        timeout=120,
        check=False,
    )
    assert (done.stdout == "ok") is permitted(host)
    assert done.returncode == (0 if permitted(host) else 60)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_node_accepts_provider_hosts_and_no_other(folder: Path, host: str, server: Server) -> None:
    script = (
        "require('tls').connect({host:'127.0.0.1',port:+process.argv[1],"
        "servername:process.argv[2]},function(){console.log('ok');this.destroy()})"
        ".on('error',e=>console.log(e.message))"
    )
    environment = {
        "PATH": os.environ["PATH"],
        "NODE_EXTRA_CA_CERTS": str(folder / "mitmproxy-ca-cert.pem"),
    }
    done = subprocess.run(
        ["node", "-e", script, str(server.port), host],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == ("ok" if permitted(host) else "permitted subtree violation")


def test_an_address_is_never_permitted(folder: Path, tmp_path: Path) -> None:
    import ipaddress

    from mitmproxy.certs import CertStore

    store = CertStore.from_store(folder, "mitmproxy", 2048)
    address = x509.IPAddress(ipaddress.ip_address("192.0.2.1"))
    leaf = tmp_path / "leaf.pem"
    leaf.write_bytes(store.get_cert("192.0.2.1", [address], None).cert.to_pem())
    done = subprocess.run(
        ["openssl", "verify", "-CAfile", folder / "mitmproxy-ca-cert.pem", leaf],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "excluded subtree violation" in done.stderr


def test_every_built_in_provider_host_is_permitted(tmp_path: Path) -> None:
    hosts = Registry().hosts()
    made = ensure_authority(tmp_path, hosts, NOW)
    assert all(made.permits(host) for host in hosts)
    assert not any(made.permits(host) for host in ("amazonaws.com", "googleapis.com", "x.ai", ""))


def test_constraints_are_bare_names_without_ports_addresses_or_names_below_others() -> None:
    hosts = ("*.a.example", "b.a.example", "C.example:8080", "10.0.0.1:80", "[::1]:80", "::1")
    assert constraint_names(hosts) == ("a.example", "c.example")


def test_more_hosts_than_verifiers_compare_are_refused() -> None:
    with pytest.raises(AuthorityError, match="more than a certificate can hold"):
        constraint_names(f"h{n}.example" for n in range(authority.HOSTS_MAX + 1))


def test_the_key_is_its_owners_from_the_first_byte_and_the_certificate_everybodys(
    tmp_path: Path,
) -> None:
    before = os.umask(0)
    try:
        made = ensure_authority(tmp_path / "new", HOSTS, NOW)
    finally:
        os.umask(before)
    assert made.key_file.stat().st_mode & 0o777 == 0o600
    assert made.certificate_file.stat().st_mode & 0o777 == 0o644
    assert made.folder.stat().st_mode & 0o777 == 0o700
    made.key_file.chmod(0o644)
    ensure_authority(tmp_path / "new", HOSTS, NOW)
    assert made.key_file.stat().st_mode & 0o777 == 0o600


def test_a_second_call_changes_nothing(tmp_path: Path) -> None:
    first = ensure_authority(tmp_path, HOSTS, NOW)
    content = first.key_file.read_bytes()
    assert ensure_authority(tmp_path, HOSTS[:2], NOW + YEAR) == first
    assert first.key_file.read_bytes() == content


def test_it_lasts_between_one_year_and_two(tmp_path: Path) -> None:
    made = ensure_authority(tmp_path, HOSTS, NOW)
    assert made.valid_at(NOW)
    assert made.valid_at(NOW + YEAR)
    assert not made.valid_at(NOW + 2 * YEAR + datetime.timedelta(days=1))


def test_who_trusts_the_certificate_of_before_the_renewal_accepts_what_is_signed_after(
    tmp_path: Path,
) -> None:
    old = ensure_authority(tmp_path / "ca", HOSTS, NOW - 1.9 * YEAR)
    trusted = tmp_path / "old.pem"
    trusted.write_bytes(old.certificate_file.read_bytes())
    new = ensure_authority(tmp_path / "ca", (*HOSTS, "added.example"), NOW)
    assert new.sha256 != old.sha256
    assert new.common_name == old.common_name
    kept = issue(tmp_path / "ca", "api.anthropic.com", tmp_path)
    added = issue(tmp_path / "ca", "added.example", tmp_path)
    verified = [
        subprocess.run(
            ["openssl", "verify", "-CAfile", file, leaf],
            capture_output=True,
            check=False,
        ).returncode
        for file, leaf in ((trusted, kept), (trusted, added), (new.certificate_file, added))
    ]
    assert [code == 0 for code in verified] == [True, False, True]


def test_only_hosts_that_every_truster_accepts_are_answered_for(tmp_path: Path) -> None:
    assert accepted_hosts(tmp_path, HOSTS, NOW) == ()
    made = ensure_authority(tmp_path, HOSTS, NOW)
    assert accepted_hosts(tmp_path, HOSTS, NOW) == HOSTS
    (tmp_path / authority.TRUSTED_NAME).write_bytes(made.certificate_file.read_bytes())
    more = (*HOSTS, "added.example")
    ensure_authority(tmp_path, more, NOW)
    assert accepted_hosts(tmp_path, more, NOW) == HOSTS
    assert accepted_hosts(tmp_path, more, NOW + 3 * YEAR) == ()
    made.certificate_file.write_text("not a certificate")
    assert accepted_hosts(tmp_path, more, NOW) == ()


def test_a_key_made_anew_is_not_used_with_clients_that_trust_the_lost_one(tmp_path: Path) -> None:
    made = ensure_authority(tmp_path, HOSTS, NOW)
    (tmp_path / authority.TRUSTED_NAME).write_bytes(made.certificate_file.read_bytes())
    made.key_file.unlink()
    assert ensure_authority(tmp_path, HOSTS, NOW).key_id != made.key_id
    assert accepted_hosts(tmp_path, HOSTS, NOW) == ()


def test_mitmproxys_own_unconstrained_ca_is_replaced_with_a_new_key(tmp_path: Path) -> None:
    from mitmproxy.certs import CertStore

    CertStore.create_store(tmp_path, "mitmproxy", 2048)
    assert ensure_authority(tmp_path, HOSTS, NOW).names is not None
    assert b"BEGIN EC PRIVATE KEY" in (tmp_path / authority.KEY_NAME).read_bytes()


@pytest.mark.parametrize("name", [authority.KEY_NAME, authority.CERTIFICATE_NAME])
def test_half_a_ca_is_made_whole(tmp_path: Path, name: str) -> None:
    ensure_authority(tmp_path, HOSTS, NOW)
    (tmp_path / name).write_text("half a fi")
    mended = ensure_authority(tmp_path, HOSTS, NOW)
    assert read_authority(tmp_path) == mended
    assert b"PRIVATE KEY" in mended.key_file.read_bytes()


def test_a_folder_that_cannot_be_written_is_told_with_the_next_command(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AuthorityError, match="halton-meter init"):
        ensure_authority(tmp_path / "file" / "ca", HOSTS, NOW)


def test_two_at_once_agree_on_one_ca(tmp_path: Path) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(ensure_authority(tmp_path, HOSTS, NOW).sha256))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 8
