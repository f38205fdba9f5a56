"""A command line as it may be kept: what identifies a program, and nothing else.

People pass prompts, keys and whole requests as arguments (`claude -p hi`, `mysql -phunter2`,
`curl -H "x-api-key: …" https://me:secret@host/…`), and none of it may reach an event. What looks
harmless need not be, so nothing stays for its looks alone. These stay:

- the program, the script or module that an interpreter runs, what a runner such as npx runs, and
  subcommands out of a closed list (`command_words.py` knows the programs);
- names of options: of `--name=value` the name, of `-xVALUE` two characters;
- values of a short list of options, such as `--model`, where they look as they must.

All else becomes REDACTED, several in a row one, so that neither length nor number of words shows.
The result depends on the words alone: no file is looked at, as they are other users' files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from capture.processes.command_words import (
    ALIASES,
    EXTENSIONS,
    NAMES,
    OPTIONS,
    OTHER,
    PROGRAMS,
    SCOPES,
    TITLED,
    VALUES,
    VERSIONED,
    Program,
    Takes,
)

REDACTED = "[redacted]"
ARGUMENTS_MAX = 64
ARGUMENT_CHARS_MAX = 256
NAME_CHARS_MAX = 40
CLUSTER_CHARS_MAX = 4  # of single-dash options without values, the dash included: -sSf

_OPTION = re.compile(r"--[a-z]+(?:[-_][a-z]+)*")
_BEFORE_VALUE = re.compile(r"[=:]")
_NAME = re.compile(r"[a-z]+(?:[-_.][a-z]+)*")
_SCRIPT_STEM = re.compile(r"_{0,2}[a-z]+(?:[-_.]?\d{1,2}(?![0-9])|[-_.][a-z]+)*_{0,2}")
_MODULE = re.compile(r"_{0,2}[a-z]+(?:[._]{1,2}[a-z]+)*_{0,2}")
_WORDS = re.compile(r"[a-z]+")
# No word of a language: seven of one kind and none of the other, letters thrice, hexadecimal.
_RANDOM = re.compile(r"[^aeiouy]{6}|[aeiouy]{5}|(.)\1\1|(?=[a-f]*[bcdf])[a-f]{6,}")
_WORD_CHARS_MAX = 16
_WORDS_MAX = 6
_SECRET = re.compile(r"secret|passw|bearer|token|credential|cookie|api[-_]?key")
# As keys begin: sk-…, ghp_…, glpat-…
_KEY = re.compile(
    r"(?:^|[-_.])(?:sk|pk|rk|xai|gsk|hf|gh[pousr]|glpat|xox[a-z]|npm|akia|asia|aiza)[-_]"
)


def without_secrets(argv: Sequence[str]) -> tuple[str, ...]:
    """What of `argv` may be kept, the program first; at most ARGUMENTS_MAX + 1 words.

    Given its own result it returns that again.
    """
    if not argv:
        return ()
    program = _program(argv[0])
    words = _Words(program)
    for argument in argv[1:ARGUMENTS_MAX]:
        words.take(argument)
    if len(argv) > ARGUMENTS_MAX:
        words.keep(REDACTED)
    return tuple(words.kept)


class _Words:
    """The walk along a command line: what was kept, and what the next word may be."""

    def __init__(self, program: str) -> None:
        self.kept = [program]
        self._program = _described(program)
        self._searching = True  # for the word that names a subcommand or what is run
        self._value_of: str | None = None
        self._names_module = False
        self._options_end = False

    def keep(self, word: str) -> None:
        """Add a word; of hidden ones in a row only the first."""
        if word != REDACTED or self.kept[-1] != REDACTED:
            self.kept.append(word)

    def take(self, argument: str) -> None:
        """Decide on the next argument."""
        if argument == "--" and not self._options_end:
            self.keep(argument)
            self._options_end, self._searching, self._value_of = True, False, None
        elif argument.startswith("-") and not self._options_end:
            self._value_of = None
            self._names_module = False  # what follows is this option's, or nobody knows whose
            self._take_option(argument)
        else:
            word = self._word(argument)
            self.keep(word if argument else "")

    # -- options --

    def _take_option(self, argument: str) -> None:
        if argument in self._program.scripts:
            self.keep(argument)
        elif argument == "-":
            self.keep(argument)
            self._searching = False  # the program itself comes by standard input
        elif argument.startswith("--"):
            self._take_long(argument)
        else:
            self._take_short(argument)

    def _take_long(self, argument: str) -> None:
        argument = argument[:ARGUMENT_CHARS_MAX]
        name = _BEFORE_VALUE.split(argument, 1)[0]
        joint, value = argument[len(name) : len(name) + 1], argument[len(name) + 1 :]
        if not _is_option(name):
            self._hide_option()
        elif joint == "=" and _fits(VALUES.get(name), value):
            self.keep(argument)
        elif joint:
            self.keep(f"{name}{joint}{REDACTED}")
        else:
            self._keep_option(name)

    def _take_short(self, argument: str) -> None:
        letters = argument[1:ARGUMENT_CHARS_MAX]
        if not (letters[0].isascii() and (letters[0].isalnum() or letters[0] in "#?")):
            self._hide_option()
        elif all(letter in self._program.letters for letter in letters):
            self.keep(argument if len(argument) <= CLUSTER_CHARS_MAX else argument[:2])
        elif letters[0] in self._program.joined:
            self.keep(argument[:2])
        elif len(letters) == 1:
            self._keep_option(argument)
        elif argument[:2] in self._program.valued:
            self.keep(argument[:2])
            self.keep(REDACTED)
        elif f"-{letters[-1]}" in self._program.modules and all(
            letter in self._program.letters for letter in letters[:-1]
        ):
            self._keep_option(f"-{letters[-1]}")  # python -Im module
        elif argument[:2] in self._program.modules and self._searching:
            self.keep(argument[:2])  # python -mmodule
            self.keep(self._runs(argument[2:], _is_module(argument[2:])))
        else:
            self._keep_option(argument[:2])  # a value is joined to it, or it is a word
            self._searching, self._value_of = False, None

    def _keep_option(self, name: str) -> None:
        self.keep(name)
        if name in self._program.modules:
            self._names_module = self._searching
        elif name not in self._program.flags and name not in self._program.scripts:
            self._value_of = name
            if name not in self._program.valued and self._program.takes is not Takes.NOTHING:
                # Is the next word its value or the script? Then the one after it may be a prompt.
                self._searching = False

    def _hide_option(self) -> None:
        self.keep(REDACTED)
        self._searching = False

    # -- other words --

    def _word(self, argument: str) -> str:
        if len(argument) > ARGUMENT_CHARS_MAX:
            argument = REDACTED
        if self._names_module:
            return self._runs(argument, _is_module(argument))
        option, self._value_of = self._value_of, None
        if option is not None:
            allowed = VALUES.get(option)
            return argument if _fits(allowed, argument) else REDACTED
        if not self._searching:
            return REDACTED
        if argument in self._program.subcommands:
            self._program = self._program.subcommands[argument]
            return argument
        return self._named(argument)

    def _named(self, argument: str) -> str:
        """The word that names what is run: a script, a package, a task."""
        takes = self._program.takes
        if takes is Takes.TASK:
            return self._runs(argument, _is_name(argument), OTHER)
        if takes is Takes.COMMAND and (_is_package(argument) or _is_program(argument)):
            return self._runs(argument, True)
        self._searching = False
        kept = _script(argument) if takes in (Takes.SCRIPT, Takes.COMMAND) else None
        return REDACTED if kept is None else self._runs(kept, True)

    def _runs(self, word: str, is_kept: bool, program: Program | None = None) -> str:
        """Go on with the command line of what is run."""
        self._names_module = False
        self._program = OTHER
        if not is_kept:
            self._searching = False
            return REDACTED
        self._program = _described(word) if program is None else program
        self._searching = True
        return word


def _fits(pattern: re.Pattern[str] | None, text: str) -> bool:
    return (
        pattern is not None
        and len(text) <= NAME_CHARS_MAX
        and pattern.fullmatch(text) is not None
        and not _KEY.search(text)
    )


def _described(name: str) -> Program:
    """What is known of a program by its name or path."""
    return PROGRAMS.get(_plain_name(name), OTHER)


def _plain_name(name: str) -> str:
    name = name.rpartition("/")[2]
    if VERSIONED.fullmatch(name):
        name = name.rstrip("0123456789.-")
    return ALIASES.get(name, name)


# --- what is a name -----------------------------------------------------------------------------


def _is_language(text: str) -> bool:
    """Whether the letters in it are words, a few, that name no secret."""
    words = _WORDS.findall(text)
    return (
        len(text) <= NAME_CHARS_MAX
        and len(words) <= _WORDS_MAX
        and all(len(word) <= _WORD_CHARS_MAX and not _RANDOM.search(word) for word in words)
        and not _KEY.search(text)
    )


def _is_option(text: str) -> bool:
    return text in OPTIONS or (_OPTION.fullmatch(text) is not None and _is_language(text))


def _is_name(text: str) -> bool:
    if text in NAMES or VERSIONED.fullmatch(text):
        return True
    return _NAME.fullmatch(text) is not None and _is_language(text) and not _SECRET.search(text)


def _is_module(text: str) -> bool:
    return _MODULE.fullmatch(text) is not None and _is_language(text) and not _SECRET.search(text)


def _is_package(text: str) -> bool:
    scope, slash, name = text.removeprefix("@").partition("/")
    return text.startswith("@") and bool(slash) and scope in SCOPES and _is_name(name)


def _is_program(text: str) -> bool:
    """A program's name without a folder, and without an extension."""
    return _is_name(text) and "." not in text.rstrip("0123456789.")


def _script(text: str) -> str | None:
    """The path of a script, its folder hidden unless it is only names; None if none."""
    folder, slash, name = text.rpartition("/")
    stem, dot, extension = name.rpartition(".")
    if not (dot and extension in EXTENSIONS):
        is_path = text.startswith(("/", "./", "../", "~/", f"{REDACTED}/"))
        return f"{_folder(folder)}/{name}" if is_path and _is_program(name) else None
    if not (_SCRIPT_STEM.fullmatch(stem) and _is_language(stem) and not _SECRET.search(stem)):
        return None
    if sum(map(str.isdigit, stem)) > 2:
        return None
    return f"{_folder(folder)}/{name}" if slash else name


def _folder(path: str) -> str:
    """A folder whose every part is a name, or REDACTED."""
    parts = path.split("/")
    known = all(
        part in ("", ".", "..", "~") or _is_name(part.removeprefix(".")) or _is_scope(part)
        for part in parts
    )
    return path if known else REDACTED


def _is_scope(part: str) -> bool:
    return part.startswith("@") and part[1:] in SCOPES


def _program(text: str) -> str:
    """The program: a name or a path. Of a title that a process wrote over it, its first word, where
    that is a program's: any word may begin a sentence.
    """
    text = text[:ARGUMENT_CHARS_MAX]
    word, blank, _ = text.partition(" ")
    word = word.removeprefix("-")  # -bash: a login shell
    if blank:
        word = word.removesuffix(":")
        if not (word.startswith("/") or _plain_name(word) in PROGRAMS or word in TITLED):
            return REDACTED
    folder, slash, name = word.rpartition("/")
    if not _is_name(name):
        return _script(word) or REDACTED
    return f"{_folder(folder)}/{name}" if slash else name
