"""What makes programs trust our CA and use the proxy for good: bundles, variables, trust stores.

Most programs read a PEM bundle from a variable (variables.py lists them), which replaces the roots
that they trust; so our bundle holds those roots and our CA. Apps use a store: the login keychain,
or the user's NSS database (Chromium, Electron). Only `system_trust` affects the whole system. This
file writes the bundles; for everything else it returns what to change.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from proxy_fallback.setup import java as java_vm
from proxy_fallback.setup.authority import TRUSTED_NAME, Authority
from proxy_fallback.setup.changes import (
    TOLERATED,
    Argv,
    ChangeError,
    CommandRun,
    Commands,
    write_whole,
)
from proxy_fallback.setup.variables import Holds, SetBy, assigned, names, preload_option

BUNDLE_NAME = "ca-bundle.pem"
# The roots without our CA: the proxy itself checks providers' certificates against them.
ROOTS_NAME = "roots.pem"
# The user's own certificates, from bundles that the variables named before init.
OWN_NAME = "own-roots.pem"
NODE_NAME = "node-extra-ca.pem"
# The world's public roots are 140; companies add a few.
BUNDLE_BYTES_MAX = 8 * 1024 * 1024

# Where systems keep their roots as one PEM file.
SYSTEM_ROOT_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
_MAC_KEYCHAINS = (
    "/System/Library/Keychains/SystemRootCertificates.keychain",
    "/Library/Keychains/System.keychain",
)
_SYSTEM_KEYCHAIN = "/Library/Keychains/System.keychain"
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


# --- bundles ------------------------------------------------------------------------------------


def own_roots(environ: Mapping[str, str], ca_folder: Path) -> str:
    """PEM text of the roots that the user's own variables add to the usual ones.

    After init the variables name our bundles; then the roots come from the copy made at that time.
    """
    texts, set_up = [], False
    for name in names(Holds.BUNDLE, Holds.EXTRA_ROOTS, set_by=SetBy.INIT):
        file = Path(environ.get(name, ""))
        if file.name and ca_folder in file.absolute().parents:
            set_up = True
        elif file.name:
            texts.append(_text(file))
    return "\n".join(texts) if texts or not set_up else _text(ca_folder / OWN_NAME)


def usual_roots(commands: Commands, platform: str) -> str:
    """PEM text of the system's roots, and of certifi's, which Python programs use."""
    import certifi

    files = [] if platform == "macos" else [Path(each) for each in SYSTEM_ROOT_FILES]
    texts = [text for text in map(_text, files) if text][:1]
    if platform == "macos":
        found = commands.run(("security", "find-certificate", "-a", "-p", *_MAC_KEYCHAINS))
        texts.append(found.out if found.code == 0 else "")
    return "\n".join([*texts, _text(Path(certifi.where()))])


def _certificates(text: str) -> str:
    return "".join(f"{each}\n" for each in dict.fromkeys(_PEM.findall(text)))


def _text(path: Path) -> str:
    try:
        with path.open("rb") as opened:
            return opened.read(BUNDLE_BYTES_MAX).decode("latin-1")
    except OSError:
        return ""


def write_bundles(authority: Authority, usual: str, own: str) -> bool:
    """Write every bundle into the CA's folder; returns whether one changed. Raises ChangeError."""
    import certifi

    ours = authority.certificate_file.read_text()
    public = set(_PEM.findall(_text(Path(certifi.where()))))
    private = "\n".join(each for each in _PEM.findall(own) if each not in public)
    changed = False
    for name, text in (
        (OWN_NAME, own),
        (ROOTS_NAME, usual + own),
        (BUNDLE_NAME, usual + own + ours),
        # Node adds this to its public roots, so it need not read them twice at every start.
        (NODE_NAME, private + ours),
    ):
        file, content = authority.folder / name, _certificates(text).encode()
        try:
            if not file.exists() or file.read_bytes() != content:
                write_whole(file, content, 0o644)
                changed = True
        except OSError as error:
            raise ChangeError(f"{file}: {error.strerror or error}") from None
    return changed


# --- variables ----------------------------------------------------------------------------------


def variables(port: int, ca_folder: Path, hosts: Sequence[str], java: bool) -> dict[str, str]:
    """The variables that make programs use the proxy and trust its CA."""
    # This machine's own servers are reached directly, unless one of them is metered.
    local = [each for each in ("localhost", "127.0.0.1", "::1") if each not in hosts]
    values = {
        Holds.PROXY: f"http://127.0.0.1:{port}",
        Holds.NO_PROXY: ",".join(local),
        Holds.BUNDLE: str(ca_folder / BUNDLE_NAME),
        Holds.EXTRA_ROOTS: str(ca_folder / NODE_NAME),
        Holds.SWITCH: "1",
    }
    if java:
        values[Holds.JVM_OPTIONS] = java_vm.options(ca_folder / java_vm.STORE_NAME, port)
    return assigned(SetBy.INIT, values)


def _running(pid_file: Path) -> str:
    """A condition for sh: the process in the pid file is ours."""
    file = shlex.quote(str(pid_file))
    return f'grep -qs halton_meter "/proc/$(cat {file} 2>/dev/null)/cmdline"'


@dataclass(frozen=True, slots=True)
class Terms:
    """The conditions under which a shell sets the variables.

    It does not when `witness` is missing (the package was removed without uninstall), when the
    process of `pid_file` does not run (set where nothing restarts it), or when the user uses
    another proxy, unless `override` says that ours leads to it. `preload` is the file that makes
    Node use the proxy; apps do not get it, because Node does not start when it is missing.
    """

    witness: Path
    preload: Path
    pid_file: Path | None = None
    override: bool = False


def posix_text(wanted: Mapping[str, str], terms: Terms) -> str:
    """The file that bash, zsh and sh read."""
    proxy = shlex.quote(wanted["HTTPS_PROXY"])
    condition = f"[ -e {shlex.quote(str(terms.witness))} ]"
    if terms.pid_file is not None:
        condition += f" && {_running(terms.pid_file)}"
    if not terms.override:
        condition += (
            ' && case "${HTTPS_PROXY:-${https_proxy:-}}" in ""|'
            + proxy
            + ") true;; *) false;; esac"
        )
    lines = ["# Written by `halton-meter init`; `halton-meter uninstall` removes it."]
    lines.append(f"if {condition}; then")
    for name, value in wanted.items():
        given = f'"${{{name}:-{value}}}"' if name.lower() == "no_proxy" else shlex.quote(value)
        lines.append(f"  export {name}={given}")
    preload = shlex.quote(preload_option(terms.preload))
    lines.append(
        f'  case "${{NODE_OPTIONS:-}}" in *{terms.preload.name}*) ;; '
        f'*) export NODE_OPTIONS="${{NODE_OPTIONS:-}} "{preload};; esac'
    )
    return "\n".join([*lines, "fi"]) + "\n"


def fish_text(wanted: Mapping[str, str], terms: Terms) -> str:
    """The same for fish."""
    proxy = _fish_quoted(wanted["HTTPS_PROXY"])
    condition = f"test -e {_fish_quoted(str(terms.witness))}"
    if terms.pid_file is not None:
        condition += f"; and sh -c {_fish_quoted(_running(terms.pid_file))}"
    if not terms.override:
        condition += f'; and contains -- "$HTTPS_PROXY" "" {proxy}'
        condition += f'; and contains -- "$https_proxy" "" {proxy}'
    lines = ["# Written by `halton-meter init`; `halton-meter uninstall` removes it."]
    lines.append(f"if {condition}")
    for name, value in wanted.items():
        given = f"set -gx {name} {_fish_quoted(value)}"
        lines.append(f"  set -q {name}; or {given}" if name.lower() == "no_proxy" else f"  {given}")
    preload = _fish_quoted(preload_option(terms.preload))
    lines.append(
        f"  string match -q '*{terms.preload.name}*' -- \"$NODE_OPTIONS\"; "
        f'or set -gx NODE_OPTIONS "$NODE_OPTIONS "{preload}'
    )
    return "\n".join([*lines, "end"]) + "\n"


def _fish_quoted(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def sourcing_lines(file: Path) -> str:
    """The lines for a start-up file; they do nothing when our file is missing."""
    name = shlex.quote(str(file))
    return (
        '# Added by "halton-meter init", taken out by "halton-meter uninstall".\n'
        f"if [ -r {name} ]; then . {name}; fi"
    )


def environment_d_text(wanted: Mapping[str, str], override: bool) -> str:
    """A file for environment.d(5), read by graphical sessions and user services."""
    lines = ["# Written by `halton-meter init`; `halton-meter uninstall` removes it."]
    for name, value in wanted.items():
        kept = name in names(Holds.PROXY, Holds.NO_PROXY, set_by=SetBy.INIT) and not override
        quoted = value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
        given = f"${{{name}:-{value}}}" if kept else f'"{quoted}"'
        lines.append(f"{name}={given}")
    return "\n".join(lines) + "\n"


# --- stores -------------------------------------------------------------------------------------


def keychain(authority: Authority | None, folder: Path, user_home: Path) -> CommandRun:
    """Trust for TLS in the login keychain; macOS asks for the user's password or fingerprint."""
    sha1 = authority.sha1 if authority else "SHA1"
    name = authority.common_name if authority else "Halton Meter CA"
    chain = str(user_home / "Library/Keychains/login.keychain-db")
    file = str(folder / TRUSTED_NAME)
    add = ("security", "add-trusted-cert", "-r", "trustRoot", "-p", "ssl", "-k", chain, file)
    return CommandRun(
        key=f"keychain:{sha1}",
        run=(add,),
        undo=(
            (TOLERATED, "security", "remove-trusted-cert", file),
            ("security", "delete-certificate", "-Z", sha1, chain),
        ),
        check=("security", "find-certificate", "-c", name, "-Z", chain),
    )


def nss(authority: Authority | None, folder: Path, user_home: Path) -> CommandRun:
    """Trust for servers in the database that Chromium and Electron apps of this user read."""
    name = authority.common_name if authority else "Halton Meter CA"
    database = f"sql:{user_home / '.pki/nssdb'}"
    file = str(folder / TRUSTED_NAME)
    return CommandRun(
        key=f"nss:{authority.sha1 if authority else 'SHA1'}",
        run=(("certutil", "-d", database, "-A", "-t", "C,,", "-n", name, "-i", file),),
        undo=(("certutil", "-d", database, "-D", "-n", name),),
        check=("certutil", "-d", database, "-L", "-n", name),
    )


def system_trust(
    authority: Authority | None, folder: Path, platform: str, commands: Commands, root: bool
) -> CommandRun:
    """Trust for all users of this machine, by sudo. Raises ChangeError if unsupported."""
    sudo: Argv = () if root else ("sudo",)
    sha1 = authority.sha1 if authority else "SHA1"
    name = authority.common_name if authority else "Halton Meter CA"
    file = str(folder / TRUSTED_NAME)
    if platform == "macos":
        add = ("security", "add-trusted-cert", "-d", "-r", "trustRoot", "-p", "ssl")
        return CommandRun(
            key=f"system-trust:{sha1}",
            run=((*sudo, *add, "-k", _SYSTEM_KEYCHAIN, file),),
            undo=(
                (TOLERATED, *sudo, "security", "remove-trusted-cert", "-d", file),
                (*sudo, "security", "delete-certificate", "-Z", sha1, _SYSTEM_KEYCHAIN),
            ),
            check=("security", "find-certificate", "-c", name, "-Z", _SYSTEM_KEYCHAIN),
        )
    # Without --fresh, Debian's leaves links to the removed certificate.
    for program, options, anchors, suffix in (
        ("update-ca-certificates", ("--fresh",), "/usr/local/share/ca-certificates", "crt"),
        ("update-ca-trust", (), "/etc/pki/ca-trust/source/anchors", "pem"),
    ):
        if commands.has(program):
            anchor = f"{anchors}/halton-meter-{sha1[:8].lower()}.{suffix}"
            return CommandRun(
                key=f"system-trust:{sha1}",
                run=((*sudo, "install", "-m", "0644", file, anchor), (*sudo, program)),
                undo=((*sudo, "rm", "-f", anchor), (*sudo, program, *options)),
                check=("test", "-e", anchor),
            )
    raise ChangeError(
        "this system has neither update-ca-certificates nor update-ca-trust",
        "leave --system-trust out; variables are enough for most programs",
    )
