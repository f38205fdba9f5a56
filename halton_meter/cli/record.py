"""`halton-meter record FILE -- CMD…`: a capture of a command's provider connections, with secrets.

The command is metered as by `run --via keylog`. Exit codes are those of `run`; 1 also when the file
cannot be made, in which case the command was not started.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import NoReturn

import click

from halton_meter.cli.output import count, fail, note, wrong_usage
from halton_meter.cli.run import summary_lines, through_key_log
from halton_meter.problem import Problem

EXAMPLES = """
    \b
    Examples:
      sudo halton-meter record models.pcapng -- curl https://api.anthropic.com/v1/models
      sudo halton-meter record capture.pcapng -- python app.py
      halton-meter replay capture.pcapng              what was recorded, priced
"""


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=EXAMPLES,
)
@click.option("--quiet", is_flag=True, help="Print no summary.")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def record(*, file: Path, command: tuple[str, ...], quiet: bool) -> NoReturn:
    """Record one command's connections to providers in a pcapng file, with their TLS secrets.

    The file holds prompts, answers and credentials: only you may read it. `replay` prices it
    without a key log. Other programs' connections, and the command's to other hosts, are left out.
    The command is also metered, as by run --via keylog: it must write its TLS keys (curl, Python,
    Node, browsers). Needs the right to capture packets (sudo).
    """
    from halton_meter.config import ConfigError
    from halton_meter.problem import Unavailable

    if command[:1] == ("--",):
        command = command[1:]
    if not command:
        wrong_usage("record needs a command", "halton-meter record FILE -- claude -p hello")
    try:
        result = through_key_log(command, file)
    except FileExistsError:
        fail(Problem(f"{file} exists already", "name a new file"))
    except OSError as error:
        fail(Problem(f"{file} cannot be written: {error.strerror or error}", "name another file"))
    except (Unavailable, ConfigError) as error:
        fail(*error.problems)
    if not quiet:
        lines = summary_lines(result)
        done = result.recorded
        if done is not None:
            what = f"{count(done.connections, 'connection')}, {count(done.packets, 'packet')}"
            lines.append(f"  recorded: {what} in {file}; it holds prompts and credentials")
            if done.error:
                lines.append(f"  the recording is not whole: {done.error}")
            lines.append(f"  Use: halton-meter replay {shlex.quote(str(file))}")
        note("\n".join(lines))
    sys.exit(result.exit_code)
