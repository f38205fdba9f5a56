"""The command line: thin click commands, each loaded only when it is called.

Start-up time is a promise (0.15 s), so this file imports nothing but click: a command's module
is imported when that command runs or when its own help is asked for.
"""

from __future__ import annotations

import gc
import importlib

import click

from halton_meter import __version__

# name -> (module:attribute, one line for --help). The line lives here so that `--help` does not
# import every command.
_COMMANDS: dict[str, tuple[str, str]] = {
    "replay": ("halton_meter.cli.replay:replay", "Meter recorded packet captures."),
    "events": ("halton_meter.cli.events:events", "List metered events."),
    "report": ("halton_meter.cli.report:report", "Show what was spent."),
    "dashboard": ("halton_meter.cli.dashboard:dashboard", "Show what was spent on a web page."),
    "export": ("halton_meter.cli.export:export", "Write events to SQLite, CSV, Parquet or JSON."),
    "pricing": ("halton_meter.cli.pricing:pricing", "Show, explain, override or refresh prices."),
    "reprice": ("halton_meter.cli.reprice:reprice", "Price stored events again, as a revision."),
    "retag": ("halton_meter.cli.retag:retag", "Move history from one project to another."),
    "run": ("halton_meter.cli.run:run", "Meter one command and print what it cost."),
    "daemon": ("halton_meter.cli.daemon:daemon", "Run the meter in the foreground."),
    "start": ("halton_meter.cli.service:start", "Install and start the background service."),
    "stop": ("halton_meter.cli.service:stop", "Stop the background service."),
    "status": ("halton_meter.cli.status:status", "Health, coverage per process, losses."),
    "init": ("halton_meter.cli.init:init", "Set up the local proxy for your programs."),
    "doctor": ("halton_meter.cli.doctor:doctor", "Diagnose, and mend what is amiss."),
    "uninstall": ("halton_meter.cli.uninstall:uninstall", "Put back all that init changed."),
}


class LazyGroup(click.Group):
    """A click group whose commands are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command, in the order of the table."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command, or None when there is no such name."""
        if cmd_name not in _COMMANDS:
            return None
        module_name, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        gc.disable()  # what an import makes stays: looking for garbage in it costs 5 ms
        try:
            command = getattr(importlib.import_module(module_name), attribute)
        finally:
            gc.enable()
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, importing none of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="halton-meter")
def main() -> None:
    """Know exactly what your AI tools spend.

    \b
    Examples:
      halton-meter replay capture.pcapng        meter a recorded capture
      halton-meter report --today               what today cost
      sudo halton-meter run -- claude -p hi     meter one command, live
    """
