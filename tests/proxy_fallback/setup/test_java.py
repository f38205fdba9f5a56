"""What one command's Java is told: the person's options stay, what would break is refused."""

from __future__ import annotations

import datetime
import shutil
import subprocess
from pathlib import Path

import pytest

from proxy_fallback.setup import java
from proxy_fallback.setup.authority import ensure_authority
from proxy_fallback.setup.changes import ChangeError, Commands

NO_JAVA = pytest.mark.skipif(
    shutil.which("keytool") is None, reason="needs a JDK: apt-get install default-jdk-headless"
)


def made(folder: Path, own: str | None = None) -> dict[str, str]:
    now = datetime.datetime.now(datetime.UTC)
    authority = ensure_authority(folder / "ca", ("api.example.com",), now)
    given = {} if own is None else {"JAVA_TOOL_OPTIONS": own}
    return java.for_one_command(given, 8123, authority.certificate_file, folder)


@NO_JAVA
def test_its_store_is_javas_own_and_our_ca(tmp_path: Path) -> None:
    told = made(tmp_path)
    assert list(told) == ["JAVA_TOOL_OPTIONS"]
    assert f"-Djavax.net.ssl.trustStore={tmp_path}/java-cacerts" in told["JAVA_TOOL_OPTIONS"]
    assert "-Dhttps.proxyPort=8123" in told["JAVA_TOOL_OPTIONS"]
    listing = ["keytool", "-list", "-storepass", "changeit", "-keystore"]
    listed = subprocess.run(
        [*listing, tmp_path / "java-cacerts"], capture_output=True, text=True, check=True
    ).stdout
    assert "halton-meter" in listed
    assert listed.count("trustedCertEntry") > 50


@NO_JAVA
def test_the_persons_own_options_stay_and_those_of_init_give_way(tmp_path: Path) -> None:
    assert made(tmp_path, "-Xmx1g")["JAVA_TOOL_OPTIONS"].startswith("-Xmx1g -Djavax")
    (tmp_path / "again").mkdir()
    of_init = java.options(Path("/home/x/.halton-meter/proxy-ca/java-cacerts"), 8081)
    told = made(tmp_path / "again", of_init)["JAVA_TOOL_OPTIONS"]
    assert told.rindex("proxyPort=8123") > told.index("proxyPort=8081")


@pytest.mark.parametrize(
    "own", ["-Djavax.net.ssl.trustStore=/etc/company.p12", "-Dhttps.proxyHost=proxy.example.com"]
)
def test_a_trust_store_or_proxy_that_the_person_chose_stays(tmp_path: Path, own: str) -> None:
    with pytest.raises(ChangeError, match="already"):
        made(tmp_path, own)


def test_without_java_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Commands, "has", lambda self, program: False)
    with pytest.raises(ChangeError, match="found no Java"):
        made(tmp_path)
