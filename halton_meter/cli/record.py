"""`halton-meter record FILE -- CMD…`: a capture of a command's provider connections, with secrets.

The command is metered as by `run --via keylog`. Exit codes are those of `run`; 1 also when the file
cannot be made, in which case the command was not started.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from halton_meter.cli.output import count, fail, note, wrong_usage
from halton_meter.cli.run import summary_lines, through_key_log
from halton_meter.problem import Problem

if TYPE_CHECKING:
    from halton_meter.live.result import RunResult

EXAMPLES = """
    \b
    Examples:
      sudo halton-meter record models.pcapng -- curl https://api.anthropic.com/v1/models
      sudo halton-meter record capture.pcapng -- python app.py
      sudo halton-meter record report.pcapng --redact -- python app.py
      halton-meter replay capture.pcapng              what was recorded, priced
"""


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=EXAMPLES,
)
@click.option("--quiet", is_flag=True, help="Print no summary.")
@click.option(
    "--redact",
    "redacted",
    is_flag=True,
    help="Keep no text and no credential: a file for a bug report, as `redact` makes it.",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def record(*, file: Path, command: tuple[str, ...], quiet: bool, redacted: bool) -> NoReturn:
    """Record one command's connections to providers in a pcapng file, with their TLS secrets.

    The file holds prompts, answers and credentials: only you may read it. `replay` prices it
    without a key log. Other programs' connections, and the command's to other hosts, are left out.
    With --redact every text becomes filler before the file is written: see `halton-meter redact`.
    The command is also metered, as by run --via keylog: it must write its TLS keys (curl, Python,
    Node, browsers). Needs the right to capture packets (sudo).
    """
    from halton_meter.config import ConfigError
    from halton_meter.problem import Unavailable

    while command and command[0] in ("--redact", "--quiet"):  # behind the file
        redacted, quiet = redacted or command[0] == "--redact", quiet or command[0] == "--quiet"
        command = command[1:]
    if command[:1] == ("--",):
        command = command[1:]
    if not command:
        wrong_usage("record needs a command", "halton-meter record FILE -- claude -p hello")
    try:
        if redacted:
            result, lines = _redacted(command, file)
        else:
            result = through_key_log(command, lambda: file)
            lines = _recorded_lines(result, file)
    except FileExistsError:
        fail(Problem(f"{file} exists already", "name a new file"))
    except OSError as error:
        fail(Problem(f"{file} cannot be written: {error.strerror or error}", "name another file"))
    except (Unavailable, ConfigError) as error:
        fail(*error.problems)
    if not quiet:
        note("\n".join([*summary_lines(result), *lines]))
    sys.exit(result.exit_code)


def _recorded_lines(result: RunResult, file: Path) -> list[str]:
    done = result.recorded
    if done is None:
        return []
    if not done.connections and not done.error:
        with contextlib.suppress(OSError):
            file.unlink()
        return [f"  nothing was recorded, so there is no {file}"]
    what = f"{count(done.connections, 'connection')}, {count(done.packets, 'packet')}"
    lines = [f"  recorded: {what} in {file}; it holds prompts and credentials", *_not_whole(result)]
    lines.append(f"  Use: halton-meter replay {shlex.quote(str(file))}")
    return lines


def _redacted(command: tuple[str, ...], file: Path) -> tuple[RunResult, list[str]]:
    """Run the command; what was recorded is kept in a folder of ours until it is redacted."""
    from halton_meter.cli.redact import made, told
    from halton_meter.live.keylog.private_folder import RECORDING, private_folder

    places: list[Path] = []
    with contextlib.ExitStack() as stack:

        def place() -> Path:
            if file.exists():
                raise FileExistsError(file)
            folder = stack.enter_context(private_folder(RECORDING))
            places.append(folder / "recorded.pcapng")
            return places[0]

        result = through_key_log(command, place)
        if result.recorded is not None and not result.recorded.connections:
            return result, ["  nothing was recorded, so there is nothing to redact"]
        try:
            done = made(places[0], file)
        except SystemExit:  # no file; what the command spent is told all the same
            note("\n".join(summary_lines(result)))
            raise
    lines = [f"  {line}" if at == 0 else line for at, line in enumerate(told(done, file))]
    return result, [*lines, *_not_whole(result)]


def _not_whole(result: RunResult) -> list[str]:
    """Why the recording ends before the command did, if it does."""
    assert result.recorded is not None
    causes = [result.recorded.error, *(cause for _, _, cause in result.outages)]
    return [f"  the recording is not whole: {each}" for each in causes if each]
