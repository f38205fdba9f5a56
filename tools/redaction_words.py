"""Writes halton_meter/redaction/words.txt: every word that the readers of traffic look for.

python tools/redaction_words.py          # writes the file
python tools/redaction_words.py --check  # exit 1 when the file is out of date

A redacted capture keeps these words where they stand alone as a key or a value, so that it is read
as the original is. They are taken from the string constants of the readers, docstrings left out.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "halton_meter" / "redaction" / "words.txt"
READERS = ("halton_meter/providers", "halton_meter/wire")
_WORD = re.compile(r"[A-Za-z$@_][A-Za-z0-9_.$@-]{1,63}")


def words() -> list[str]:
    """All of them, sorted."""
    found: set[str] = set()
    for folder in READERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for text in _constants(ast.parse(path.read_text())):
                found.update(_WORD.findall(text))
    return sorted(found)


def _constants(tree: ast.Module) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(statement.value)
        for node in ast.walk(tree)
        if isinstance(node, documented)
        for statement in node.body
        if isinstance(statement, ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            if isinstance(node.value, str):
                yield node.value
            elif isinstance(node.value, bytes):
                yield node.value.decode("latin-1")


def main(check: bool) -> int:
    """Write the file, or say whether it is current."""
    text = "\n".join(words()) + "\n"
    if check:
        return int(not FILE.exists() or FILE.read_text() != text)
    FILE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
