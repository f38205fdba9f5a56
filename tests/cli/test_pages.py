"""Manual pages, completion and `version`: what is drawn of the commands' own help."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from halton_meter import __version__
from halton_meter.cli import _COMMANDS, main
from halton_meter.cli.pages import NAME, Page, manual_page, page, pages
from tests.support.made import made


def run(*arguments: str, code: int = 0) -> Result:
    done = CliRunner().invoke(main, arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code, done.output
    return done


# --- manual pages ---------------------------------------------------------------------------------

needs_man = pytest.mark.skipif(shutil.which("man") is None, reason="no man here")
EVERY = list(pages(NAME, main))


def read_by_man(path: Path) -> str:
    """What a reader sees; a warning of groff's is a failure."""
    done = subprocess.run(
        ["man", "--warnings", "-l", str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MANWIDTH": "100", "LC_ALL": "C.UTF-8", "MAN_KEEP_FORMATTING": ""},
    )
    assert done.stderr == ""
    return re.sub(r".\x08|\x1b\[[0-9;]*m", "", done.stdout)


@needs_man
@pytest.mark.parametrize("words", ["", "report", "config set", "completion"])
def test_man_shows_what_the_help_says(words: str, tmp_path: Path) -> None:
    each = next(one for one in EVERY if one.words == f"{NAME} {words}".strip())
    path = tmp_path / "page.1"
    path.write_text(manual_page(each, __version__, ""))
    text = joined(read_by_man(path))
    for paragraph in each.paragraphs:
        assert joined(paragraph) in text
    for option in each.options:
        assert joined(option.typed) in text
    for example in each.examples:
        assert joined(re.split(r"\s{2,}", example)[0]) in text
    assert "EXITSTATUS" in text


def joined(text: str) -> str:
    """Without what a formatter puts between words, and within long ones."""
    return re.sub(r"[\s\N{HYPHEN}-]", "", text.replace("…", "..."))


@needs_man
def test_all_pages_install_and_read_without_a_warning(tmp_path: Path) -> None:
    said = run("man", "--install", "--folder", str(tmp_path / "man1")).stdout
    assert f"{len(EVERY)} pages written" in said
    written = sorted(path.name for path in (tmp_path / "man1").iterdir())
    assert written == sorted(f"{each.words.replace(' ', '-')}.1" for each in EVERY)
    together = tmp_path / "all.1"
    together.write_text("".join((tmp_path / "man1" / name).read_text() for name in written))
    assert "NAME" in read_by_man(together)


def test_a_line_of_a_help_text_cannot_be_a_request_of_roffs() -> None:
    hostile = Page(f"{NAME} x", f"{NAME} x [OPTIONS]", (".so /etc/passwd", "a\\fB-b"), (), (), ())
    drawn = manual_page(hostile, "1", "")
    assert "\n.so" not in drawn
    assert "\\&.so /etc/passwd" in drawn
    assert "a\\efB\\-b" in drawn


def test_man_prints_roff_where_nobody_reads(tmp_path: Path) -> None:
    assert run("man", "config", "set").stdout.startswith('.\\" Written from')
    assert "there is no command nothing" in run("man", "nothing", code=2).stderr
    assert "name no command" in run("man", "report", "--install", code=2).stderr
    assert "--folder needs --install" in run("man", "--folder", str(tmp_path), code=2).stderr
    (tmp_path / "file").touch()
    done = run("man", "--install", "--folder", str(tmp_path / "file" / "x"), code=1)
    assert "cannot be written" in done.stderr


def test_the_overview_names_every_command() -> None:
    drawn = run("man").stdout
    for name in _COMMANDS:
        assert f".B {name}\n" in drawn
    assert page(NAME, main).summary == "Know exactly what your AI tools spend"


# --- completion -----------------------------------------------------------------------------------


@pytest.fixture
def path() -> str:
    """A PATH on which our program is."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def completed(words: list[str], path: str) -> list[str]:
    """What bash offers for the last of these words."""
    script = (
        f"source <({NAME} completion bash); COMP_WORDS=({' '.join(words)}); "
        f"COMP_CWORD={len(words) - 1}; _halton_meter_completion {NAME}; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_options_and_choices(path: str) -> None:
    assert completed([NAME, "re"], path) == [
        *("replay", "redact", "report", "reprice", "retag", "record")
    ]
    assert completed([NAME, "config", "c"], path) == ["check"]
    assert "--vs-previous" in completed([NAME, "report", "--v"], path)
    assert completed([NAME, "logs", "--via", "u"], path) == ["uprobes"]
    assert set(completed([NAME, "''"], path)) == set(_COMMANDS)


@pytest.mark.parametrize(
    ("shell", "check"), [("zsh", ["zsh", "-n"]), ("fish", ["fish", "--no-execute"])]
)
def test_other_shells_read_their_script(shell: str, check: list[str], tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(run("completion", shell).stdout)
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    done = subprocess.run([*check, str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_to_complete_a_commands_name_imports_no_command() -> None:
    code = (
        "import sys; from halton_meter.cli import main\n"
        "import click; main.shell_complete(click.Context(main), '')\n"
        "print([m for m in sys.modules if m.startswith('halton_meter.cli.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['halton_meter.cli.streams']"


def test_tab_behind_run_makes_no_folder(tmp_path: Path, path: str) -> None:
    """As `run` does where the data folder can be none."""
    (tmp_path / "file").touch()
    environment = {**os.environ, "PATH": path, "HALTON_METER_HOME": str(tmp_path / "file" / "x")}
    environment |= {"_HALTON_METER_COMPLETE": "bash_complete", "TMPDIR": str(tmp_path)}
    environment |= {"COMP_WORDS": f"{NAME} run --v", "COMP_CWORD": "2"}
    done = subprocess.run([NAME], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("plain,--via\n", "")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


# --- version --------------------------------------------------------------------------------------


def test_version_says_what_it_runs_on_and_nothing_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halton_meter.store import Store

    home = tmp_path / "home"
    monkeypatch.setenv("HALTON_METER_HOME", str(home))
    with Store(home) as store:
        store.append([made("a", project="secret-project", host="secret.example.com")])
        store.flush()
    (home / "config.toml").write_text('openai_compatible_hosts = ["secret.example.com"]\n')
    assert run("version").stdout == f"halton-meter {__version__}\n"
    told = json.loads(run("version", "--verbose", "--json").stdout)
    assert told["version"] == __version__
    assert told["schema"] == told["database_schema"]
    assert (told["settings"], told["own_prices"]) == ("sound", 0)
    assert re.match(r"\d{4}-\d{2}-\d{2}-", told["price_book"])
    text = run("version", "-v").stdout
    assert "secret" not in text
    assert f"duckdb{' ' * 15}" in text


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/home/ann/.local/lib", "~/.local/lib"),
        ("/Users/ann/Library", "~/Library"),
        ("/root/.venv", "~/.venv"),
        ("/opt/halton-meter", "/opt/halton-meter"),
    ],
)
def test_no_users_name_is_in_a_path(path: str, shown: str) -> None:
    from halton_meter.cli.version import _public

    assert _public(path) == shown


def test_a_machine_that_tells_nothing_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("nothing")

    for name in (
        "capture.environment.check_environment",
        "pricing.book.PriceBook.load",
        "importlib.metadata.version",
    ):
        monkeypatch.setattr(name, refuse)
    told = json.loads(run("version", "-v", "--json").stdout)
    assert (told["uprobes_lack"], told["duckdb"], told["price_book"]) == (None, None, None)
