"""Java, which ignores proxy variables and PEM bundles: a trust store and options of its own.

A JVM reads `JAVA_TOOL_OPTIONS` when it starts and reports that on standard error, so the variable
is set only for users who pass `--java`. The trust store is a copy of Java's own with our CA added,
so everything trusted before stays trusted. Java ignores a CA's name constraints.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from proxy_fallback.setup.changes import Argv, ChangeError, CommandRun, Commands, shown

OPTIONS_NAME = "JAVA_TOOL_OPTIONS"
STORE_NAME = "java-cacerts"
# The default password of every Java's own store; it protects nothing.
_PASSWORD = "changeit"  # noqa: S105


def options(store: Path, port: int) -> str:
    """The options that make a JVM use the proxy and trust it."""
    return (
        f"-Djavax.net.ssl.trustStore={store} -Djavax.net.ssl.trustStorePassword={_PASSWORD} "
        f"-Dhttps.proxyHost=127.0.0.1 -Dhttps.proxyPort={port}"
    )


def copied_store(store: Path, certificate: Path, source: str) -> CommandRun:
    """The change that copies Java's own store to `store` and adds our CA."""
    add = ("keytool", "-importcert", "-noprompt", "-trustcacerts", "-alias", "halton-meter")
    return CommandRun(
        key="java",
        run=(
            ("cp", source, str(store)),
            ("chmod", "0644", str(store)),
            (*add, "-file", str(certificate), "-keystore", str(store), "-storepass", _PASSWORD),
        ),
        undo=(("rm", "-f", str(store)),),
        check=("test", "-e", str(store)),
    )


def for_one_command(
    environment: Mapping[str, str], port: int, certificate: Path, folder: Path
) -> dict[str, str]:
    """The variable for one command's JVMs; their trust store is made in `folder`.

    The user's own options stay. Raises ChangeError when these already set a trust store or a
    proxy, unless `init --java` set them.
    """
    own = environment.get(OPTIONS_NAME, "")
    if ("trustStore=" in own or "https.proxyHost=" in own) and STORE_NAME not in own:
        raise ChangeError(
            f"{OPTIONS_NAME} already sets a trust store or a proxy", "leave --java out"
        )
    if any(each.isspace() for each in str(folder)):
        raise ChangeError(
            f"{OPTIONS_NAME} cannot hold {folder}, which has a space",
            "set TMPDIR to a folder without spaces, or leave --java out",
        )
    commands, platform = Commands(), "macos" if sys.platform == "darwin" else "linux"
    store = folder / STORE_NAME
    source = own_store(platform, commands)
    for argv in copied_store(store, certificate, source).run:
        ran = commands.run(argv)
        if ran.code:
            raise ChangeError(f"{shown(argv)}: {ran.message}", "leave --java out")
    # Of two options of one name, the later one wins.
    return {OPTIONS_NAME: f"{own} {options(store, port)}".strip()}


def own_store(platform: str, commands: Commands) -> str:
    """Java's own trust store. Raises ChangeError where there is no Java."""
    found = 'echo "${JAVA_HOME:-$(dirname "$(dirname "$(readlink -f "$(command -v java)")")")}"'
    command: Argv = ("sh", "-c", found)
    if platform == "macos":
        command = ("/usr/libexec/java_home",)
    ran = commands.run(command)
    home = ran.out.strip()
    if ran.code or home in ("", ".") or not commands.has("keytool"):
        raise ChangeError(
            "found no Java (neither java nor keytool)", "install a JDK, or leave --java out"
        )
    return f"{home}/lib/security/cacerts"
