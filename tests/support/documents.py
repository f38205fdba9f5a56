"""What the documents state, in a form that tests look up: files, tests, constants, definitions."""

from __future__ import annotations

import ast
import importlib
import io
import re
import tokenize
from collections.abc import Iterator
from decimal import Decimal
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("capture", "halton_meter", "proxy_fallback", "pricing")
FOLDERS = (*PACKAGES, "tests", "docs", "tools", "bench", "fixtures")
SUFFIXES = "py|md|toml|c|cjs|js|css|html|sh|json|jsonl|pcapng"
# Names in documents, comments and docstrings that are no files of this repository.
EXAMPLES = frozenset(
    {"hunter.py", "path/file.py", "_bench.py", "ssl/ssl_lib.c", "ssl_lib.c", "s3_lib.c"}
)
_SKIPPED = {".git", ".venv", ".cache", "__pycache__", "build", "dist", "node_modules"}

TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
_CONSTANT = re.compile(r"`([\w.]+):(\w+)`")
_DEFINITION = re.compile(r"`((?:\w+/)+\w+\.py):([A-Za-z_][\w.]*)`")
_LINK = re.compile(r"\]\((?!\w+:)([^)#]*)(?:#([^)]+))?\)")
_MAKE = re.compile(r"`(?:\w+=\S+ )?make ([a-z-]+)")
_COMMAND = re.compile(r"(?:`|^)(?:sudo )?halton-meter ([^`\n#&|]+)", re.MULTILINE)
_QUOTED = re.compile(r"`([^`\s]+)`")
_CODE_FILE = re.compile(r"(?<![\w./*-])((?:[\w.-]+/)*[\w-]+(?:\.bpf)?\.(?:py|c|cjs|md))\b(?!\.|/)")
_DOTTED = re.compile(
    rf"(?<![\w./-])((?:{'|'.join(PACKAGES)}|tests|bench)(?:\.\w+)+)(?!\w)(?<!\.md)(?<!\.py)(?<!\.toml)(?<!\.pcapng)"
)
_SIZES = {"": 0, "s": 0, "KiB": 10, "MiB": 20, "GiB": 30}


def documents() -> list[Path]:
    """Every document of the repository."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@cache
def files() -> tuple[str, ...]:
    """Every file, by its path from the root."""
    return tuple(
        str(path.relative_to(ROOT))
        for path in sorted(ROOT.rglob("*"))
        if path.is_file() and not _SKIPPED & set(path.relative_to(ROOT).parts)
    )


@cache
def folders() -> frozenset[str]:
    """Every folder, by its path from the root."""
    return frozenset(str(parent) for file in files() for parent in Path(file).parents)


@cache
def _ends() -> frozenset[str]:
    """What files' paths end with, at a folder."""
    parts = (file.split("/") for file in files())
    return frozenset("/".join(each[n:]) for each in parts for n in range(len(each)))


def exists(name: str) -> bool:
    """Whether a path is there: from the root, or the end of one. `*` stands for any name."""
    path = name.rstrip("/")
    if "*" in path:
        return any(fnmatch(end, path) for end in _ends())
    return path in folders() or path in _ends()


def named_files(text: str) -> list[str]:
    """The files and folders that a document names in backquotes or links to."""
    found = []
    for quoted in _QUOTED.findall(text):
        path = quoted.partition(":")[0].replace("NAME", "*")
        top, slash, _ = path.partition("/")
        if top in ("", "~") or path in EXAMPLES:
            continue
        is_inside = slash and (top in FOLDERS or re.search(rf"\.(?:{SUFFIXES})$", path))
        if is_inside or re.fullmatch(r"[\w-]+(?:\.bpf)?\.(?:py|c|cjs|md)|Makefile", path):
            found.append(path)
    return found


def broken_links(path: Path) -> list[str]:
    """Links of a document, the web's aside, that lead to no file, or to no heading of it."""
    broken = []
    for file, anchor in _LINK.findall(path.read_text()):
        target = path.parent / file if file else path
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(f"{file}#{anchor}")
    return broken


def _anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def make_targets(text: str) -> set[str]:
    """The targets of `make` that a document names in backquotes."""
    return set(_MAKE.findall(text))


def command_lines(text: str) -> list[list[str]]:
    """What follows `halton-meter` in each command that a document gives, without remarks."""
    commands = (re.split(r" -- |  |: ", line)[0] for line in _COMMAND.findall(text))
    return [command.rstrip(":").split() for command in commands]


def files_named_in_code(path: Path) -> Iterator[tuple[int, str]]:
    """(line, file) for each file that a comment or a docstring names."""
    for line, text in _prose(path):
        for found in _CODE_FILE.findall(text):
            if found not in EXAMPLES:
                yield line, found


def unknown_modules(path: Path) -> list[str]:
    """The dotted names of modules, or of what they define, that prose names and nothing has."""
    text = path.read_text() if path.suffix == ".md" else " ".join(t for _, t in _prose(path))
    return [name for name in _DOTTED.findall(text) if not _resolves(name)]


def _resolves(name: str) -> bool:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        path, rest = "/".join(parts[:count]), ".".join(parts[count:])
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if (ROOT / file).is_file():
                return not rest or rest.startswith("__") or is_defined(file, rest)
    return False


@cache
def _prose(path: Path) -> list[tuple[int, str]]:
    """(line, text) of each comment and docstring."""
    return list(_read_prose(path))


def _read_prose(path: Path) -> Iterator[tuple[int, str]]:
    source = path.read_text()
    if _CODE_FILE.search(source) is None and _DOTTED.search(source) is None:
        return
    if path.suffix != ".py":
        yield from _comments_of(source, path.suffix)
        return
    for node in _statements(ast.parse(source)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if (docstring := ast.get_docstring(node)) is not None:
            yield getattr(node, "lineno", 1), docstring
    if not any(_CODE_FILE.search(line) or _DOTTED.search(line) for line in _remarks(source)):
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def _remarks(source: str) -> list[str]:
    """What may be a comment, or a text with a "#" in it."""
    return [line[line.index("#") :] for line in source.splitlines() if "#" in line]


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """A statement and all in it; expressions, which are most of a file, are left out."""
    yield node
    for block in ("body", "orelse", "finalbody", "handlers", "cases"):
        inside = getattr(node, block, None)
        for each in inside if isinstance(inside, list) else ():
            yield from _statements(each)


def _comments_of(source: str, suffix: str) -> Iterator[tuple[int, str]]:
    if suffix in (".c", ".cjs", ".js", ".css"):
        for found in re.finditer(r"/\*.*?\*/|^\s*//.*?$", source, re.DOTALL | re.MULTILINE):
            yield source.count("\n", 0, found.start()) + 1, found[0]
        return
    for number, line in enumerate(source.splitlines(), 1):
        if "#" in line:
            yield number, line[line.index("#") :]


@cache
def functions_of(file: str) -> frozenset[str]:
    """The functions that a file defines, at any depth."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.walk(_tree(file)) if isinstance(node, kinds))


@cache
def _tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


def definitions(text: str) -> list[tuple[str, str]]:
    """(file, qualified name) of each `path/file.py:Class.method`."""
    return _DEFINITION.findall(text)


def is_defined(file: str, name: str) -> bool:
    """Whether a file defines this class, function, method or name."""
    if not (ROOT / file).is_file():
        return False
    body = _tree(file).body
    for part in name.split("."):
        found = next((node for node in body if part in _names(node)), None)
        if found is None:
            return False
        body = getattr(found, "body", [])
    return True


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return {node.name}
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    return {target.id for target in targets if isinstance(target, ast.Name)}


def amount(text: str) -> Decimal:
    """A number as a table writes it: "32 MiB", "10,000", "0.01 s", "25%"."""
    found = re.fullmatch(r"\$?([\d,]+(?:\.\d+)?) ?([A-Za-z%]*)", text)
    assert found, f"not a number: {text!r}"
    number = Decimal(found[1].replace(",", ""))
    return number / 100 if found[2] == "%" else number * (1 << _SIZES[found[2]])


def constant(where: str) -> Decimal:
    """The value of "module:NAME"."""
    module, _, name = where.partition(":")
    return Decimal(str(getattr(importlib.import_module(module), name)))


def constants(text: str) -> list[str]:
    """Each `module:NAME` of a text."""
    return [f"{module}:{name}" for module, name in _CONSTANT.findall(text) if "/" not in module]


def tables(text: str) -> Iterator[list[dict[str, str]]]:
    """The tables of a document: a list of rows each, by the words of the head."""
    head: list[str] = []
    rows: list[dict[str, str]] = []
    for line in [*text.splitlines(), ""]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            if rows:
                yield rows
            head, rows = [], []
        elif not head:
            head = cells
        elif set("".join(cells)) - set("-: "):
            assert len(cells) == len(head), line
            rows.append(dict(zip(head, cells, strict=True)))


def section(text: str, title: str) -> str:
    """What stands under a heading, up to the next of its level or above."""
    found = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    assert found, f"no section {title!r}"
    rest = text[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def claims(text: str) -> list[tuple[str, str]]:
    """The rows of tables with a column "Kept true by": what is claimed, and by what."""
    return [
        (next(iter(row.values())), row["Kept true by"])
        for rows in tables(text)
        for row in rows
        if "Kept true by" in row
    ]
