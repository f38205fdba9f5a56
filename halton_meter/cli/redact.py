"""`halton-meter redact IN OUT`: a capture without prompts, answers and credentials.

Thin by rule: `halton_meter.redaction` makes and proves it; `record --redact` does the same with
what it recorded. Exit codes: 0 done; 1 no file was made (the reasons and the fix on stderr); 2
wrong usage.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from halton_meter.cli.book import open_book
from halton_meter.cli.configured import Configured
from halton_meter.cli.named import FilePath
from halton_meter.cli.output import count, fail, look_at, print_json, say, sum_words
from halton_meter.cli.signalled import ended_in_order
from halton_meter.contract import usd_text
from halton_meter.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from halton_meter.redaction.redact import Redacted

HOSTS_SHOWN = 8


@click.command(cls=Configured)
@click.argument("source", metavar="IN", type=FilePath(exists=True, dir_okay=False, path_type=Path))
@click.argument("target", metavar="OUT", type=FilePath(path_type=Path))
@click.option(
    "--keys",
    multiple=True,
    type=FilePath(exists=True, dir_okay=False, path_type=Path),
    help="TLS key log (SSLKEYLOGFILE); may be given again. Not needed for a pcapng with secrets.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def redact(*, source: Path, target: Path, keys: tuple[Path, ...], as_json: bool) -> None:
    """Write a copy of a capture without prompts, answers and credentials, for a bug report.

    Every text becomes filler of its length; structure, usage, models, framing, gaps and times stay.
    Ids are replaced by made-up ones, addresses by those for documentation. Other connections than
    those to providers are left out. OUT is a new pcapng file with its TLS secrets inside.

    Before you get the file, both captures are replayed: it must give the same requests, tokens,
    prices and gaps, and nothing of what was removed may stand in it. Else no file is made.

    \b
    Examples:
      halton-meter redact capture.pcapng for-the-report.pcapng
      halton-meter redact capture.pcapng redacted.pcapng --keys sslkeys.log
    """
    with ended_in_order():
        done = made(source, target, keys)
    if as_json:
        print_json(document(done, target))
        return
    for line in told(done, target):
        say(line)


def made(
    source: Path, target: Path, keys: Sequence[Path] = (), *, is_ours: bool = False
) -> Redacted:
    """The redacted copy of a capture; an end with code 1 where none can be made.

    `is_ours`: nobody will find the capture once this has ended.
    """
    from capture.packets.tshark import TsharkMissing
    from halton_meter.accounts import home_folder
    from halton_meter.redaction.redact import NotRedacted, redact
    from halton_meter.settings.config import load

    try:
        hosts = load(home_folder()).extra_hosts
        return redact(source, target, open_book().price, keys, hosts)
    except NotRedacted as error:
        name = "the recording" if is_ours else source
        fix = f"halton-meter record {shlex.quote(str(target))} -- CMD   (keeps all; then: inspect)"
        fail(
            *(Problem(f"{name}: not redacted: {reason}", "") for reason in error.reasons[:-1]),
            Problem(f"{name}: not redacted: {error.reasons[-1]}", fix if is_ours else _fix(source)),
        )
    except TsharkMissing as error:
        fail(Problem(str(error), ""))
    except FileExistsError:
        fail(Problem(f"{target} exists already", "name a new file"))
    except OSError as error:
        what = f"{target} cannot be written: {error.strerror or error}"
        fail(Problem(what, look_at(error, target.parent, "name a file in a folder of yours")))


def _fix(source: Path) -> str:
    return f"see what the capture holds: halton-meter inspect {shlex.quote(str(source))}"


def told(done: Redacted, target: Path) -> list[str]:
    """What was made, for people."""
    name = shlex.quote(str(target))
    size = f"{count(done.connections, 'connection')}, {count(done.packets, 'packet')}"
    requests = count(done.requests, "request")
    known = None if done.requests and done.unpriced == done.requests else done.total_usd
    price = sum_words(known, done.unpriced, f"${usd_text(done.total_usd)}")
    lines = [
        f"redacted: {target}: {size}",
        f"  proved: it gives the same {requests}, {price}; nothing of what was removed is in it",
    ]
    if done.hosts:
        more = f" and {len(done.hosts) - HOSTS_SHOWN} more" if len(done.hosts) > HOSTS_SHOWN else ""
        lines.append(
            f"  it names models, times and hosts: {', '.join(done.hosts[:HOSTS_SHOWN])}{more}"
        )
    if done.without_keys:
        lines.append(f"  left out: {count(done.without_keys, 'connection')} without keys")
    lines.append(f"  look it over: halton-meter inspect {name} --show-bodies")
    return lines


def document(done: Redacted, target: Path) -> dict[str, object]:
    """The same for machines."""
    return {
        "file": str(target),
        "connections": done.connections,
        "packets": done.packets,
        "requests": done.requests,
        "list_usd": usd_text(done.total_usd),
        "unpriced": done.unpriced,
        "hosts": list(done.hosts),
        "without_keys": done.without_keys,
    }
