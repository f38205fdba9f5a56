"""Set-up, the service and one command take their variables from one table."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy_fallback.setup import service_files, trust, variables
from proxy_fallback.setup.one_command import bundle, client_environment
from proxy_fallback.setup.variables import VARIABLES, Holds, SetBy, Variable

HOSTS = ("api.openai.com",)
CERTIFICATE = "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n"


def set_by_init(folder: Path, java: bool = False) -> dict[str, str]:
    return trust.variables(8081, folder, HOSTS, java)


def set_by_run(folder: Path, **environment: str) -> dict[str, str]:
    return client_environment(environment, 4444, folder / "bundle.pem", folder / "ca.pem")


def in_table(set_by: SetBy, *but: Holds) -> list[str]:
    return [e.name for e in VARIABLES if e.set_by & set_by and e.holds not in but]


def test_init_and_run_set_what_the_table_says(tmp_path: Path) -> None:
    # A shell adds NODE_OPTIONS to its own, and only --java needs options for JVMs.
    lasting = in_table(SetBy.INIT, Holds.NODE_OPTIONS)
    assert list(set_by_init(tmp_path, java=True)) == lasting
    assert list(set_by_init(tmp_path)) == [n for n in lasting if n != "JAVA_TOOL_OPTIONS"]
    assert list(set_by_run(tmp_path)) == in_table(SetBy.RUN, Holds.JVM_OPTIONS)


def test_only_run_sets_what_is_not_safe_for_every_program_for_good() -> None:
    only_run = {each.name for each in VARIABLES if each.set_by == SetBy.RUN}
    assert only_run == {"ALL_PROXY", "all_proxy", "GIT_SSL_CAINFO", "WGETRC"}


def test_a_row_that_is_added_reaches_everyone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.pem"
    own.write_text(CERTIFICATE.format("OWN"))
    more = (
        Variable("NEW_PROXY", Holds.PROXY, SetBy.BOTH, "a test"),
        Variable("NEW_BUNDLE", Holds.BUNDLE, SetBy.BOTH, "a test"),
    )
    monkeypatch.setattr(variables, "VARIABLES", VARIABLES + more)
    names = {each.name for each in more}
    assert names <= set(set_by_init(tmp_path))
    assert names <= set(set_by_run(tmp_path))
    assert "NEW_PROXY=${NEW_PROXY:-u}" in trust.environment_d_text({"NEW_PROXY": "u"}, False)
    assert "OWN" in trust.own_roots({"NEW_BUNDLE": str(own)}, tmp_path / "ca")
    ca = tmp_path / "ca.pem"
    ca.write_text(CERTIFICATE.format("OURS"))
    assert "OWN" in bundle(ca, tmp_path / "bundle.pem", {"NEW_BUNDLE": str(own)}).read_text()
    unit = service_files.service_unit("a test", ["true"], {})
    assert "UnsetEnvironment=HTTPS_PROXY " in unit
    assert all(f" {name}" in unit for name in names)
    agent = service_files.launch_agent("label", ["true"], {}, tmp_path / "log")
    assert all(f"<key>{name}</key>" in agent for name in names)


def test_every_row_names_its_readers() -> None:
    assert all(each.readers for each in VARIABLES)
    assert len({each.name for each in VARIABLES}) == len(VARIABLES)


def test_a_command_keeps_its_environment_and_gains_the_proxy(tmp_path: Path) -> None:
    after = set_by_run(tmp_path, PATH="/bin", HTTPS_PROXY="http://other:1", NO_PROXY="a.example")
    assert after["HTTPS_PROXY"] == "http://127.0.0.1:4444"
    assert after["NODE_EXTRA_CA_CERTS"] == str(tmp_path / "ca.pem")
    assert (after["PATH"], after["NO_PROXY"]) == ("/bin", "a.example")


def test_node_is_given_the_users_own_extra_roots_too(tmp_path: Path) -> None:
    after = set_by_run(tmp_path, NODE_EXTRA_CA_CERTS="/own.pem", NODE_OPTIONS="--no-warnings")
    assert after["NODE_EXTRA_CA_CERTS"] == str(tmp_path / "bundle.pem")
    assert after["NODE_OPTIONS"].startswith("--no-warnings --require=")


def test_a_command_with_roots_of_its_own_trusts_those_and_ours_only(tmp_path: Path) -> None:
    ca, own = tmp_path / "ca.pem", tmp_path / "own.pem"
    ca.write_text(CERTIFICATE.format("OURS"))
    own.write_text(CERTIFICATE.format("OWN"))
    found = bundle(ca, tmp_path / "bundle.pem", {"SSL_CERT_FILE": str(own)})
    assert found.read_text().count("BEGIN CERTIFICATE") == 2
    usual = bundle(ca, tmp_path / "bundle.pem", {"GIT_SSL_CAINFO": str(own)}).read_text()
    assert "OWN" in usual
    assert usual.count("BEGIN CERTIFICATE") > 50


@pytest.mark.parametrize(
    ("path", "option"),
    [
        ("/a/p.cjs", "--require=/a/p.cjs"),
        ("/a b/p.cjs", '--require "/a b/p.cjs"'),
        ('/a"b\\/p.cjs', '--require "/a\\"b\\\\/p.cjs"'),
    ],
)
def test_a_preloaded_file_is_quoted_as_node_reads_it(path: str, option: str) -> None:
    assert variables.preload_option(Path(path)) == option
