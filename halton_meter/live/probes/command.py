"""The command of `run`: forked and held, executed as the user, signalled and waited for.

It is started before the probes are in place, so that it has a pid that they can be scoped to, and
executed after. Signals sent to us are passed on; the terminal sends its own to the command
directly. Who meters it is up to `probes/service.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence

from halton_meter.accounts import Account
from halton_meter.live.held import HeldCommand
from halton_meter.live.not_started import NOT_RUNNABLE, not_started
from halton_meter.privileges import become

_SIGINFO_BYTES = 128
_SI_KERNEL = 0x80
_SFD_CLOEXEC = 0o2000000
_FORWARDED = (
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


class Signals:
    """Signals as data: (number, whether the terminal sent it), read from a descriptor.

    Block them first (`block`), fork what must have them unblocked with `unblock` in the child.
    """

    def __init__(self) -> None:
        mask = sum(1 << (number - 1) for number in _FORWARDED)
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = libc.signalfd(-1, struct.pack("Q", mask).ljust(128, b"\0"), _SFD_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "signalfd")

    @staticmethod
    def block() -> None:
        """Keep the signals for the descriptor."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)

    @staticmethod
    def unblock() -> None:
        """Let them be delivered again."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)

    def fileno(self) -> int:
        """Readable when a signal came."""
        return self._fd

    def read(self) -> tuple[int, bool]:
        """The next signal, and whether the terminal sent it to our whole group."""
        raw = os.read(self._fd, _SIGINFO_BYTES)
        number, _, code = struct.unpack_from("=IiI", raw)
        return number, code == _SI_KERNEL

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


class Command:
    """The command of `run`: forked at once, so that it has a pid; executed when `release`d."""

    def __init__(
        self, argv: Sequence[str], account: Account, environment: Mapping[str, str]
    ) -> None:
        hold_read, self._hold = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._hold)
            _execute(hold_read, argv, account, environment)
        os.close(hold_read)
        self.pidfd = os.pidfd_open(self.pid)

    def release(self) -> None:
        """Let it begin."""
        os.write(self._hold, b"x")
        os.close(self._hold)

    def abandon(self) -> None:
        """End it before it has begun."""
        os.close(self._hold)
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def reap(self) -> int:
        """Its exit code as a shell gives it: 128 + the signal that ended it."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        code = os.waitstatus_to_exitcode(status)
        return 128 - code if code < 0 else code


@contextlib.contextmanager
def prepared(
    argv: Sequence[str], account: Account, environment: Mapping[str, str]
) -> Iterator[Command]:
    """A command that begins when all is done that comes before it, and never if that fails.

    Signals are blocked from here on (`Signals`).
    """
    Signals.block()
    command = Command(argv, account, environment)
    try:
        yield command
    except BaseException:
        command.abandon()
        Signals.unblock()
        raise
    command.release()


def _execute(
    hold: int, argv: Sequence[str], account: Account, environment: Mapping[str, str]
) -> None:
    """In the child: wait to be released, become the user, be the command."""
    code = NOT_RUNNABLE
    try:
        if os.read(hold, 1) and argv:
            os.close(hold)
            if os.geteuid() == 0 and account.uid != 0:
                become(account)
            # Python ignores these two; the command must not inherit that.
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            Signals.unblock()
            os.execvpe(argv[0], list(argv), dict(environment))  # noqa: S606 (what `run` is for)
    except OSError as error:
        code, words = not_started(argv[0], error)
        os.write(2, f"halton-meter: {words}\n".encode())
    finally:
        os._exit(code)


def attend(
    command: Command,
    signals: Signals,
    selector: selectors.BaseSelector,
    tick: Callable[[], None],
    wait_s: Callable[[], float | None],
    held: HeldCommand,
) -> int:
    """Wait for the command's end; meanwhile pass signals on and do what else is ready.

    While the command is stopped at a limit, `held` deals with signals.
    """
    ended = False

    def on_end() -> None:
        nonlocal ended
        ended = True

    def on_signal() -> None:
        number, by_terminal = signals.read()
        if (
            not held.on_signal(number) and not by_terminal
        ):  # the terminal's went to the command, too: it is in our group
            command.signal(number)

    selector.register(command.pidfd, selectors.EVENT_READ, on_end)
    selector.register(signals, selectors.EVENT_READ, on_signal)
    while not ended:
        for key, _ in selector.select(wait_s()):
            key.data()
        tick()
    selector.unregister(command.pidfd)
    selector.unregister(signals)
    held.end()
    return command.reap()
