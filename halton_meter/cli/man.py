"""`halton-meter man [COMMAND…]`: the manual pages, to read or to install.

The wheel ships one page with all commands (man/halton-meter.1). Exit codes: 0 shown or installed;
1 the folder cannot be written; 2 no such command.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click

from halton_meter import __version__
from halton_meter.cli.named import FilePath
from halton_meter.cli.output import count, fail, say, unwritten, wrong_usage
from halton_meter.cli.pages import NAME, Page, manual_page, pages

# Where `man` looks without being told, for one user.
_FOLDER = ".local/share/man/man1"


@click.command(
    epilog="""\b
Examples:
  halton-meter man                   the overview
  halton-meter man report            one command
  halton-meter man --install         then: man halton-meter-report
"""
)
@click.argument("words", nargs=-1, metavar="COMMAND")
@click.option("--install", is_flag=True, help="Write a page for each command into a man1 folder.")
@click.option(
    "--folder",
    type=FilePath(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help=f"With --install: that folder. Default: ~/{_FOLDER}.",
)
def man(words: tuple[str, ...], install: bool, folder: Path | None) -> None:
    """Show a manual page, or install them all."""
    from halton_meter.cli import main

    if folder is not None and not install:
        wrong_usage("--folder needs --install")
    if install and words:
        wrong_usage("--install installs all pages; name no command")
    if install:
        _install(folder or Path.home() / _FOLDER, list(pages(NAME, main)))
        return
    wanted = " ".join((NAME, *words))
    found = next((each for each in pages(NAME, main) if each.words == wanted), None)
    if found is None:
        wrong_usage(f"there is no command {' '.join(words)}", f"{NAME} --help")
    _show(_drawn(found))


def _drawn(page: Page) -> str:
    return manual_page(page, __version__, "")


def _show(text: str) -> None:
    """Through `man`, which pages and formats; else as it is."""
    if not sys.stdout.isatty() or shutil.which("man") is None:
        click.echo(text, nl=False)
        return
    subprocess.run(("man", "-l", "-"), input=text.encode(), check=False)


def _install(folder: Path, all_pages: list[Page]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for page in all_pages:
            (folder / f"{page.words.replace(' ', '-')}.1").write_text(_drawn(page))
    except OSError as error:
        fail(unwritten(folder, error, folder.parent))
    say(f"{count(len(all_pages), 'page')} written to {folder}; read them with: man {NAME}")
    if os.environ.get("MANPATH") and str(folder.parent) not in os.environ["MANPATH"]:
        say(f'  MANPATH is set: export MANPATH="{folder.parent}:$MANPATH"')
