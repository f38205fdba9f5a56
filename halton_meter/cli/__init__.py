"""The command line: thin click commands, each imported only when it is called.

Under sudo, root becomes the invoking user here, once for all commands (`privileges.settle`).
Start-up time is a promise (0.15 s), so this file imports little but click: a command's module is
imported when that command runs or prints its own help.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from halton_meter import __version__
from halton_meter.cli import streams

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


def _for_probes(given: Mapping[str, Any]) -> bool:
    """Attaching probes, and the system's service that does so, need root; the proxy does not."""
    on_linux = sys.platform == "linux"
    return on_linux and given.get("via") != "proxy" and not given.get("java")


def _for_stop(given: Mapping[str, Any]) -> bool:
    """The key log service is the user's once it meters."""
    return _for_probes(given) and given.get("via") != "keylog"


def _for_reload(given: Mapping[str, Any]) -> bool:
    """Which hosts uprobes watch is root's to say, so root alone has them read again."""
    return sys.platform == "linux" and given.get("subcommand") == "reload"


def _for_init(given: Mapping[str, Any]) -> bool:
    """Installing the uprobes service needs root; the proxy, and what only shows, does not."""
    of_proxy = ("mode", "no_shell_rc", "java", "system_trust", "redirect", "keep", "platform")
    on_linux = sys.platform == "linux" and given.get("via") != "proxy"
    return on_linux and not any(given.get(name) for name in of_proxy)


def _for_uninstall(_given: Mapping[str, Any]) -> bool:
    """Removing the uprobes service needs root; all else is undone as the user."""
    from halton_meter.cli.systemd_unit import UNIT_PATH

    return sys.platform == "linux" and UNIT_PATH.exists()


def _for_journal(given: Mapping[str, Any]) -> bool:
    """The system service's log is in the system's journal, which root may read."""
    from halton_meter.cli.logs import from_journal

    return from_journal(given.get("via"))


class _Entry(NamedTuple):
    """A command: "module:attribute", and its line in --help, which thus imports no command.

    `needs_root` decides by the options, and for a group by its "subcommand"; None: never, so the
    command runs as the invoking user under sudo. `status` and `doctor` need none: they ask the
    service.
    """

    target: str
    line: str
    needs_root: Callable[[Mapping[str, Any]], bool] | None = None


_COMMANDS: dict[str, _Entry] = {
    "replay": _Entry("halton_meter.cli.replay:replay", "Meter recorded packet captures."),
    "redact": _Entry(
        "halton_meter.cli.redact:redact", "Write a capture without texts and credentials."
    ),
    "inspect": _Entry(
        "halton_meter.cli.inspect:inspect", "Show a capture or a request layer by layer."
    ),
    "events": _Entry("halton_meter.cli.events:events", "List metered requests."),
    "top": _Entry(
        "halton_meter.cli.top.command:top", "Show what is metered now, live in the terminal."
    ),
    "tail": _Entry("halton_meter.cli.tail:tail", "Print requests as they end."),
    "report": _Entry("halton_meter.cli.report:report", "Show what was spent."),
    "plan": _Entry(
        "halton_meter.cli.plan:plan", "Show each account's limits, and who used how much."
    ),
    "statusline": _Entry(
        "halton_meter.cli.statusline:statusline", "Show what a session spends in Claude Code."
    ),
    "prompt": _Entry("halton_meter.cli.prompt:prompt", "Print a short text for a shell's prompt."),
    "session": _Entry("halton_meter.cli.session:session", "List sessions, and show how one went."),
    "dashboard": _Entry(
        "halton_meter.cli.dashboard:dashboard", "Show what was spent on a web page."
    ),
    "metrics": _Entry(
        "halton_meter.cli.metrics:metrics", "Print what was spent as Prometheus metrics."
    ),
    "export": _Entry(
        "halton_meter.cli.export:export", "Write stored requests to a file for other tools."
    ),
    "pricing": _Entry(
        "halton_meter.cli.pricing:pricing", "Show, explain, override or refresh prices."
    ),
    "reprice": _Entry(
        "halton_meter.cli.reprice:reprice", "Price stored requests again with today's prices."
    ),
    "retag": _Entry("halton_meter.cli.retag:retag", "Move stored requests to another project."),
    "purge": _Entry("halton_meter.cli.purge:purge", "Delete old requests."),
    "project": _Entry(
        "halton_meter.cli.project:project", "Show projects, and the rules of what belongs to each."
    ),
    "config": _Entry(
        "halton_meter.cli.config:config", "Show, change and check your settings.", _for_reload
    ),
    "run": _Entry(
        "halton_meter.cli.run:run", "Meter one command and print what it cost.", _for_probes
    ),
    "record": _Entry(
        "halton_meter.cli.record:record",
        "Record one command's provider connections in a file.",
        _for_probes,
    ),
    "daemon": _Entry(
        "halton_meter.cli.daemon:daemon", "Run the metering service in the foreground.", _for_probes
    ),
    "start": _Entry(
        "halton_meter.cli.start:start", "Start metering in the background.", _for_probes
    ),
    "stop": _Entry("halton_meter.cli.stop:stop", "Stop metering in the background.", _for_stop),
    "budget": _Entry(
        "halton_meter.cli.budget:budget", "Set limits in dollars, and see what is left of them."
    ),
    "status": _Entry("halton_meter.cli.status:status", "Show health, coverage and losses."),
    "init": _Entry("halton_meter.cli.init:init", "Set metering up, by one command.", _for_init),
    "logs": _Entry("halton_meter.cli.logs:logs", "Show the service's log.", _for_journal),
    "doctor": _Entry("halton_meter.cli.doctor:doctor", "Diagnose problems and fix them."),
    "uninstall": _Entry(
        "halton_meter.cli.uninstall:uninstall",
        "Undo everything that init changed.",
        _for_uninstall,
    ),
    "completion": _Entry(
        "halton_meter.cli.completion:completion", "Print the script for your shell's Tab key."
    ),
    "man": _Entry("halton_meter.cli.man:man", "Show or install manual pages."),
    "version": _Entry("halton_meter.cli.version:version", "Show the version, and what it runs on."),
}


class LazyGroup(click.Group):
    """A click group whose commands are imported on use."""

    def main(self, *args: Any, **more: Any) -> Any:
        """Run a command line, whatever the terminal can show and whoever reads the output."""
        streams.prepare()
        try:
            try:
                return super().main(*args, **more)
            finally:
                streams.finish()
        except streams.OutputRefused as refused:
            if streams.reader_left(refused):
                sys.exit(0)
            from halton_meter.cli.output import fail
            from halton_meter.problem import Problem

            fail(
                Problem(
                    f"cannot write to standard output: {refused.strerror}",
                    "df -h   (or write it elsewhere)",
                )
            )

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **more: Any,
    ) -> click.Context:
        """Read our own options."""
        with _plainly():
            return super().make_context(info_name, args, parent, **more)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with _plainly(ctx):
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command, in the order of the table."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command, or None when there is no such name."""
        if cmd_name not in _COMMANDS:
            return None
        module_name, _, attribute = _COMMANDS[cmd_name].target.partition(":")
        gc.disable()  # nothing that an import makes is garbage; looking for some costs 5 ms
        try:
            command = getattr(importlib.import_module(module_name), attribute)
        finally:
            gc.enable()
        assert isinstance(command, click.Command)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a command's name from the table, importing none of them."""
        from click.shell_completion import CompletionItem

        named = [
            CompletionItem(name, help=entry.line)
            for name, entry in _COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return [*named, *click.Command.shell_complete(self, ctx, incomplete)]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command and become the user that it runs as.

        Root does not even import a command that never needs root.
        """
        if ctx.resilient_parsing:  # somebody pressed Tab
            return super().resolve_command(ctx, args)
        entry = _COMMANDS.get(args[0])
        if args[0] == "run":
            from halton_meter.cli.configured import stand_in_folder, told_of_variables

            told_of_variables(os.environ)
            stand_in_folder()
        if entry is not None and entry.needs_root is None:
            _settle(needs_root=False)
        name, command, rest = super().resolve_command(ctx, args)
        if entry is not None and entry.needs_root is not None and command is not None:
            given = command.make_context(name, [*rest], parent=ctx, resilient_parsing=True)
            inner = {"subcommand": rest[0] if rest else None}
            chosen = inner if isinstance(command, click.Group) else given.params
            _settle(needs_root=entry.needs_root(chosen))
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, importing none of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.line) for name, entry in _COMMANDS.items()])


@contextlib.contextmanager
def _plainly(context: click.Context | None = None) -> Iterator[None]:
    """Print errors that no command has caught as every other problem: click's, a file or folder
    that the system refuses, and what cannot be used. A file's name may be in them.
    """
    try:
        yield
    except (click.exceptions.Exit, click.Abort, streams.OutputRefused):
        raise
    except KeyboardInterrupt:  # click would say "Aborted!" and end with 1
        from halton_meter.problem import INTERRUPTED

        raise click.exceptions.Exit(INTERRUPTED) from None
    except click.UsageError as error:
        from halton_meter.cli.output import plain_usage

        raise plain_usage(error, context.invoked_subcommand if context else None) from error
    except click.ClickException as error:
        from halton_meter.cli.output import fail
        from halton_meter.problem import Problem

        fail(Problem(error.format_message(), ""))
    except Exception as error:
        from halton_meter.cli.output import fail, problems_of

        if not (problems := problems_of(error)):
            raise
        fail(*problems)


def _settle(*, needs_root: bool) -> None:
    if sys.platform == "win32" or os.geteuid() != 0:
        return
    from halton_meter.cli.output import fail  # now: the user may not be able to read it
    from halton_meter.privileges import settle
    from halton_meter.settings.config import ConfigError

    try:
        settle(needs_root=needs_root)
    except ConfigError as error:
        fail(*error.problems)


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
