"""config.toml: what it may say, and how it is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halton_meter import toml_file
from halton_meter.accounts import home_folder
from halton_meter.providers.registry import Registry
from halton_meter.settings.config import (
    Config,
    ConfigError,
    load,
    parse,
    read,
    read_text,
)
from halton_meter.settings.proxy import ProxyConfig


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
        proxy=ProxyConfig(9000),
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\nall_users = 1", "2: all_users must be true or false, not 1; did you mean true?"),
        ('all_users = "no"', '1: all_users must be true or false, not "no"; did you mean false?'),
        (
            'users = "ann"',
            '1: users must be a list of texts in quotes, not "ann"; did you mean ["ann"]?',
        ),
        (
            "users = [\n1]",
            '2: users must be a list of texts in quotes; 1 is none; did you mean "1"?',
        ),
        (
            'loader = "libpbf"',
            '1: loader must be "auto", "bcc" or "libbpf", not "libpbf"; did you mean "libbpf"?',
        ),
        ("loader = [1]", '1: loader must be "auto", "bcc" or "libbpf", not a list'),
        (
            "hosts = 3",
            "1: hosts must be a table, not 3: write below a line [hosts] "
            '"llm.example.com" = "openai"',
        ),
        (
            '[hosts]\nllm.example.com = "openai"',
            '2: [hosts] "llm.example.com": a host\'s name stands in quotes; '
            'did you mean "llm.example.com" = "openai"?',
        ),
        (
            '[hosts]\n\n"llm.example.com" = 3',
            '3: [hosts] "llm.example.com" needs a provider\'s name in quotes, '
            'such as "openai", not 3',
        ),
        (
            '[hosts]\n"llm.example.com" = "openai:a b"',
            '2: [hosts] "llm.example.com": "openai:a b" gives a name of your own that is none; '
            'letters, digits, _ . and - make one: write "openai" or "openai:our-name"',
        ),
        ("proxy = 3", "1: proxy must be a table, not 3: write below a line [proxy] port = 8081"),
        (
            "[proxy]\nport = 80",
            "2: [proxy] port must be a number from 1024 to 65535, not 80; did you mean 8081?",
        ),
        (
            '[proxy]\nport = "9000"',
            '2: [proxy] port must be a number from 1024 to 65535, not "9000"; did you mean 9000?',
        ),
        (
            "[proxy]\nport = true",
            "2: [proxy] port must be a number from 1024 to 65535, not true; did you mean 8081?",
        ),
        (
            '[proxy]\nupstream = "proxy:3128"',
            '2: [proxy] upstream must be like "http://proxy.example.com:3128", not "proxy:3128"; '
            'did you mean "http://proxy:3128"?',
        ),
        (
            '[proxy]\nupstream = "http://user:pa55word@proxy:3128"',
            '2: [proxy] upstream must be like "http://proxy.example.com:3128", '
            "without a user name; "
            'did you mean "http://proxy:3128"?',
        ),
        (
            '[proxy]\nupstream = "http://127.0.0.1:8081"',
            '2: [proxy] upstream "http://127.0.0.1:8081" is this proxy itself; name the one that '
            "leads out of your network, or remove the line",
        ),
        (
            '[proxy]\nupstream = "socks5://user:pa55word@proxy:1080"',
            "2: [proxy] upstream: SOCKS is not supported; name an HTTP proxy, such as "
            '"http://proxy.example.com:3128"',
        ),
        (
            '[hosts]\n"a.b" = "openai"',
            '2: [hosts] "a.b" is not a host name: no domain is as short as its last part, "b"; '
            'write it as "llm.example.com", "llm.local:8080" or "127.0.0.1:11434"',
        ),
        ("a = \n", "1: this is no TOML: invalid value: a ="),
        ('[hosts]\n"a.b" = openai', '2: text stands in quotes; did you mean "openai"?'),
        ("[proxy]\n\n[proxy]", "3: this stands twice; write it once: [proxy]"),
        ("a = 1\na = 2", "2: this stands twice; write it once: a = 2"),
        ("a = [\n[", "2: this is no TOML: invalid value: ["),
        (f"a = {'9' * 5000}", "1: a number has too many digits"),
    ],
)
def test_a_wrong_value_is_one_line_with_its_place(text: str, line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(text.encode(), "c.toml")
    assert str(refused.value) == f"c.toml:{line}"


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("openia", "openai"),
        ("OpenAI", "openai"),
        ("claude", "anthropic"),
        ("antropic:ours", "anthropic:ours"),
        ("gatway", "gateway"),
        ("google", "gemini"),
    ],
)
def test_a_provider_of_another_name(wrong: str, meant: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(f'[hosts]\n"llm.example.com" = "{wrong}"\n'.encode(), "c.toml")
    name = wrong.partition(":")[0]
    said = f'c.toml:2: [hosts] "llm.example.com": no provider is called "{name}"; did you mean '
    assert str(refused.value).startswith(f'{said}"{meant}"? Known: openai, anthropic, ')


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "\n\nall_user = true",
            '3: unknown setting "all_user" has no effect; did you mean all_users?',
        ),
        ("[host]", '1: unknown setting "host" has no effect; did you mean [hosts]?'),
        (
            "port = 9000",
            '1: unknown setting "port" has no effect; did you mean it under [proxy]? '
            "Then write port below that line",
        ),
        (
            '"llm.example.com" = "openai"',
            '1: unknown setting "llm.example.com" has no effect; did you mean it under [hosts]? '
            "Then write it below that line",
        ),
        (
            "[proxy]\nprot = 9000",
            '2: unknown setting [proxy] "prot" has no effect; did you mean "port"?',
        ),
        (
            "\nbodies = false",
            "2: bodies has no effect: prompts and answers are never kept, whatever it says; "
            "remove it",
        ),
        (
            'users = ["ann"]',
            "1: users has no effect here; only root chooses users: put it into "
            "/etc/halton-meter/config.toml",
        ),
    ],
)
def test_what_has_no_effect_is_one_line_and_no_failure(text: str, line: str) -> None:
    found = read_text(text.encode(), "c.toml")
    assert found.wrong == ()
    assert f"c.toml:{line}" in found.notes


@pytest.mark.parametrize(
    ("host", "meant"),
    [
        ("https://llm.example.com/v1", "llm.example.com"),
        ("//llm.example.com:8443/v1", "llm.example.com:8443"),
        ("llm.example.com/v1", "llm.example.com"),
        ("llm.example.com?a", "llm.example.com"),
        ("user:password@llm.example.com", "llm.example.com"),
        ("Llm.Example.com", "llm.example.com"),
        (" llm.example.com ", "llm.example.com"),
        ("llm.example.com.", "llm.example.com"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("*llm.example.com", "*.llm.example.com"),
        (".llm.example.com", "*.llm.example.com"),
        ("::1", "[::1]"),
        ("http://[::1]:8080/", "[::1]:8080"),
        ("llm.example.com:0", "llm.example.com"),
        ("llm.example.com:70000", "llm.example.com"),
    ],
)
def test_the_host_that_was_meant(host: str, meant: str) -> None:
    for text in (f'openai_compatible_hosts = [\n"{host}"]', f'[hosts]\n"{host}" = "openai"'):
        with pytest.raises(ConfigError) as refused:
            parse(text.encode(), "c.toml")
        assert str(refused.value).startswith("c.toml:2: ")
        assert str(refused.value).endswith(f'did you mean "{meant}"?')


def test_a_port_that_need_not_be_said() -> None:
    text = '[hosts]\n"llm.example.com:443" = "openai"\n"llm.local:80" = "ollama"\n'
    assert parse(text.encode(), "c.toml").hosts == {
        "llm.example.com": "openai",
        "llm.local": "ollama",
    }


def test_several_wrong_values_are_a_line_each_and_the_others_count() -> None:
    text = """
all_users = 3
loader = "bcc"
openai_compatible_hosts = ["a.example", "B.example",
  "c.example"]
[hosts]
"d.example" = "openia"
"e.example" = "ollama"
[proxy]
port = 9000
upstream = 3
"""
    found = read_text(text.encode(), "c.toml")
    assert [line.split(" ")[0] for line in found.wrong] == [f"c.toml:{n}:" for n in (2, 4, 7, 11)]
    assert found.config == Config(
        openai_compatible_hosts=("a.example", "c.example"),
        hosts={"e.example": "ollama"},
        loader="bcc",
        proxy=ProxyConfig(9000),
    )
    with pytest.raises(ConfigError) as refused:
        found.sound()
    assert [each.what for each in refused.value.problems] == list(found.wrong)


def test_very_many_wrong_values_are_ten_lines() -> None:
    text = f"users = [{', '.join(['3'] * 100)}]"
    found = read_text(text.encode(), "c.toml")
    assert len(found.wrong) == 10
    assert found.wrong[-1] == "c.toml: and 91 more"


# --- the file itself ------------------------------------------------------------------------------


def test_a_byte_order_mark_and_windows_lines_are_no_error(tmp_path: Path) -> None:
    text = '[proxy]\r\nport = 9000\r\n[hosts]\r\n"a.example" = "openai"\r\n'
    (tmp_path / "config.toml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load(tmp_path) == Config(hosts={"a.example": "openai"}, proxy=ProxyConfig(9000))


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (b"ok = 1\n\xff", ":2: not UTF-8 text (byte 0xff); save it as UTF-8"),
        ("a = 1".encode("utf-16"), ":1: this is UTF-16 text; save the file as UTF-8"),
        ("a = 1".encode("utf-32"), ":1: this is UTF-32 text; save the file as UTF-8"),
        (
            "\na = 1".encode("utf-16-le"),
            ":2: holds a NUL byte, as UTF-16 text does; save it as UTF-8",
        ),
        (b"a = " + b"[" * 9000, ": nested too deeply"),
        (
            b"#" * (256 * 1024 + 1),
            ": larger than 262,144 bytes; such a file is not read; see: ls -l {path}",
        ),
    ],
    ids=["bytes", "utf-16", "utf-32", "nul", "deep", "huge"],
)
def test_a_file_that_is_none(tmp_path: Path, raw: bytes, line: str) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(raw)
    assert read(tmp_path).wrong == (f"{path}{line.format(path=path)}",)


def test_what_stands_where_the_file_should(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.mkdir()
    said = f"{path}: this is a folder, not a file; move it away: mv {path} {path}.old"
    assert read(tmp_path).wrong == (said,)
    path.rmdir()
    os.mkfifo(path)
    said = f"{path}: this is not a file; move it away: mv {path} {path}.old"
    assert read(tmp_path).wrong == (said,)
    path.unlink()
    path.symlink_to(tmp_path / "gone.toml")
    assert read(tmp_path).wrong == (f"{path}: links to a file that is not there: ls -l {path}",)
    path.unlink()
    path.symlink_to(path)
    said = f"{path}: cannot be read: Too many levels of symbolic links; see: ls -l {path}"
    assert read(tmp_path).wrong == (said,)


# --- anything at all ------------------------------------------------------------------------------

_KEYS = ("openai_compatible_hosts", "hosts", "users", "all_users", "loader", "proxy", "all_user")
_LETTERS = "aB1 .:/*@[]'\"\\\n\x00\x7f\x9bé\u202e日🐍"
_scalars = (
    st.booleans()
    | st.integers()
    | st.floats()
    | st.text(_LETTERS, max_size=20)
    | st.dates()
    | st.sampled_from(["openai", "a.example", "http://x", "*.b.example", "claude:", "[::1]:0"])
)
_values = st.recursive(
    _scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(_LETTERS, max_size=8) | st.sampled_from(["port", "upstream"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def toml(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(key)} = {toml(each)}" for key, each in value.items()) + "}"
    return str(value)


@quick
@given(st.dictionaries(st.sampled_from(_KEYS), _values, max_size=4))
def test_any_value_is_accepted_or_one_line(table: dict[str, Any]) -> None:
    text = "".join(f"{key} = {toml(value)}\n" for key, value in table.items())
    found = read_text(text.encode("utf-8", "surrogatepass"), "c.toml")
    for line in (*found.wrong, *found.notes):
        assert re.match(r"c\.toml(:\d+)?: ", line), line
        assert line.isprintable()
    Registry(found.config.extra_hosts).hosts()


@quick
@given(st.binary(max_size=60) | st.text(st.sampled_from("a.[]{}='\"\\\n#, 1-"), max_size=40))
def test_any_bytes_are_accepted_or_one_line(raw: bytes | str) -> None:
    raw = raw if isinstance(raw, bytes) else raw.encode()
    found = read_text(raw, "c.toml")
    assert all(line.startswith("c.toml") for line in (*found.wrong, *found.notes))


@quick
@given(st.dictionaries(st.text("ab.\"'\n é", max_size=4), _values, max_size=4), st.booleans())
def test_each_key_stands_on_the_line_that_is_told(table: dict[str, Any], nested: bool) -> None:
    """Keys one a line, in the file or in a table of it, whatever their values hold."""
    head = "[t]\n" if nested else ""
    text = head + "".join(f"# c\n{toml(key)} = {toml(value)}\n" for key, value in table.items())
    document = toml_file.parsed(text.encode(), "c")
    for number, key in enumerate(table):
        line = 2 * number + 2 + nested
        assert document.at(*(("t", key) if nested else (key,))) == f"c:{line}"


@pytest.mark.parametrize(
    "host", ["127.0.0.1:11434", "10.0.0.7", "litellm:4000", "my_llm", "[::1]:8080", "[fe80::1]"]
)
def test_addresses_and_names_of_the_local_network_are_hosts(host: str) -> None:
    text = f'openai_compatible_hosts = ["{host}"]\n[hosts]\n"{host}" = "ollama"\n'
    assert parse(text.encode(), "c.toml").extra_hosts == {host: "ollama"}


@pytest.mark.parametrize(
    "host", ["a b", "1.2.3:x", "-", "[::1", "a:b:1", "*", "*.com", "1.2.3.999"]
)
def test_what_no_request_names_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a host name(: .*)?; write it as"):
        parse(f'openai_compatible_hosts = ["{host}"]'.encode(), "c.toml")


def test_an_entry_that_is_wrong_twice_is_one_line() -> None:
    (line,) = read_text(b'[hosts]\n"a.b" = "olama"', "c.toml").wrong
    assert 'no provider is called "olama"; did you mean "ollama"?' in line


def test_where_state_lives(tmp_path: Path) -> None:
    assert home_folder({"HALTON_METER_HOME": str(tmp_path)}) == tmp_path
    assert home_folder({"HOME": "/h"}) == Path("/h/.halton-meter")


def test_a_data_folder_that_there_is_no_telling(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no user 'nobody-of-that-name' here"):
        home_folder({"HALTON_METER_HOME": "~nobody-of-that-name/x"})


def test_known_providers_follow_a_name_that_is_like_none(tmp_path: Path) -> None:
    found = read_text(b'[hosts]\n"llm.example.com" = "zzz"\n', "c.toml")
    assert '"zzz"; known: openai, anthropic, ' in found.wrong[0]
