"""What `run --via proxy` gives one command, so that it uses the proxy and trusts its CA.

Nothing outside of the command's own environment changes. `init` does the same for good: trust.py.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Mapping
from pathlib import Path

from proxy_fallback.setup.trust import SYSTEM_ROOT_FILES
from proxy_fallback.setup.variables import Holds, SetBy, assigned, names, preload_option

# Teaches Node its environment's proxy: before 24 it knows none, since then not for every agent.
NODE_PRELOAD = Path(__file__).with_name("node_proxy.cjs")


def bundle(ca_file: Path, into: Path, environment: Mapping[str, str]) -> Path:
    """Write a PEM file of the CA and of all that the command trusts without us."""
    import certifi

    set_here = names(Holds.BUNDLE, Holds.EXTRA_ROOTS, set_by=SetBy.RUN)
    own = [environment[name] for name in set_here if environment.get(name)]
    found = (ssl.get_default_verify_paths().cafile, *SYSTEM_ROOT_FILES)
    system = [file for file in found if file and Path(file).is_file()]
    if not environment.get("SSL_CERT_FILE"):  # else the command trusts that and nothing more
        own += [*system[:1], certifi.where()]
    parts = [ca_file.read_text()]
    for file in dict.fromkeys(own):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            parts.append(Path(file).read_text())
    if len(parts) == 1:
        parts.append(Path(certifi.where()).read_text())
    into.write_text("\n".join(parts))
    into.chmod(0o600)
    return into


def wget_settings(bundle_file: Path, folder: Path, environment: Mapping[str, str]) -> Path:
    """Write a file of wget's settings: the user's own, and our roots in addition.

    wget with GnuTLS trusts what the file *and* what the folder holds, so that a file of the user's
    own (here or by `--ca-certificate`) stays in force. With OpenSSL it reads SSL_CERT_FILE, too.
    """
    user_home = environment.get("HOME", "")
    own = environment.get("WGETRC") or (f"{user_home}/.wgetrc" if user_home else "")
    text = b""
    with contextlib.suppress(OSError):
        if os.path.isfile(own):
            text = Path(own).read_bytes().rstrip(b"\n") + b"\n"
    settings = {line.partition(b"=")[0].strip().replace(b"-", b"_") for line in text.splitlines()}
    roots = folder / "wget-roots"
    roots.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (roots / "ca-bundle.pem").symlink_to(bundle_file)
    if b"ca_directory" not in settings:
        text += f"ca_directory = {roots}\n".encode()
    if b"ca_certificate" not in settings:
        text += f"ca_certificate = {bundle_file}\n".encode()
    into = folder / "wgetrc"
    into.write_bytes(text)
    into.chmod(0o600)
    return into


def client_environment(
    environment: Mapping[str, str], port: int, bundle_file: Path, ca_file: Path
) -> dict[str, str]:
    """The command's environment, with the proxy and its CA added and nothing else changed."""
    # Node adds these to its own roots, so the CA is enough, unless the user has more of their own.
    extra = any(environment.get(n) for n in names(Holds.EXTRA_ROOTS, set_by=SetBy.RUN))
    node_options = f"{environment.get('NODE_OPTIONS', '')} {preload_option(NODE_PRELOAD)}"
    values = {
        Holds.PROXY: f"http://127.0.0.1:{port}",
        Holds.BUNDLE: str(bundle_file),
        Holds.EXTRA_ROOTS: str(bundle_file if extra else ca_file),
        Holds.SWITCH: "1",
        Holds.NODE_OPTIONS: node_options.strip(),
        Holds.WGETRC: str(wget_settings(bundle_file, bundle_file.parent, environment)),
    }
    return {**environment, **assigned(SetBy.RUN, values)}
