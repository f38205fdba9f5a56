"""TOML files that a user wrote: read within bounds, and each wrong value told with its line.

What is no TOML is one `NotToml`, whose text begins with the file and, where it has one, the line.
`Document.line` knows where each key and each value of a list stands, which the standard library's
reader does not tell. A byte order mark and Windows line ends are no error. This file knows no key.
Standard library only.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import re
import shlex
import stat
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any

VALUE_CHARACTERS_MAX = 60  # of a value or a line, in a message
_BOMS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_UTF8_BOM = b"\xef\xbb\xbf"
_TOML_PLACE = re.compile(r"\s*\(at (?:line (\d+), column \d+|end of document)\)$")

# A user name and password in a URL; what begins as a provider's keys do.
_CREDENTIALS = re.compile(r"//[^\s/]*@")
_SECRET = re.compile(r"\b(?:sk|pk|rk|xai|gsk|ghp|hf|AIza|AKIA)[-_A-Za-z0-9]{12,}")

Path_ = tuple[str | int, ...]


class NotToml(ValueError):
    """A file that cannot be read; the text says which, where and why, in one line."""


class Unreadable(NotToml):
    """One whose text could not be had: there is nothing to edit, and `str` names the next step."""


def read(path: Path, bytes_max: int, *, ours: bool = True) -> Document | None:
    """The file's document; None where there is no file. Raises NotToml.

    `ours`: nothing else may have its name, so what does is in the way.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            return read_opened(file, path, bytes_max, ours=ours)
    except FileNotFoundError:
        if path.is_symlink():
            raise Unreadable(f"{path}: links to a file that is not there: {look(path)}") from None
        return None
    except IsADirectoryError:
        raise Unreadable(_no_file(path, "a folder, not a file", ours)) from None
    except OSError as error:
        what = f"{path}: cannot be read: {error.strerror}; see: {look(path)}"
        raise Unreadable(what) from None


def look(path: Path) -> str:
    """The command that shows whose a file is, and how large."""
    return f"ls -l {shlex.quote(str(path))}"


def too_large(path: Path, bytes_max: int) -> str:
    """What is said of a file that is not read for its size."""
    return f"{path}: larger than {bytes_max:,} bytes; such a file is not read"


def _no_file(path: Path, what: str, ours: bool) -> str:
    quoted = shlex.quote(str(path))
    fix = f"move it away: mv {quoted} {quoted}.old" if ours else "name a TOML file"
    return f"{path}: this is {what}; {fix}"


def read_opened(file: IO[bytes], path: Path, bytes_max: int, *, ours: bool = True) -> Document:
    """The document of a file that is open. Raises NotToml, OSError."""
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise Unreadable(_no_file(path, "not a file", ours))
    raw = file.read(bytes_max + 1)
    if len(raw) > bytes_max:
        raise Unreadable(f"{too_large(path, bytes_max)}; see: {look(path)}")
    return parsed(raw, str(path))


def _without_waiting(path: str, flags: int) -> int:
    # For a pipe's other end, which may never come: root waits for what is read here.
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def parsed(raw: bytes, name: str) -> Document:
    """The document of a file's bytes. Raises NotToml."""
    import tomllib

    text = _decoded(raw, name)
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise NotToml(f"{name}: nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, or a number too long for int
        raise NotToml(_syntax(str(error), text, name)) from None
    return Document(name, text, table)


def _decoded(raw: bytes, name: str) -> str:
    for mark, encoding in _BOMS.items():
        if raw.startswith(mark):
            raise NotToml(f"{name}:1: this is {encoding} text; save the file as UTF-8")
    raw = raw.removeprefix(_UTF8_BOM)
    if (at := raw.find(b"\0")) >= 0:
        line = raw.count(b"\n", 0, at) + 1
        raise NotToml(f"{name}:{line}: holds a NUL byte, as UTF-16 text does; save it as UTF-8")
    try:
        return raw.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        what = f"{name}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x}); save it as UTF-8"
        raise NotToml(what) from None


def _syntax(said: str, text: str, name: str) -> str:
    """What the reader says, in our words, with the line that it means."""
    place = _TOML_PLACE.search(said)
    what = said[: place.start()] if place else said
    lines = text.split("\n")
    if not place:  # it does not say where: a number of thousands of digits
        longest = max(range(len(lines)), key=lambda number: len(lines[number]))
        return f"{name}:{longest + 1}: a number has too many digits"
    number = int(place[1]) if place[1] else max(1, len(text.rstrip("\n").split("\n")))
    line = lines[number - 1].strip() if number <= len(lines) else ""
    twice = re.search(r"Cannot (?:declare|overwrite|mutate)|already", what)
    if twice:
        what = "this stands twice; write it once"
    elif bare := re.search(r"=\s*([A-Za-z][\w.:*/-]*)\s*$", line):
        what = f'text stands in quotes; did you mean "{shown_line(bare[1])}"?'
        return f"{name}:{number}: {what}"
    else:
        what = f"this is no TOML: {what[:1].lower()}{what[1:]}"
    return f"{name}:{number}: {what}" + (f": {shown_line(line)}" if line else "")


def shown_line(line: str) -> str:
    """A line of a file, cut, with nothing that moves a cursor. Passwords and keys are left out."""
    line = line if line.isprintable() else "".join(c if c.isprintable() else "?" for c in line)
    line = _SECRET.sub("…", _CREDENTIALS.sub("//…@", line))
    return line if len(line) <= VALUE_CHARACTERS_MAX else f"{line[: VALUE_CHARACTERS_MAX - 1]}…"


def shown_value(value: Any) -> str:
    """A value as TOML writes it, cut; of a table or a list only what it is."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return shown_line('"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"')
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list):
        return "a list"
    try:
        return shown_line(str(value))
    except ValueError:  # more digits than Python prints
        return "a number of very many digits"


def nearest(wrong: object, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The known word that is most like a wrong one; None where none is."""
    import difflib

    names = {name.lower(): name for name in known}
    text = wrong if isinstance(wrong, str) else shown_value(wrong)
    found = difflib.get_close_matches(text[:100].strip().lower(), names, 1, likeness)
    return names[found[0]] if found else None


class Document:
    """A file's contents, `table`, and where in the file each of them stands."""

    def __init__(self, name: str, text: str, table: dict[str, Any]) -> None:
        self.name, self.table, self._text = name, table, text

    def at(self, *keys: str | int) -> str:
        """ "FILE:LINE" of what these keys lead to, or of the nearest table around it."""
        while keys and keys not in self._lines:
            keys = keys[:-1]
        return f"{self.name}:{self._lines.get(keys, 1)}"

    @cached_property
    def _lines(self) -> dict[Path_, int]:
        scanner = _Scanner(self._text)
        with contextlib.suppress(RecursionError, IndexError):  # what was found before is right
            scanner.run()
        return scanner.lines


_SPACE = re.compile(r"[ \t]*")
_BLANK = re.compile(r"(?:[ \t\n\r]+|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}|' r"'''.*?'{3,5}|" r'"(?:[^"\\\n]|\\.)*"|' r"'[^'\n]*'", re.DOTALL
)
_OTHER = re.compile(r"[^,\]}#\n]*")


class _Scanner:
    """Walks through TOML that is known to be sound, and notes the line of each key and item."""

    def __init__(self, text: str) -> None:
        self.lines: dict[Path_, int] = {}
        self._text, self._at = text, 0
        self._ends = [match.start() for match in re.finditer("\n", text)]
        self._counts: dict[Path_, int] = {}

    def run(self) -> None:
        """Note all lines."""
        base: Path_ = ()
        while self._skip(_BLANK) < len(self._text):
            if self._text.startswith("[", self._at):
                base = self._header()
            else:
                self._pair(base)

    def _skip(self, pattern: re.Pattern[str]) -> int:
        match = pattern.match(self._text, self._at)
        self._at = match.end() if match else self._at + 1  # never stand still
        return self._at

    def _note(self, path: Path_) -> None:
        self.lines.setdefault(path, bisect.bisect_left(self._ends, self._at) + 1)

    def _header(self) -> Path_:
        start, several = self._at, self._text.startswith("[[", self._at)
        self._at += 2 if several else 1
        keys = self._keys()
        self._at, end = start, self._at
        path: Path_ = ()
        for index, key in enumerate(keys):
            path += (key,)
            last = index == len(keys) - 1
            if last and several:
                self._counts[path] = self._counts.get(path, -1) + 1
                self._note(path)
            if path in self._counts:
                path += (self._counts[path],)
            self._note(path)
        self._at = self._text.index("]", end) + (2 if several else 1)
        return path

    def _keys(self) -> Sequence[str]:
        keys: list[str] = []
        while True:
            self._skip(_SPACE)
            start = self._at
            if self._text[start] in "\"'":
                self._skip(_STRING)
                keys.append(_unquoted(self._text[start : self._at]))
            else:
                self._skip(_BARE_KEY)
                keys.append(self._text[start : self._at])
            self._skip(_SPACE)
            if not self._text.startswith(".", self._at):
                return keys
            self._at += 1

    def _pair(self, base: Path_) -> None:
        start = self._at
        keys = self._keys()
        self._at, end = start, self._at
        for count in range(1, len(keys) + 1):
            self._note((*base, *keys[:count]))
        self._at = self._text.index("=", end) + 1
        self._value((*base, *keys))

    def _value(self, path: Path_) -> None:
        self._skip(_SPACE)
        first = self._text[self._at]
        if first == "[":
            self._at += 1
            self._items(path)
        elif first == "{":
            self._at += 1
            while self._more("}"):
                self._pair(path)
        elif first in "\"'":
            self._skip(_STRING)
        else:
            self._skip(_OTHER)

    def _items(self, path: Path_) -> None:
        index = 0
        while self._more("]"):
            self._note((*path, index))
            self._value((*path, index))
            index += 1

    def _more(self, end: str) -> bool:
        """Whether another value comes before `end`; steps over what lies between."""
        self._skip(_BLANK)
        if self._text[self._at] == ",":
            self._at += 1
            self._skip(_BLANK)
        if self._text[self._at] == end:
            self._at += 1
            return False
        return True


def _unquoted(text: str) -> str:
    import tomllib

    return str(tomllib.loads(f"k = {text}")["k"])
