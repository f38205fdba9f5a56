"""The texts for systemd and launchd: quoting, and what a service must not inherit."""

from __future__ import annotations

import plistlib
import shutil
import subprocess
from pathlib import Path

import pytest

from proxy_fallback.setup.service_files import launch_agent, service_unit, systemd_word


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("/usr/bin/python3", "/usr/bin/python3"),
        ("--via", "--via"),
        ("a b", '"a b"'),
        ("a\tb", '"a\tb"'),
        ('say "hi"', '"say \\"hi\\""'),
        ('a"b', '"a\\"b"'),
        ("a\\b", '"a\\\\b"'),
        ("100%", '"100%%"'),
        ("$HOME", '"$$HOME"'),
    ],
)
def test_a_word_of_a_unit_is_quoted_where_it_must_be(word: str, written: str) -> None:
    assert systemd_word(word) == written


def test_a_unit_names_its_command_and_variables_quoted() -> None:
    unit = service_unit("a test", ["/a b/python", "-P"], {"HALTON_METER_HOME": "/home/50%"})
    assert 'ExecStart="/a b/python" -P\n' in unit
    assert 'Environment="HALTON_METER_HOME=/home/50%%"\n' in unit


@pytest.mark.skipif(shutil.which("systemd-run") is None, reason="systemd is not installed")
def test_systemd_reads_a_quoted_word_as_it_was(tmp_path: Path) -> None:
    """systemd-analyze prints what it cannot execute: the path as it has read it."""
    missing = f"{tmp_path}/it's 100% of $HOME"
    (tmp_path / "odd.service").write_text(service_unit("a test", [missing], {}))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "odd.service")],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert f"{tmp_path}/it's 100% of " in done.stderr, done.stderr


def test_a_variable_that_is_given_is_not_unset(tmp_path: Path) -> None:
    given = {"SSL_CERT_FILE": "/roots.pem"}
    [line] = [x for x in service_unit("t", ["x"], given).splitlines() if x.startswith("Unset")]
    assert "SSL_CERT_FILE" not in line.split()
    assert "REQUESTS_CA_BUNDLE" in line.split()
    agent = plistlib.loads(launch_agent("l", ["x"], given, tmp_path / "log").encode())
    assert agent["EnvironmentVariables"]["SSL_CERT_FILE"] == "/roots.pem"
    assert agent["EnvironmentVariables"]["HTTPS_PROXY"] == ""
