"""config.toml: what it may say, and how it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from halton_meter.accounts import home_folder
from halton_meter.config import Config, ConfigError, ProxyConfig, load, load_proxy, parse


def test_no_file_means_defaults(tmp_path: Path) -> None:
    assert load(tmp_path) == Config()


def test_everything_that_can_be_said() -> None:
    text = b"""
openai_compatible_hosts = ["llm.example.com", "*.inference.example"]
users = ["ann"]
all_users = false
loader = "libbpf"

[proxy]
port = 9000
"""
    assert parse(text, "config.toml") == Config(
        openai_compatible_hosts=("llm.example.com", "*.inference.example"),
        users=("ann",),
        loader="libbpf",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\n\nall_user = true", r"c\.toml:3: unknown setting 'all_user'"),
        (b"\nall_users = 1", r"c\.toml:2: all_users must be true or false, not 1"),
        (b"\nbodies = false", r"c\.toml:2: bodies has no effect, and never had; remove it"),
        (b"all_users = true\n\n[budgets]\nday = 5", r"c\.toml:3: \[budgets\] has no effect"),
        (b'users = "ann"', r"c\.toml:1: users must be a list"),
        (b'openai_compatible_hosts = ["https://x.example/"]', r"c\.toml:1: .*not a host name"),
        (b'openai_compatible_hosts = ["Llm.Example.com"]', r"lower case"),
        (b"loader = 'magic'", r'loader must be "auto"'),
        (b"a = \n", r"c\.toml: .*line 1"),
        (b"ok = 1\n\xff", r"c\.toml:2: not UTF-8"),
        (b"proxy = 3", r"unknown setting 'proxy'"),
    ],
)
def test_a_mistake_is_refused_with_its_line(text: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text, "c.toml")


@pytest.mark.parametrize(
    "host", ["127.0.0.1:11434", "10.0.0.7", "litellm:4000", "my_llm", "[::1]:8080", "[fe80::1]"]
)
def test_addresses_and_names_of_the_local_network_are_hosts(host: str) -> None:
    text = f'openai_compatible_hosts = ["{host}"]\n[hosts]\n"{host}" = "ollama"\n'
    assert parse(text.encode(), "c.toml").extra_hosts == {host: "ollama"}


@pytest.mark.parametrize("host", ["a b", "http://x", "x/y", "1.2.3:x", "", "-", "[::1", "a:b:1"])
def test_what_no_request_names_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=r"list of strings|not a host name"):
        parse(f'openai_compatible_hosts = ["{host}"]'.encode(), "c.toml")


def test_where_state_lives(tmp_path: Path) -> None:
    assert home_folder({"HALTON_METER_HOME": str(tmp_path)}) == tmp_path
    assert home_folder({"HOME": "/h"}) == Path("/h/.halton-meter")


def test_the_proxy_table(tmp_path: Path) -> None:
    assert load_proxy(tmp_path) == ProxyConfig(8081, None)
    path = tmp_path / "config.toml"
    path.write_text('[proxy]\nport = 9000\nupstream = "http://proxy.example.com:3128"\n')
    assert load_proxy(tmp_path) == ProxyConfig(9000, ("proxy.example.com", 3128))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("port = 80", "2: port must be a number from 1024 to 65535, not 80"),
        ("port = true", "not True"),
        ("prot = 8081", "2: unknown setting 'prot'; [proxy] knows port, upstream"),
        ('upstream = "proxy:3128"', '2: upstream must be like "http://proxy.example.com:3128"'),
        ('upstream = "http://127.0.0.1:8081"', "is the edge itself"),
    ],
)
def test_a_mistake_in_the_proxy_table(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "config.toml").write_text(f"[proxy]\n{line}\n")
    with pytest.raises(ConfigError) as refused:
        load_proxy(tmp_path)
    assert message in str(refused.value)
