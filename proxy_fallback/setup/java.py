"""Java, which heeds neither proxy variables nor PEM bundles: a trust store and options of its own.

A JVM reads `JAVA_TOOL_OPTIONS` at its start, and says on its standard error that it did: so nobody
is given them who did not ask for it (`--java`). What it would have trusted without us stays
trusted: the store is a copy of Java's own with our CA added. Java does not heed a CA's name
constraints.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from proxy_fallback.setup.changes import Argv, ChangeError, CommandRun, Commands, shown

OPTIONS_NAME = "JAVA_TOOL_OPTIONS"
STORE_NAME = "java-cacerts"
# Every Java's own store has this one; it guards nothing.
_PASSWORD = "changeit"  # noqa: S105


def options(store: Path, port: int) -> str:
    """What a JVM is told to use the proxy and to trust it."""
    return (
        f"-Djavax.net.ssl.trustStore={store} -Djavax.net.ssl.trustStorePassword={_PASSWORD} "
        f"-Dhttps.proxyHost=127.0.0.1 -Dhttps.proxyPort={port}"
    )


def copied_store(store: Path, certificate: Path, source: str) -> CommandRun:
    """The change that makes `store` of Java's own."""
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
    """The variable that a command's JVMs are given, their store made in `folder`.

    Options of the person's own stay; raises ChangeError for such that choose a trust store or a
    proxy themselves, unless those are what `init --java` chose.
    """
    own = environment.get(OPTIONS_NAME, "")
    if ("trustStore=" in own or "https.proxyHost=" in own) and STORE_NAME not in own:
        raise ChangeError(f"{OPTIONS_NAME} chooses a trust store or a proxy already")
    if any(each.isspace() for each in str(folder)):
        raise ChangeError(f"{OPTIONS_NAME} cannot name {folder}: it has a space")
    commands, platform = Commands(), "macos" if sys.platform == "darwin" else "linux"
    store = folder / STORE_NAME
    source = own_store(platform, commands)
    for argv in copied_store(store, certificate, source).run:
        ran = commands.run(argv)
        if ran.code:
            raise ChangeError(f"{shown(argv)}: {ran.said}")
    # Of two options of one name the later counts.
    return {OPTIONS_NAME: f"{own} {options(store, port)}".strip()}


def own_store(platform: str, commands: Commands) -> str:
    """Java's own trust store. Raises ChangeError where there is no Java."""
    found = 'echo "${JAVA_HOME:-$(dirname "$(dirname "$(readlink -f "$(command -v java)")")")}"'
    asked: Argv = ("sh", "-c", found)
    if platform == "macos":
        asked = ("/usr/libexec/java_home",)
    said = commands.run(asked)
    home = said.out.strip()
    if said.code or home in ("", ".") or not commands.has("keytool"):
        raise ChangeError("no Java was found (java and keytool); leave --java out")
    return f"{home}/lib/security/cacerts"
