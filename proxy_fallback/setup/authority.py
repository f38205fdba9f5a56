"""The certificate authority of the local proxy: one key, of one user, for provider hosts only.

`init` and the proxy's worker make it (`ensure_authority`). mitmproxy signs with it and names its
files; clients trust it through variables (variables.py) and trust stores (trust.py). Whoever steals
the key can impersonate provider hosts only: the certificate has critical name constraints, which
permit those and exclude every IP address. OpenSSL, Go and rustls enforce them on a root, Java does
not (both tried); macOS should (not tried). A file is replaced as a whole, never edited.

Renewing keeps the key and the name. A program that trusts the old certificate therefore accepts
leaves signed later, until the old one expires, but only for the hosts that the old one permits:
`accepted_hosts` lists them.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from proxy_fallback.setup.changes import ChangeError, write_whole

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPublicKeyTypes

# Apple refuses leaves that outlive 825 days; the root stays well below, and is renewed in time.
LIFETIME = datetime.timedelta(days=730)
RENEW_BEFORE = datetime.timedelta(days=60)
# A clock that was ahead when the CA was made must not make it "not yet valid" later.
CLOCK_SKEW = datetime.timedelta(days=2)
# Verifiers bound (names x constraints); Go and webpki stop at 250,000 comparisons.
HOSTS_MAX = 2048
PEM_BYTES_MAX = 1024 * 1024

KEY_NAME = "mitmproxy-ca.pem"
CERTIFICATE_NAME = "mitmproxy-ca-cert.pem"
# A copy of the certificate that is in trust stores: what uninstall removes from them.
TRUSTED_NAME = "trusted-ca-cert.pem"
ORGANIZATION = "Halton Meter"


class AuthorityError(ChangeError):
    """The CA cannot be read or written; the problem names the file and the fix."""


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA on disk. `names` are the permitted DNS names, each with all below it.

    `names` is None when the certificate permits everything (one that mitmproxy made by itself).
    `key_id` names its key: a renewed certificate has the same.
    `sha1` and `sha256` are the certificate's fingerprints, upper-case hex.
    """

    folder: Path
    common_name: str
    key_id: str
    names: tuple[str, ...] | None
    not_before: datetime.datetime
    not_after: datetime.datetime
    sha1: str
    sha256: str

    @property
    def certificate_file(self) -> Path:
        """The certificate alone, PEM: what clients trust."""
        return self.folder / CERTIFICATE_NAME

    @property
    def key_file(self) -> Path:
        """Private key and certificate, PEM, mode 0600: what mitmproxy signs with."""
        return self.folder / KEY_NAME

    def permits(self, host: str) -> bool:
        """Whether a leaf for a host (or for "*.suffix") is valid under this certificate."""
        if self.names is None:
            return True
        name = _bare(host)
        return any(name == each or name.endswith("." + each) for each in self.names)

    def valid_at(self, now: datetime.datetime) -> bool:
        """Whether the certificate is in its lifetime."""
        return self.not_before <= now < self.not_after


def constraint_names(hosts: Iterable[str]) -> tuple[str, ...]:
    """The DNS names to permit for hosts as the registry gives them ("*.x", "h:8080", "h").

    A constraint covers every name below it (RFC 5280, 4.2.1.10), so subdomains of a listed name are
    left out. IP addresses are never permitted: the proxy does not meter them.
    """
    names = set()
    for host in hosts:
        name = _bare(host)
        if name and not _is_address(name):
            names.add(name)
    kept = {name for name in names if not _covered_by_parent(name, names)}
    if len(kept) > HOSTS_MAX:
        raise AuthorityError(
            f"{len(kept)} provider hosts are more than a certificate can hold ({HOSTS_MAX})",
            "remove hosts from config.toml",
        )
    return tuple(sorted(kept))


def _bare(host: str) -> str:
    name = host.lower().removeprefix("*.")
    return re.sub(r"(?<=[^:]):\d+$", "", name).rstrip(".")


def _covered_by_parent(name: str, names: set[str]) -> bool:
    labels = name.split(".")
    return any(".".join(labels[at:]) in names for at in range(1, len(labels)))


def _is_address(name: str) -> bool:
    import ipaddress

    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def ensure_authority(folder: Path, hosts: Iterable[str], now: datetime.datetime) -> Authority:
    """The CA in `folder`; it is made if missing, and renewed if needed.

    It is renewed, with the same key, when it expires within `RENEW_BEFORE` or lacks one of `hosts`
    (as `registry.Registry.hosts` gives them). It is replaced, with a new key, when it is not ours
    or cannot be read. `now` has a time zone. Raises AuthorityError.
    """
    names = constraint_names(hosts)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(folder):
            found = _readable(folder)
            if found is not None and _is_usable(found, names, now):
                found.key_file.chmod(0o600)
                return found
            _make(folder, names, now, None if found is None else _key(folder))
    except OSError as error:
        raise AuthorityError(
            f"the CA in {folder} cannot be written: {error.strerror or error}",
            f"ls -ld {shlex.quote(str(folder))}, make it writable, then: halton-meter init",
        ) from None
    made = read_authority(folder)
    assert made is not None
    return made


def read_authority(folder: Path, name: str = CERTIFICATE_NAME) -> Authority | None:
    """The CA whose certificate is `name` in `folder`, None without one. Raises AuthorityError."""
    file = folder / name
    try:
        raw = _read(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise AuthorityError(
            f"{file} cannot be read: {error.strerror or error}",
            f"ls -l {shlex.quote(str(file))}, make it readable, then: halton-meter init",
        ) from None
    try:
        return _described(folder, _certificate(raw))
    except ValueError:
        raise AuthorityError(f"{file} is not a certificate", "halton-meter init") from None


def accepted_hosts(folder: Path, hosts: Iterable[str], now: datetime.datetime) -> tuple[str, ...]:
    """Those of `hosts` that the proxy can decrypt without breaking a client that trusts its CA.

    The CA must be valid now and still have the key of the certificate in trust stores, and both
    certificates must permit the host. All other hosts must be tunnelled raw; without a CA, all.
    """
    try:
        current = read_authority(folder)
        trusted = read_authority(folder, TRUSTED_NAME) or current
    except AuthorityError:
        return ()
    if current is None or trusted is None:
        return ()
    if not (current.valid_at(now) and trusted.valid_at(now) and current.key_id == trusted.key_id):
        return ()
    return tuple(host for host in hosts if current.permits(host) and trusted.permits(host))


# --- reading and writing ------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: two commands that start at once must not make two keys."""
    import fcntl

    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(file: Path) -> bytes:
    with file.open("rb") as opened:
        raw = opened.read(PEM_BYTES_MAX + 1)
    if len(raw) > PEM_BYTES_MAX:
        raise AuthorityError(
            f"{file} is larger than {PEM_BYTES_MAX} bytes, so it is not our certificate",
            "halton-meter init",
        )
    return raw


def _certificate(raw: bytes) -> x509.Certificate:
    from cryptography import x509

    return x509.load_pem_x509_certificate(raw)


def _key(folder: Path) -> ec.EllipticCurvePrivateKey | None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_read(folder / KEY_NAME), None)
    except (OSError, ValueError, TypeError):
        return None
    return key if isinstance(key, ec.EllipticCurvePrivateKey) else None


def _readable(folder: Path) -> Authority | None:
    """The CA in the folder if it is complete and ours: both files, one key, name constraints."""
    try:
        found = read_authority(folder)
        if found is None or found.names is None:
            return None
        certificate = _certificate(_read(folder / KEY_NAME))
        key = _key(folder)
    except (AuthorityError, OSError, ValueError):
        return None
    if key is None or key.public_key() != certificate.public_key():
        return None
    return found if found.sha256 == _fingerprint(certificate, "sha256") else None


def _is_usable(found: Authority, names: tuple[str, ...], now: datetime.datetime) -> bool:
    lasts = found.not_before <= now < found.not_after - RENEW_BEFORE
    return lasts and all(found.permits(name) for name in names)


def _public(certificate: x509.Certificate) -> CertificateIssuerPublicKeyTypes:
    from typing import cast

    return cast("CertificateIssuerPublicKeyTypes", certificate.public_key())


def _fingerprint(certificate: x509.Certificate, algorithm: str) -> str:
    from cryptography.hazmat.primitives import hashes

    # macOS's `security` names certificates by SHA-1; nothing relies on its strength.
    chosen = hashes.SHA1() if algorithm == "sha1" else hashes.SHA256()  # noqa: S303 - as above
    return certificate.fingerprint(chosen).hex().upper()


def _described(folder: Path, certificate: x509.Certificate) -> Authority:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    names: tuple[str, ...] | None = None
    with contextlib.suppress(x509.ExtensionNotFound):
        constraints = certificate.extensions.get_extension_for_class(x509.NameConstraints).value
        names = tuple(
            each.value
            for each in constraints.permitted_subtrees or ()
            if isinstance(each, x509.DNSName)
        )
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return Authority(
        folder=folder,
        common_name=str(common[0].value) if common else "",
        key_id=x509.SubjectKeyIdentifier.from_public_key(_public(certificate)).digest.hex(),
        names=names,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        sha1=_fingerprint(certificate, "sha1"),
        sha256=_fingerprint(certificate, "sha256"),
    )


def _make(
    folder: Path,
    names: tuple[str, ...],
    now: datetime.datetime,
    key: ec.EllipticCurvePrivateKey | None,
) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    # P-256: a leaf is signed in 0.1 ms where RSA-2048 takes 1 ms, and every client knows it.
    key = key or ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    certificate = _signed(key, names, now).public_bytes(pem)
    secret = key.private_bytes(
        pem, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    # The key first: a certificate without its key is detected and replaced.
    write_whole(folder / KEY_NAME, secret + certificate, 0o600)
    write_whole(folder / CERTIFICATE_NAME, certificate, 0o644)


def _signed(
    key: ec.EllipticCurvePrivateKey, names: tuple[str, ...], now: datetime.datetime
) -> x509.Certificate:
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # The key's id is in the name: two machines' CAs may be synced into one keychain.
    name = x509.Name(
        [
            x509.NameAttribute(
                NameOID.COMMON_NAME, f"Halton Meter CA {identifier.digest.hex()[:8]}"
            ),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION),
        ]
    )
    addresses = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))
    constraints = x509.NameConstraints(
        [x509.DNSName(each) for each in names], [x509.IPAddress(each) for each in addresses]
    )
    usage = x509.KeyUsage(
        digital_signature=False,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(constraints, critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
