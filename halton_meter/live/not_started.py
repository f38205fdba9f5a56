"""Why a command of `run` did not start, said and numbered as a shell does, by both sources."""

from __future__ import annotations

NOT_FOUND, NOT_RUNNABLE = 127, 126


def not_started(name: str, error: OSError) -> tuple[int, str]:
    """The exit code of a command that could not be executed, and the words for it."""
    if isinstance(error, FileNotFoundError):
        return NOT_FOUND, f"{name}: command not found"
    return NOT_RUNNABLE, f"cannot run {name}: {error.strerror}"
