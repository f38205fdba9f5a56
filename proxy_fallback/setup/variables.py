"""The one list of variables by which programs find a proxy and the roots that they trust.

`init` sets those marked INIT, for new shells and apps (trust.py, plan.py). `run --via proxy` sets
those marked RUN, for one command (one_command.py). The proxy's own service runs without them
(service_files.py). What `init` sets stays for years and reaches every program, so it takes only
what is safe for all of them; `run` takes more, because its variables end with the command.

It knows names only. Which file or address goes in is decided by who sets them.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Holds(enum.Enum):
    """What a variable's value is."""

    PROXY = "the proxy's URL"
    NO_PROXY = "hosts to connect to directly"
    BUNDLE = "a PEM file that replaces the program's own roots"
    EXTRA_ROOTS = "a PEM file of roots, in addition to the program's own"
    SWITCH = "1"
    NODE_OPTIONS = "options of Node, to which a preloaded file is added"
    WGETRC = "a file of wget's settings: the user's own, and the roots to trust"
    JVM_OPTIONS = "options of every JVM, only with --java"


class SetBy(enum.Flag):
    """Which command sets a variable."""

    INIT = enum.auto()
    RUN = enum.auto()
    BOTH = INIT | RUN


class Variable(NamedTuple):
    """A variable, what it holds, who sets it, and the programs that read it."""

    name: str
    holds: Holds
    set_by: SetBy
    readers: str


VARIABLES: tuple[Variable, ...] = (
    Variable("HTTPS_PROXY", Holds.PROXY, SetBy.BOTH, "nearly every HTTP client"),
    Variable("https_proxy", Holds.PROXY, SetBy.BOTH, "curl, wget, Go, Python"),
    Variable("HTTP_PROXY", Holds.PROXY, SetBy.BOTH, "clients of plain http:// providers"),
    Variable("http_proxy", Holds.PROXY, SetBy.BOTH, "curl, which ignores the upper-case one"),
    # RUN only: it redirects every protocol, also those that have nothing to do with us (ftp, smtp).
    Variable("ALL_PROXY", Holds.PROXY, SetBy.RUN, "httpx, reqwest, curl"),
    Variable("all_proxy", Holds.PROXY, SetBy.RUN, "curl, libsoup"),
    # INIT only: local servers must not depend on the proxy for good. One command keeps its own.
    Variable("NO_PROXY", Holds.NO_PROXY, SetBy.INIT, "nearly every HTTP client"),
    Variable("no_proxy", Holds.NO_PROXY, SetBy.INIT, "curl, wget, Go, Python"),
    Variable("SSL_CERT_FILE", Holds.BUNDLE, SetBy.BOTH, "OpenSSL, Go, rustls, httpx"),
    Variable("REQUESTS_CA_BUNDLE", Holds.BUNDLE, SetBy.BOTH, "requests"),
    Variable("CURL_CA_BUNDLE", Holds.BUNDLE, SetBy.BOTH, "curl, requests"),
    Variable("CODEX_CA_CERTIFICATE", Holds.BUNDLE, SetBy.BOTH, "Codex"),
    # RUN only: it overrides http.sslCAInfo of git's configuration, which `init` does not read.
    Variable("GIT_SSL_CAINFO", Holds.BUNDLE, SetBy.RUN, "git"),
    Variable("AWS_CA_BUNDLE", Holds.BUNDLE, SetBy.BOTH, "botocore, the AWS command line"),
    Variable("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", Holds.BUNDLE, SetBy.BOTH, "gRPC"),
    Variable("PERL_LWP_SSL_CA_FILE", Holds.BUNDLE, SetBy.BOTH, "Perl's LWP"),
    Variable("PERL_LWP_ENV_PROXY", Holds.SWITCH, SetBy.BOTH, "Perl's LWP, to read the others"),
    Variable("NODE_EXTRA_CA_CERTS", Holds.EXTRA_ROOTS, SetBy.BOTH, "Node"),
    Variable("NODE_USE_ENV_PROXY", Holds.SWITCH, SetBy.BOTH, "Node from 24 on"),
    # In shells only: Node does not start when the preloaded file is gone, and apps cannot test it.
    Variable("NODE_OPTIONS", Holds.NODE_OPTIONS, SetBy.BOTH, "Node"),
    # RUN only: it replaces ~/.wgetrc, of which one command's copy does not age.
    Variable("WGETRC", Holds.WGETRC, SetBy.RUN, "wget, whose GnuTLS reads no variable"),
    Variable("JAVA_TOOL_OPTIONS", Holds.JVM_OPTIONS, SetBy.BOTH, "every JVM"),
)


def names(*holds: Holds, set_by: SetBy) -> tuple[str, ...]:
    """The variables that hold one of these and that this command sets."""
    return tuple(each.name for each in VARIABLES if each.holds in holds and each.set_by & set_by)


def assigned(set_by: SetBy, values: Mapping[Holds, str]) -> dict[str, str]:
    """The variables that this command sets, each with the value for what it holds.

    Variables that hold something without a value here are left out.
    """
    return {
        each.name: values[each.holds]
        for each in VARIABLES
        if each.set_by & set_by and each.holds in values
    }


def unset_for_service() -> tuple[str, ...]:
    """The variables that the proxy's own service must not have, or it would proxy to itself."""
    from_init = names(Holds.BUNDLE, Holds.JVM_OPTIONS, set_by=SetBy.INIT)
    return (*names(Holds.PROXY, set_by=SetBy.BOTH), *from_init)


def preload_option(preload: Path) -> str:
    """The option that preloads a file, as Node reads it in NODE_OPTIONS."""
    name = str(preload)
    if " " not in name and '"' not in name:
        return f"--require={name}"
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'--require "{escaped}"'
