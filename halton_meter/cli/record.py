"""`halton-meter record FILE -- CMD…`: a capture of a command's provider connections, with secrets.

The command is metered as by `run` with the same --via. Exit codes are those of `run`; 1
also when the file cannot be made, in which case the command was not started.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from halton_meter.cli.named import FilePath
from halton_meter.cli.output import count, fail, look_at, note, wrong_usage
from halton_meter.cli.run import summary_lines, through_key_log, through_own_probes, through_proxy
from halton_meter.live.result import NO_LIMIT, Recorded
from halton_meter.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from halton_meter.live.result import RunResult

VIA = ("keylog", "uprobes", "proxy")
EXISTS = "exists"
EXAMPLES = """
    \b
    Examples:
      sudo halton-meter record models.pcapng -- curl https://api.anthropic.com/v1/models
      sudo halton-meter record capture.pcapng -- python app.py
      sudo halton-meter record report.pcapng --redact -- python app.py
      sudo halton-meter record claude.pcapng --via uprobes -- claude -p hello
      halton-meter replay capture.pcapng              what was recorded, priced
"""


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=EXAMPLES,
)
@click.option("--quiet", is_flag=True, help="Print no summary.")
@click.option(
    "--via",
    type=click.Choice(VIA),
    default="keylog",
    help="keylog (default): the packets as they were; the command must write its TLS keys (curl, "
    "Python, Node, browsers). uprobes: what its TLS library was given, also where it writes no "
    "keys (Claude Code, Codex). proxy: what passed a local proxy, without credentials and without "
    "root. For these two, packets are made anew.",
)
@click.option(
    "--redact",
    "redacted",
    is_flag=True,
    help="Keep no text and no credential: a file for a bug report, as `redact` makes it.",
)
@click.argument("file", type=FilePath(path_type=Path))
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def record(
    *, file: Path, command: tuple[str, ...], via: str, quiet: bool, redacted: bool
) -> NoReturn:
    """Record one command's connections to providers in a pcapng file, with their TLS secrets.

    The file holds prompts, answers and credentials: only you may read it. `replay` prices it
    without a key log. Other programs' connections, and the command's to other hosts, are left out.
    With --redact every text becomes filler before the file is written: see `halton-meter redact`.
    The command is also metered, as by run. Packets and probes need sudo.
    """
    from halton_meter.problem import Unavailable
    from halton_meter.settings.config import ConfigError

    while command and command[0] in ("--redact", "--quiet", "--via"):  # behind the file
        redacted, quiet = redacted or command[0] == "--redact", quiet or command[0] == "--quiet"
        if command[0] == "--via":
            via, command = command[1] if len(command) > 1 else "", command[1:]
        command = command[1:]
    if via not in VIA:
        wrong_usage(f"--via must be one of {', '.join(VIA)}, not {via!r}")
    if command[:1] == ("--",):
        command = command[1:]
    if not command:
        wrong_usage("record needs a command", "halton-meter record FILE -- claude -p hello")
    try:
        if redacted:
            result, lines = _redacted(command, file, via)
        else:
            result = _recorded(command, via, file, lambda: file, _as_root(file, via))
            lines = _recorded_lines(result, file, via)
    except FileExistsError:
        fail(Problem(f"{file} exists already", "name a new file"))
    except OSError as error:
        what = f"{file} cannot be written: {error.strerror or error}"
        fail(Problem(what, look_at(error, file.parent, "name another file")))
    except (Unavailable, ConfigError) as error:
        fail(*error.problems)
    if not quiet:
        note("\n".join([*summary_lines(result), *lines]))
    sys.exit(result.exit_code)


def _recorded(
    command: tuple[str, ...], via: str, file: Path, place: Callable[[], Path], fix: str
) -> RunResult:
    """Run the command; the recording is in `place()`, asked as the user, on its way to `file`.

    `fix` is the call that has the right to.
    """
    if via == "keylog":
        return _of_packets(command, place, fix)
    from halton_meter.accounts import invoking_account
    from halton_meter.live import kept_plaintext
    from halton_meter.privileges import as_account, settle

    if via == "proxy":
        settle(needs_root=False)

    if refused := as_account(invoking_account(), lambda: _refusal(file)):
        raise FileExistsError(file) if refused == EXISTS else OSError(0, refused)
    with tempfile.TemporaryFile() as kept:
        if via == "proxy":
            result = through_proxy(command, NO_LIMIT, record_fd=kept.fileno())
        else:
            result = through_own_probes(command, kept.fileno(), fix)
        found = kept_plaintext.read(kept.fileno())
    size = 0, 0
    if found.items:
        target = place()
        try:
            size = kept_plaintext.write(found.items, target)
        except OSError as error:  # no file; what the command spent is told all the same
            if not isinstance(error, FileExistsError):
                target.unlink(missing_ok=True)
            note("\n".join(summary_lines(result)))
            raise
    result.recorded = Recorded(*size, found.error)
    return result


def _as_root(file: Path, via: str, redacted: bool = False) -> str:
    """The same call, with the right to see packets or to attach probes."""
    named = f"{shlex.quote(str(file))}{' --redact' * redacted}"
    if via == "keylog":
        return f"sudo halton-meter record {named} -- CMD"
    return (
        f"sudo halton-meter record {named} --via uprobes -- CMD\n"
        f"or: halton-meter record {named} --via proxy -- CMD"
    )


def _of_packets(command: tuple[str, ...], place: Callable[[], Path], fix: str) -> RunResult:
    """By the key log. A file that nothing was recorded in goes again."""
    places: list[Path] = []

    def placed() -> Path:
        places.append(place())
        return places[0]

    result = through_key_log(command, placed, fix)
    if result.recorded == Recorded(0, 0, None):
        with contextlib.suppress(OSError):
            places[0].unlink()
    return result


def _refusal(file: Path) -> str | None:
    """Why the file will not be made; before the command runs, not when it has ended."""
    try:
        if file.lstat():
            return EXISTS
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # too long a name, a folder that may not be entered
        return error.strerror or type(error).__name__
    if not file.parent.is_dir():
        return f"{file.parent} is no folder"
    return None if os.access(file.parent, os.W_OK) else f"{file.parent} is not yours to write in"


def _recorded_lines(result: RunResult, file: Path, via: str) -> list[str]:
    done = result.recorded
    if done is None:
        return []
    if not done.connections and not done.error:
        nothing = f"  nothing was recorded, so there is no {file}"
        if _made_none(result):
            return [f"{nothing}: the command made no connection to a provider"]
        other = "uprobes" if via == "keylog" else "keylog"
        named = shlex.quote(str(file))
        return [nothing, f"  Use: sudo halton-meter record {named} --via {other} -- CMD"]
    holds = "prompts and answers" if via == "proxy" else "prompts and credentials"
    what = f"{count(done.connections, 'connection')}, {count(done.packets, 'packet')}"
    lines = [f"  recorded: {what} in {file}; it holds {holds}", *_not_whole(result)]
    lines.append(f"  Use: halton-meter replay {shlex.quote(str(file))}")
    return lines


def _made_none(result: RunResult) -> bool:
    """Whether no connection to a provider was seen, metered or not."""
    seen = result.connections
    return seen is not None and seen.is_known is not False and not seen.parts


def _redacted(command: tuple[str, ...], file: Path, via: str) -> tuple[RunResult, list[str]]:
    """Run the command; what was recorded is kept in a folder of ours until it is redacted."""
    from halton_meter.cli.redact import made, told
    from halton_meter.live.keylog.private_folder import RECORDING, private_folder

    places: list[Path] = []
    with contextlib.ExitStack() as stack:

        def place() -> Path:
            if refused := _refusal(file):
                raise FileExistsError(file) if refused == EXISTS else OSError(0, refused)
            folder = stack.enter_context(private_folder(RECORDING))
            places.append(folder / "recorded.pcapng")
            return places[0]

        result = _recorded(command, via, file, place, _as_root(file, via, redacted=True))
        if result.recorded is not None and not result.recorded.connections:
            why = ": the command made no connection to a provider" if _made_none(result) else ""
            return result, [f"  nothing was recorded, so there is nothing to redact{why}"]
        try:
            done = made(places[0], file, is_ours=True)
        except SystemExit:  # no file; what the command spent is told all the same
            note("\n".join(summary_lines(result)))
            raise
    lines = [f"  {line}" if at == 0 else line for at, line in enumerate(told(done, file))]
    return result, [*lines, *_not_whole(result)]


def _not_whole(result: RunResult) -> list[str]:
    """Why the recording ends before the command did, if it does."""
    assert result.recorded is not None
    causes = [result.recorded.error, *(cause for _, _, cause in result.outages)]
    if cut := result.recorded.without_beginning:
        late = f"{count(cut, 'connection')} without the beginning, as the keys came too late"
        causes.append(f"{late}. Use: --via uprobes")
    return [f"  the recording is not whole: {each}" for each in causes if each]
