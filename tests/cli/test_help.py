"""Every command's help: one plain sentence, two examples that work, every option explained."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from click.testing import CliRunner

from halton_meter.cli import _COMMANDS, main
from halton_meter.store import Store
from tests.support.made import ASKED, made

FIXTURES = Path(__file__).parents[2] / "fixtures" / "pcaps"
# Commands whose help is not as these tests want it. The list is to stay empty.
_NOT_YET: frozenset[str] = frozenset()
# Words that readers of the help do not know, and what to write.
_DIALECT = {
    *("amiss", "heed", "heeds", "mend", "mends", "mended", "haste", "whose", "told", "tell"),
    *("tells", "put back", "goes out", "say", "says", "meter what"),
}
# Examples that are not run here, by their first words, and why.
_NOT_RUN = {
    "record": "captures packets: tests/lab/test_key_log.py",
    "run": "starts a metered program: root, the service or a proxy",
    "daemon": "runs until it is stopped",
    "start": "starts a service",
    "stop": "would stop a service of this machine",
    "dashboard": "runs until it is stopped",
    "metrics --serve": "runs until it is stopped",
    "tail -f": "runs until it is stopped",
    "init": "changes this user's settings (--dry-run is run)",
    "uninstall": "changes this user's settings",
    "statusline install": "changes this user's settings",
    "statusline uninstall": "changes this user's settings",
    "doctor --fix --apply": "runs commands",
    "pricing refresh --url": "network",
    "budget resume run-4711": "needs a run that was stopped",
    "logs": "there is no log",
    "man --install": "writes to the home directory",
    "config edit": "opens an editor",
    "config reload": "speaks to a service",
    "config check --system": "root's own file",
}
# Exit code 1 says that something is wrong with this machine, which is no fault of the example.
_MAY_FAIL = ("doctor", "status")

RESPONSE = {
    "id": "msg_01ABCDEFGHIJKLMN",
    "type": "message",
    "model": "claude-opus-5-5",
    "content": [],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 1000, "output_tokens": 100},
}
CHAT = {"model": "gpt-4o", "usage": {"prompt_tokens": 10, "completion_tokens": 2}}
CHAT_BYTES = json.dumps(CHAT).encode()
PRICES = """provider = "our_cloud"
compiled = 2026-12-01

[[model]]
id = "gpt-99"
names = ["gpt-99"]
source = "https://example.org/prices"
[[model.price]]
input = "2.5"
output = "10"
"""


def commands() -> Iterator[tuple[str, ...]]:
    """Every command and, of the groups, every command in them."""
    yield ()
    for name in _COMMANDS:
        yield (name,)
        command = main.get_command(click.Context(main), name)
        if isinstance(command, click.Group):
            yield from ((name, each) for each in command.commands)


def command_of(words: tuple[str, ...]) -> click.Command:
    found: click.Command = main
    for word in words:
        assert isinstance(found, click.Group)
        inner = found.get_command(click.Context(found), word)
        assert inner is not None
        found = inner
    return found


def help_of(words: tuple[str, ...]) -> str:
    done = CliRunner().invoke(main, [*words, "--help"])
    assert done.exit_code == 0
    return done.stdout


class Example(NamedTuple):
    """One line of an Examples section: the whole line, and the call of halton-meter in it."""

    line: str
    call: str

    @property
    def arguments(self) -> list[str]:
        return shlex.split(self.call)[1:]


def examples_of(words: tuple[str, ...]) -> list[Example]:
    text = help_of(words).split("Examples:\n")[1].split("\n\n")[0]
    found = []
    for line in text.splitlines():
        called = re.search(r"halton-meter(?: (?! )[^|]*?)?(?=\s{2,}|\s*\||$)", line)
        assert called, line
        found.append(Example(line.strip(), called[0].strip()))
    return found


EVERY = pytest.mark.parametrize("words", list(commands()), ids=" ".join)


def not_yet(words: tuple[str, ...]) -> None:
    if " ".join(words) in _NOT_YET:
        pytest.xfail("its help is not as it should be yet")


@EVERY
def test_help_begins_with_one_plain_sentence(words: tuple[str, ...]) -> None:
    not_yet(words)
    usage, text, *_ = help_of(words).split("\n\n")
    assert usage.startswith("Usage: ")
    first = " ".join(text.split())
    assert first[0].isupper()
    assert ". " in f"{first} "
    assert len(first.split(". ")[0]) <= 100


@EVERY
def test_help_is_in_plain_words(words: tuple[str, ...]) -> None:
    not_yet(words)
    text = " ".join(help_of(words).lower().split())
    assert [word for word in sorted(_DIALECT) if re.search(rf"\b{word}\b", text)] == []


@EVERY
def test_help_has_two_examples_of_the_command(words: tuple[str, ...]) -> None:
    not_yet(words)
    called = " ".join(("halton-meter", *words))
    assert sum(example.call.startswith(called) for example in examples_of(words)) >= 2


@EVERY
def test_every_option_is_explained(words: tuple[str, ...]) -> None:
    not_yet(words)
    for option in command_of(words).params:
        if isinstance(option, click.Option) and not option.hidden:
            assert option.help, option.name
            assert option.help.rstrip(")").endswith("."), option.help


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the examples name, and a data folder with a small store."""
    folder = tmp_path_factory.mktemp("laid-out")
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        lay_out(folder)
    return folder


@pytest.fixture
def place(laid_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, for one example."""
    folder = tmp_path / "place"
    shutil.copytree(laid_out, folder)
    enter(folder, monkeypatch)
    return folder


def enter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HALTON_METER_HOME", str(folder / "home"))
    patch.setenv("HOME", str(folder / "user"))
    patch.chdir(folder)


def lay_out(folder: Path) -> None:
    (folder / "user").mkdir()
    (folder / "traffic").mkdir()
    for name in ("capture.pcapng", "traffic/one.pcapng", "day-1.pcap"):
        shutil.copy(FIXTURES / "anthropic_message.pcapng", folder / name)
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (folder / "all.parquet").touch()
    (folder / "sslkeys.log").write_text(f"CLIENT_RANDOM {'ab' * 32} {'cd' * 48}\n")
    (folder / "response.json").write_text(json.dumps(RESPONSE))
    with tarfile.open(folder / "prices-2026-12-01.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("data/our_cloud.toml")
        member.size = len(PRICES)
        archive.addfile(member, io.BytesIO(PRICES.encode()))
    with Store(folder / "home") as store:
        event_id = "3f6c0a9d1b2e4f508192a3b4c5d6e7f8"
        store.append([made(event_id), made("b", None, model="my-model", project="misc")])
        store.append([made("c", project="api", at_ns=time.time_ns())])
        store.append([made("d", caller=replace(ASKED, session_id="01a226f5-c3ff-75a3-b4e4-0505"))])
        store.flush()
    for setting in (
        ["pricing", "set", "gpt-5*", "--provider", "openai", "--discount", "5%"],
        ["project", "set", "acme", "--path", "~/work/acme"],
        ["project", "set", "my app", "--path", "~/app"],
        ["project", "alias", "acme-old", "acme"],
        *(["budget", "set", name, "900"] for name in ("daily", "website", "models")),
    ):
        assert CliRunner().invoke(main, setting).exit_code == 0
    (folder / "config.toml.new").touch()


def reason_not_to_run(example: Example) -> str | None:
    if example.arguments[:1] == ["init"] and "--dry-run" in example.arguments:
        return None
    called = " ".join(example.arguments)
    return next(
        (why for start, why in _NOT_RUN.items() if f"{called} ".startswith(f"{start} ")), None
    )


EXAMPLES = [example for words in commands() for example in examples_of(words)]
RUN = list(dict.fromkeys(each.call for each in EXAMPLES if reason_not_to_run(each) is None))


@pytest.mark.parametrize("call", RUN)
def test_an_example_works(call: str, place: Path) -> None:
    arguments = shlex.split(call)[1:]
    through = (place / "capture.pcapng").read_bytes() if "replay" in arguments else CHAT_BYTES
    done = CliRunner().invoke(main, arguments, input=through)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    may = (0, 1) if arguments[0] in _MAY_FAIL else (0,)
    assert done.exit_code in may, done.output
    assert done.output


def test_what_is_not_run_is_an_example() -> None:
    calls = [" ".join(example.arguments) for example in EXAMPLES]
    for start in _NOT_RUN:
        assert any(f"{call} ".startswith(f"{start} ") for call in calls), start


def test_run_says_what_it_does_and_when_sudo_is_needed() -> None:
    text = help_of(("run",))
    assert "Meter one command and print what it cost" in text
    assert "sudo halton-meter run -- " in text
