"""Under sudo a command is the person's: whom it runs as, and that no name leads root astray."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from halton_meter.cli import _COMMANDS
from tests.support.person.place import REPOSITORY, Done, Place
from tests.support.person.world import (
    FOLDERS,
    KINDS,
    PLANTABLE,
    REFUSED_LINE,
    Watch,
    digest,
    give,
    is_known,
    make_template,
    plant,
)
from tests.support.quick import every, first, slow

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root can look like sudo"
)
CAPTURE = REPOSITORY / "fixtures" / "pcaps" / "anthropic_count_tokens.pcapng"

# How each command is called here, in an order that makes sense: what needs events comes after
# what brings them. "UNTIL" is what a command that does not end by itself says when it is ready.
CALLS: tuple[tuple[str, ...], ...] = (
    ("replay", str(CAPTURE), "--store", "--quiet"),
    ("events", "--json"),
    ("redact", str(CAPTURE), "redacted.pcapng"),
    ("inspect", "--json", str(CAPTURE)),
    ("tail", "--json"),
    ("top", "--json"),
    ("report",),
    ("session", "list"),
    ("session", "show", "latest"),
    ("dashboard",),
    ("metrics", "--output", "halton.prom"),
    *(("export", form, f"out.{form}", "--force") for form in ("sqlite", "csv", "parquet", "jsonl")),
    ("pricing", "status"),
    ("pricing", "list", "openai"),
    ("pricing", "explain", "answer.json"),
    ("pricing", "set", "gpt-5*", "--discount", "20%"),
    ("pricing", "reset", "--all"),
    ("pricing", "refresh", "--undo"),
    ("reprice", "--dry-run"),
    ("reprice",),
    ("retag", "--from", "old", "--to", "new", "--apply"),
    ("budget", "set", "daily", "20", "--per", "day"),
    ("budget", "list"),
    ("budget", "status"),
    ("budget", "check"),
    ("budget", "resume"),
    ("budget", "remove", "daily"),
    ("purge", "--before", "9000d", "--yes"),
    ("project", "list"),
    ("project", "set", "new", "--path", "/src"),
    ("project", "show", "new"),
    ("project", "alias", "old", "new"),
    ("project", "remove", "new"),
    ("config", "get"),
    ("config", "set", "retention_days", "9000"),
    ("config", "unset", "retention_days"),
    ("config", "path"),
    ("config", "edit"),
    ("config", "check"),
    ("config", "reload"),
    ("plan", "--json"),
    ("prompt",),
    ("statusline",),
    ("statusline", "install"),
    ("statusline", "uninstall"),
    ("run", "--json-summary", "summary.json", "--", "true"),
    ("run", "--via", "proxy", "--", "true"),
    ("record", "recorded.pcapng", "true"),
    ("daemon", "--foreground"),
    ("daemon", "--foreground", "--via", "proxy", "--port", "18231"),
    ("daemon", "--foreground", "--via", "keylog"),
    ("start",),
    ("start", "--via", "proxy"),
    ("status",),
    ("logs",),
    ("completion", "bash"),
    ("man", "report"),
    ("version", "--verbose"),
    ("doctor",),
    ("doctor", "--fix"),
    ("stop", "--via", "proxy"),
    ("stop", "--via", "keylog"),
    ("stop",),
    ("init", "--dry-run"),
    ("init", "--env-only", "--non-interactive"),
    ("uninstall",),
    ("uninstall", "--purge", "--yes"),
)
UNTIL = {"dashboard": "Ctrl-C: stop", "daemon": "listens on"}
# The only ones that root stays root for; every other command, also a new one, is the person's.
ROOTS = {
    ("run", "--json-summary"),
    ("record",),
    ("daemon", "--foreground"),
    ("start",),
    ("stop",),
    ("config", "reload"),
    ("init", "--dry-run"),
}


def stays_root(call: Sequence[str]) -> bool:
    if call == ("stop", "--via", "keylog"):  # the key log service is the person's
        return False
    return "proxy" not in call and (call[:2] in ROOTS or call[:1] in ROOTS)


def sudo(place: Place, call: Sequence[str], **options: Any) -> Done:
    until = "metering into" if call[0] == "daemon" and "keylog" in call else UNTIL.get(call[0])
    return place.run(*call, until=until, **options)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with Place() as made:
        yield made


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "data"
    make_template(folder)
    return folder


@pytest.fixture(autouse=True)
def clean(place: Place) -> Iterator[None]:
    """A person without data, and nothing foreign from the test before."""
    yield
    place.end_all()
    for person in (place.ann, place.bob):
        if person.data.is_symlink():
            person.data.unlink()
        shutil.rmtree(person.data, ignore_errors=True)
    empty(place.foreign)
    empty(place.root)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir(mode=0o755)


def theirs(place: Place) -> list[Any]:
    """What must stay as it is whatever ann's commands do."""
    return [digest(folder) for folder in (place.foreign, place.root, place.bob.home)]


def test_every_command_and_subcommand_is_called_here() -> None:
    import click

    from halton_meter.cli import main

    assert {call[0] for call in CALLS} == set(_COMMANDS)
    for name in _COMMANDS:
        command = main.get_command(click.Context(main), name)
        if isinstance(command, click.Group):
            wanted = set(command.list_commands(click.Context(command)))
            called = {call[1] for call in CALLS if call[0] == name and len(call) > 1}
            assert called == wanted


# --- who it is ------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_a_command_is_the_person_unless_the_table_says_root(
    place: Place, call: tuple[str, ...]
) -> None:
    done = place.run(*call, before="only_tell_who")
    assert done.code == 0, done.err
    who = json.loads(done.out.splitlines()[-1])
    assert who["data"] == str(place.ann.data)
    if stays_root(call):
        assert who["uids"] == [0, 0, 0]
        return
    ann = place.ann.uid
    assert (who["uids"], who["gids"]) == ([ann] * 3, [ann] * 3)
    assert who["groups"] == [ann, 64_100], "all of the person's groups, and none of root's"
    assert who["home"] == str(place.ann.home)
    assert not who["can_return"]


def test_java_means_the_proxy_and_needs_no_root(place: Place) -> None:
    done = place.run("run", "--java", "true", before="only_tell_who")
    assert json.loads(done.out.splitlines()[-1])["uids"] == [place.ann.uid] * 3


@pytest.mark.parametrize(
    "caller",
    [{"SUDO_UID": None, "PKEXEC_UID": "64001"}, {"SUDO_UID": None, "DOAS_USER": "ann"}],
    ids=["pkexec", "doas"],
)
def test_other_ways_to_become_root_count_as_well(
    place: Place, caller: dict[str, str | None]
) -> None:
    done = place.run("report", before="only_tell_who", env=place.under_sudo(**caller))
    assert json.loads(done.out.splitlines()[-1])["uids"] == [place.ann.uid] * 3


@pytest.mark.parametrize("call", [("report",), ("run", "true")], ids=["person", "root"])
@pytest.mark.parametrize("uid", ["64009", "-1", "4294967295", "99999999999999999999", "ann", "٣"])
def test_a_caller_who_is_nobody_is_refused(place: Place, uid: str, call: tuple[str, ...]) -> None:
    done = place.run(*call, env=place.under_sudo(SUDO_UID=uid))
    assert done.code == 1
    assert "SUDO_UID is" in done.err
    assert "env -u SUDO_UID" in done.err
    assert not place.ann.data.exists()


@pytest.mark.parametrize("uid", [None, "0", ""])
def test_root_itself_stays_root_in_its_own_folder(place: Place, uid: str | None) -> None:
    env = place.under_sudo(SUDO_UID=uid, SUDO_USER=None)
    who = json.loads(place.run("report", before="only_tell_who", env=env).out.splitlines()[-1])
    assert who["uids"] == [0, 0, 0]
    assert who["data"] == str(place.root / ".halton-meter")


# --- whose folder it is ---------------------------------------------------------------------------


def test_root_without_sudo_is_the_owner_of_the_folder_it_works_in(
    place: Place, template: Path
) -> None:
    data = give(place.ann, template)
    env = place.under_sudo(SUDO_UID=None, HALTON_METER_HOME=str(data))
    who = json.loads(place.run("report", before="only_tell_who", env=env).out.splitlines()[-1])
    assert (who["uids"], who["data"]) == ([place.ann.uid] * 3, str(data))


def test_root_without_sudo_keeps_the_folder_when_its_owner_has_no_entry(
    place: Place, template: Path
) -> None:
    data = give(place.bob, template)
    data.parent.chmod(0o755)
    for path in (data.parent, data, *data.rglob("*")):
        os.chown(path, 64_999, 64_998)
    env = place.under_sudo(SUDO_UID=None, HOME=str(data.parent))  # as in a container
    who = json.loads(place.run("report", before="only_tell_who", env=env).out.splitlines()[-1])
    os.chown(data.parent, place.bob.uid, place.bob.uid)
    assert (who["uids"], who["gids"], who["groups"]) == ([64_999] * 3, [64_998] * 3, [64_998])
    assert who["data"] == str(data)


@pytest.mark.parametrize("way", ["the folder", "a folder on the way", "a link of root's to a link"])
def test_a_link_on_the_way_makes_it_the_links_owner(place: Place, way: str) -> None:
    trap = place.foreign / "etc"
    (trap / "data").mkdir(parents=True)
    link = place.ann.home / "link"
    link.symlink_to(trap / "data" if way == "the folder" else trap)
    os.chown(link, place.ann.uid, place.ann.uid, follow_symlinks=False)
    home = {"the folder": link, "a folder on the way": link / "data"}.get(way)
    if home is None:
        (place.root / "data").symlink_to(link)
        home = place.root / "data" / "data"
    before = theirs(place)
    done = place.run("replay", str(CAPTURE), "--store",
                     env=place.under_sudo(SUDO_UID=None, HALTON_METER_HOME=str(home)))  # fmt: skip
    link.unlink()
    assert theirs(place) == before
    assert done.code == 1
    assert "belongs to uid 0, and this command acts as ann" in done.err
    assert "a folder or link of ann's leads there" in done.err
    assert "use another folder: HALTON_METER_HOME=" in done.err
    assert "chown" not in done.err, "root would give away where the link leads"


def test_root_in_its_own_folder_within_a_users_is_told_why_and_a_way(place: Place) -> None:
    data = place.ann.home / "data"
    data.mkdir()
    done = place.run("report", env=place.under_sudo(SUDO_UID=None, HALTON_METER_HOME=str(data)))
    data.rmdir()
    assert done.code == 1
    assert "this command acts as ann" in done.err
    assert "a folder or link of ann's leads there" in done.err
    assert f"sudo chown -Rh {place.ann.uid}:" in done.err


@pytest.mark.parametrize("call", every(4, zip(CALLS)), ids=" ".join)
def test_the_folder_of_a_third_user_is_refused(
    place: Place, template: Path, call: tuple[str, ...]
) -> None:
    data = give(place.bob, template)
    data.chmod(0o755)
    before = theirs(place)
    done = sudo(place, call, env=place.under_sudo(HALTON_METER_HOME=str(data)))
    assert theirs(place) == before
    assert done.code == 1
    assert f"{data} belongs to uid {place.bob.uid}, and this command acts as ann" in done.err
    assert f"sudo -u '#{place.bob.uid}'" in done.err


def test_a_service_told_whose_it_is_may_keep_state_below_a_third_users_folder(
    place: Place, template: Path
) -> None:
    data = place.bob.home / "team"
    shutil.copytree(template, data)
    os.chown(data, place.ann.uid, place.ann.uid)
    env = place.under_sudo(SUDO_UID=None, HALTON_METER_HOME=str(data))  # as systemd starts it
    done = place.run("daemon", "--foreground", "--owner", "ann", env=env)
    shutil.rmtree(data)
    assert "lacks SYS_PTRACE" in done.err, "it came as far as attaching"


def test_a_program_that_the_person_cannot_read_is_named_with_what_to_do(place: Place) -> None:
    done = place.run("report", before="hide_the_program")
    assert done.code == 1
    assert "ann, who cannot read" in done.err
    assert "sudo python3 -m venv /opt/halton-meter" in done.err


# --- one folder, and everything in it the person's ------------------------------------------------


def test_all_commands_under_sudo_work_in_the_persons_folder(place: Place) -> None:
    before = theirs(place)
    place.ann.data.mkdir(mode=0o700)
    os.chown(place.ann.data, place.ann.uid, place.ann.uid)
    watch = Watch(place.ann.data)
    for name in FOLDERS:
        os.chown(place.ann.data / name, place.ann.uid, place.ann.uid)
    seen: set[str] = set()
    for call in CALLS:
        done = sudo(place, call)
        seen |= set(watch.names())
        # This root may not attach.
        failed = stays_root(call) and call[0] not in ("stop", "record", "init")
        failed = failed and "keylog" not in call
        # "status" tells that no service runs; there is no terminal to edit in.
        unsure = call[0] in ("status", "logs", "record") or call[:2] in (
            ("config", "edit"),
            ("session", "show"),  # none is stored
        )
        allowed = {1} if failed else {0, 1} if unsure else {0}
        assert done.code in allowed, (call, done)
        assert "killed" not in done.err
        for path in (place.ann.home, *place.ann.home.rglob("*")):
            assert path.lstat().st_uid == place.ann.uid, (call, path)
    watch.close()
    assert theirs(place) == before
    assert {name for name in seen if not is_known(name)} == set()
    assert {"meter.duckdb", "daemon.log", "changes.json"} <= seen


def test_what_was_metered_under_sudo_is_in_the_report_of_both(place: Place) -> None:
    place.run("replay", str(CAPTURE), "--store", "--quiet")
    with_sudo = place.run("report")
    without = place.run("report", before="be_ann")
    assert with_sudo == without
    assert "1 request" in with_sudo.out


# --- traps ----------------------------------------------------------------------------------------

TRAPPED = [call for call in CALLS if call[0] not in ("init", "uninstall") or "--dry-run" in call]


@pytest.mark.parametrize(
    ("database", "kind"),
    [
        ("a trap", "symlink"),
        slow("a trap", "folder link"),
        slow("whole", "hard link"),
        slow("a trap", "dangling"),
        slow("a trap", "hard link"),
        slow("whole", "symlink"),
        slow("whole", "dangling"),
        slow("whole", "folder link"),
    ],
)
def test_no_command_is_led_to_a_foreign_file(
    place: Place, template: Path, kind: str, database: str
) -> None:
    names = [name for name in PLANTABLE if kind != "folder link" or name in FOLDERS]
    if database == "whole":  # so that what comes after it is reached, too
        names = [n for n in names if not n.startswith("meter.duckdb") and n != "config.toml"]
        names.remove("journal")
    elif "journal/refused" in names:
        names.remove("journal/refused")
    for call in TRAPPED:
        if database == "a trap" and "proxy" in call:
            continue  # it opens no database, and takes its time
        data = give(place.ann, template)
        plant(kind, names, data, place.foreign, place.ann.uid)
        before = theirs(place)
        env = place.under_sudo(HALTON_METER_HOME=str(data))
        done = sudo(place, call, env=env, before="be_impatient")
        place.end_all()
        assert theirs(place) == before, (call, done)
        assert "killed" not in done.err, call
        assert "no user here" not in done.err, call
        empty(place.foreign)


PIPES = ["config.toml", "daemon.log", "daemon.sock", "daemon.lock", "journal/refused"]


@pytest.mark.parametrize(
    ("call", "name"), every(7, itertools.product(filter(stays_root, CALLS), PIPES))
)
def test_root_does_not_wait_at_a_pipe(
    place: Place, template: Path, call: tuple[str, ...], name: str
) -> None:
    data = give(place.ann, template)
    plant("pipe", [name], data, place.foreign, place.ann.uid)
    done = sudo(place, call, seconds=20.0, before="be_impatient")
    place.end_all()
    assert "killed" not in done.err


@pytest.mark.parametrize("whose", first(["root", "bob"]))
@pytest.mark.parametrize("call", every(8, zip(TRAPPED)), ids=" ".join)
def test_a_data_folder_that_is_a_link_leads_nowhere(
    place: Place, template: Path, call: tuple[str, ...], whose: str
) -> None:
    target = place.foreign / "data"
    shutil.copytree(template, target)
    if whose == "bob":
        for path in (target, *target.rglob("*")):
            os.chown(path, place.bob.uid, place.bob.uid)
    place.ann.data.symlink_to(target)
    os.chown(place.ann.data, place.ann.uid, place.ann.uid, follow_symlinks=False)
    before = theirs(place)
    done = sudo(place, call)
    assert theirs(place) == before
    assert done.code == 1
    assert "and this command acts as ann" in done.err


OPEN_THE_STORE = [
    ("report",),
    ("events", "--json"),
    ("export", "csv", "out.csv", "--force"),
    ("pricing", "status"),
    ("reprice", "--dry-run"),
]


@pytest.mark.parametrize("call", first(OPEN_THE_STORE, 2), ids=" ".join)
def test_a_refused_line_is_appended_to_no_file_of_roots(
    place: Place, template: Path, call: tuple[str, ...]
) -> None:
    data = give(place.ann, template)
    plant("symlink", ["journal/refused"], data, place.foreign, place.ann.uid)
    before = theirs(place)
    done = place.run(*call, env=place.under_sudo(HALTON_METER_HOME=str(data)))
    assert theirs(place) == before
    assert done.code == 0, done.err
    refused = data / "journal" / "refused"
    assert refused.lstat().st_uid == place.ann.uid
    assert refused.read_bytes() == REFUSED_LINE, "it is kept, in a file of ann's"


@pytest.mark.parametrize("call", first(OPEN_THE_STORE, 2), ids=" ".join)
def test_no_database_is_made_where_a_link_leads(
    place: Place, template: Path, call: tuple[str, ...]
) -> None:
    data = give(place.ann, template)
    plant("dangling", ["meter.duckdb"], data, place.foreign, place.ann.uid)
    before = theirs(place)
    done = place.run(*call, env=place.under_sudo(HALTON_METER_HOME=str(data)))
    assert theirs(place) == before
    assert "Traceback" not in done.err


@pytest.mark.parametrize("call", first(OPEN_THE_STORE, 2), ids=" ".join)
def test_no_file_of_roots_is_overwritten_as_the_databases_log(
    place: Place, template: Path, call: tuple[str, ...]
) -> None:
    data = give(place.ann, template)
    plant("symlink", ["meter.duckdb.wal"], data, place.foreign, place.ann.uid)
    before = theirs(place)
    done = place.run(*call, env=place.under_sudo(HALTON_METER_HOME=str(data)))
    assert theirs(place) == before
    assert "Traceback" not in done.err


# --- what stays root and speaks to the person's service -------------------------------------------


@pytest.mark.parametrize("call", [("stop",), ("start",), ("run", "true")], ids=" ".join)
def test_root_says_nothing_to_a_socket_of_another_users(
    place: Place, template: Path, call: tuple[str, ...]
) -> None:
    data = give(place.ann, template)
    (data / "daemon.sock").symlink_to(place.foreign / "control")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place.foreign / "control"))
        listener.listen()
        listener.settimeout(10.0)
        place.run(*call)
        connection, _ = listener.accept()
        assert connection.recv(4096) == b""


@pytest.fixture(scope="module")
def probed() -> Iterator[Place]:
    with Place(probes=True) as made:
        yield made


@pytest.mark.kernel
def test_the_service_of_root_leaves_only_files_of_the_persons(probed: Place) -> None:
    data = probed.ann.data
    data.mkdir(mode=0o700)
    os.chown(data, probed.ann.uid, probed.ann.uid)
    before, watch = theirs(probed), Watch(data)
    for name in FOLDERS:
        os.chown(data / name, probed.ann.uid, probed.ann.uid)
    try:
        for call in (
            ("start",),
            ("status",),
            ("budget", "set", "daily", "20", "--per", "day"),
            ("budget", "status"),
            ("plan", "--json"),
            ("prompt",),
            ("statusline",),
            ("statusline", "install"),
            ("statusline", "uninstall"),
            ("run", "--json-summary", "summary.json", "--", "true"),
            ("stop",),
            ("run", "--", "true"),
        ):
            done = probed.run(*call)
            assert done.code == 0, (call, done)
            for path in (probed.ann.home, *probed.ann.home.rglob("*")):
                assert path.lstat().st_uid == probed.ann.uid, (call, path)
    finally:
        probed.end_all()
    seen = set(watch.names())
    watch.close()
    assert theirs(probed) == before
    assert {name for name in seen if not is_known(name)} == set()
    assert {"daemon.sock", "daemon.lock", "daemon.state", "daemon.log"} <= seen
    assert any(name.startswith(".daemon.state.") for name in seen)


@pytest.mark.kernel
@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pipe"])
def test_no_probing_command_is_led_to_a_foreign_file(
    probed: Place, template: Path, kind: str
) -> None:
    names = [n for n in PLANTABLE if kind != "folder link" or n in FOLDERS]
    for skipped in ((), ("config.toml", "daemon.log", "journal")):
        for call in (("run", "--", "true"), ("start",), ("stop",)):
            data = give(probed.ann, template)
            chosen = [n for n in names if n not in skipped and n != "journal/refused"]
            plant(kind, chosen, data, probed.foreign, probed.ann.uid)
            before = theirs(probed)
            done = probed.run(*call)
            probed.end_all()
            assert theirs(probed) == before, (call, done)
            empty(probed.foreign)


# --- and without root -----------------------------------------------------------------------------


def test_who_is_not_root_pays_nothing_for_it() -> None:
    program = (
        "import os, sys\n"
        "from halton_meter.cli import main\n"
        "os.setresuid(64001, 64001, 64001)\n"
        "try: main(['--version'])\n"
        "except SystemExit: pass\n"
        "loaded = ('halton_meter.privileges', 'halton_meter.settings.config')\n"
        "print(*(each in sys.modules for each in loaded))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["False False"], done.stderr
