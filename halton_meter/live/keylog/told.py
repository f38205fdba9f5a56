"""The environment by which programs write their TLS keys to a file of ours.

Who reads which variable: OpenSSL's callers that support it (curl, Python's default contexts), NSS
(Firefox), GnuTLS, BoringSSL in Chromium and rustls where a program asks for it read SSLKEYLOGFILE;
Node reads an option. Java needs an agent, which is not ours.
Sources: https://curl.se/docs/manpage.html#--variable, https://docs.python.org/3/library/ssl.html
(`create_default_context`), https://nodejs.org/api/cli.html#--tls-keylogfile,
https://www.gnutls.org/manual (SSLKEYLOGFILE), https://firefox-source-docs.mozilla.org (NSS).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

KEYS_VARIABLE = "SSLKEYLOGFILE"
_RUN_VARIABLE = "_HALTON_METER_RUN"
_NODE_VARIABLE = "NODE_OPTIONS"


def environment(own: Mapping[str, str], keys: Path) -> tuple[dict[str, str], Path]:
    """(the command's environment, the file that its keys go to).

    A file that the user named before is kept in use. `keys` stands in what the command is told all
    the same: its daemons are known by it.
    """
    found = dict(own)
    file = Path(found.get(KEYS_VARIABLE) or keys)
    if file != keys:
        found[_RUN_VARIABLE] = str(keys)
    found[KEYS_VARIABLE] = str(file)
    given = found.get(_NODE_VARIABLE, "")
    plain = not any(char.isspace() or char in "\"'\\" for char in str(file))
    if plain and "--tls-keylog" not in given:  # a name that Node reads otherwise would stop it
        found[_NODE_VARIABLE] = f"{given} --tls-keylog={file}".strip()
    return found, file


def why_no_keys(file: Path) -> str | None:
    """Why a key file that the user named gets no keys, or none that we read, as a clause."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return "the command has not made it"
    except OSError as error:
        return error.strerror or type(error).__name__
    if not stat.S_ISREG(found.st_mode):
        return "it is no regular file"
    if os.geteuid() == 0 and found.st_uid != 0:
        return "it is another user's, and root reads none of these"
    for right, verb in ((os.W_OK, "write"), (os.R_OK, "read")):
        if not os.access(file, right):
            return f"you may not {verb} it"
    return None
