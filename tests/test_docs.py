"""The documents say what is so: files, definitions, limits and lists in them are looked up.

`tests/support/documents.py` reads the documents. docs/security.md has a test of its own
(`test_security_doc.py`), the README's commands too (`test_readme.py`).
"""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from halton_meter import model
from halton_meter.providers import registry
from halton_meter.store.schema import DIMENSIONS, EVENT_COLUMNS
from tests.support import documents as docs

pytestmark = pytest.mark.checkout
ROOT = docs.ROOT
TOOL = (sys.executable, "tools/provider_table.py")


@cache
def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- what any document may name ------------------------------------------------------------------


@pytest.mark.parametrize("path", docs.documents(), ids=ids)
def test_every_file_that_a_document_names_exists(path: Path) -> None:
    text = path.read_text()
    missing = [name for name in docs.named_files(text) if not docs.exists(name)]
    assert missing + docs.broken_links(path) == []


@pytest.mark.parametrize("path", docs.documents(), ids=ids)
def test_every_definition_that_a_document_names_exists(path: Path) -> None:
    found = docs.definitions(path.read_text())
    assert [each for each in found if not docs.is_defined(*each)] == []


@pytest.mark.parametrize("path", docs.documents(), ids=ids)
def test_every_command_that_a_document_names_exists(path: Path) -> None:
    text = path.read_text()
    targets = set(re.findall(r"^([\w -]+):", text_of("Makefile"), re.MULTILINE))
    assert docs.make_targets(text) - {name for names in targets for name in names.split()} == set()
    for words in docs.command_lines(text):
        named = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert named <= options_of(words), words


def options_of(words: list[str]) -> set[str]:
    """The options of the command that these words call."""
    from halton_meter.cli import main

    command: click.Command = main
    for word in words:
        if word.isupper():  # a name to be filled in
            break
        if isinstance(command, click.Group) and not word.startswith("-"):
            found = command.get_command(click.Context(command), word)
            assert found is not None, words
            command = found
    named = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    return named | {"--help", "--version"}


@pytest.mark.parametrize("path", docs.documents(), ids=ids)
def test_every_claim_in_a_document_names_its_test(path: Path) -> None:
    text = path.read_text()
    unknown = [
        name for file, name in docs.TEST.findall(text) if name not in docs.functions_of(file)
    ]
    untested = [
        what for what, by in docs.claims(text) if not (docs.TEST.search(by) or "no test" in by)
    ]
    assert (unknown, untested) == ([], [])


def code_files() -> list[str]:
    suffixes = (".py", ".c", ".cjs", ".js", ".toml", ".sh")
    return [
        file
        for file in docs.files()
        if file.startswith((*(f"{folder}/" for folder in docs.FOLDERS), "pyproject", "setup"))
        and file.endswith(suffixes)
        and not file.startswith(("pricing/data/", "fixtures/"))
    ] + ["Makefile", ".ci/run"]


def test_every_file_that_a_comment_or_docstring_names_exists() -> None:
    missing = [
        f"{file}:{line}: {name}"
        for file in code_files()
        for line, name in docs.files_named_in_code(ROOT / file)
        if not docs.exists(name)
    ]
    assert missing == []


def test_every_module_that_prose_names_exists() -> None:
    paths = [*docs.documents(), *(ROOT / file for file in code_files())]
    found = {ids(path): unknown for path in paths if (unknown := docs.unknown_modules(path))}
    assert found == {}


# --- docs/architecture.md ------------------------------------------------------------------------


def test_every_place_where_data_waits_has_its_bound_and_its_counter() -> None:
    rows = [
        row
        for rows in docs.tables(docs.section(text_of("docs/architecture.md"), "Where data waits"))
        for row in rows
    ]
    assert len(rows) >= 12
    for row in rows:
        where = docs.constants(row["Constant"])
        assert where, row
        bounds = [part for part in row["Bound"].split(" or ") if part]
        assert [docs.amount(bound) for bound in bounds] == list(map(docs.constant, where)), row
        for counter in re.findall(r"`(\w+)`", row["Counted as"]):
            assert is_counted(counter), f"nothing counts {counter}"


@cache
def product_sources() -> tuple[str, ...]:
    """The packages' Python files."""
    return tuple(
        (ROOT / file).read_text()
        for file in docs.files()
        if file.endswith(".py") and file.split("/")[0] in docs.PACKAGES
    )


def is_counted(cause: str) -> bool:
    """Whether a package has this cause of a loss among its texts."""
    return re.search(rf"""["']{cause}["']""", "\n".join(product_sources())) is not None


def test_the_nouns_and_their_fields_are_the_models() -> None:
    (rows,) = docs.tables(docs.section(text_of("docs/architecture.md"), "Nouns"))
    for row in rows:
        noun = getattr(model, row["Noun"].strip("`"))
        fields = set(dataclasses.fields(noun)) if dataclasses.is_dataclass(noun) else set()
        known = {field.name for field in fields} | set(getattr(noun, "_fields", ()))
        assert set(re.findall(r"`(\w+)`", row["Fields to know"])) <= known, row
    nouns = {"TlsChunk", "TlsClosed", "Connection", "Process", "Exchange", "UsageEvent"}
    assert nouns | {"PricedEvent", "LineItem"} <= {row["Noun"].strip("`") for row in rows}


def test_the_layers_are_those_that_the_import_contracts_keep() -> None:
    section = docs.section(text_of("docs/architecture.md"), "Imports go down only")
    drawn = section.partition("```\n")[2].partition("```")[0].splitlines()
    contracts = tomllib.loads(text_of("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = next(each["layers"] for each in contracts if each["name"] == "Imports go down only")
    wanted = [layer.replace("halton_meter.", "") for layer in layers]
    assert [line.strip() for line in drawn] == wanted
    listed = docs.section(text_of("docs/architecture.md"), "The other contracts").splitlines()
    named = [line.removeprefix("- ") for line in listed if line.startswith("- ")]
    assert named
    assert set(named) <= {each["name"] for each in contracts}


# --- docs/capture.md -----------------------------------------------------------------------------


def test_the_minimum_privileges_are_the_units() -> None:
    from halton_meter.cli import main

    unit = CliRunner().invoke(main, ["start", "--show-unit", "--via", "uprobes"]).output
    granted = re.search(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    assert granted is not None, unit
    (rows,) = docs.tables(docs.section(text_of("docs/capture.md"), "Minimum privileges"))
    assert {row["Capability"].strip("`") for row in rows} == set(granted[1].split())


def test_the_table_of_providers_is_the_codes() -> None:
    checked = subprocess.run([*TOOL, "--check"], cwd=ROOT, capture_output=True, check=False)
    assert checked.returncode == 0, "run: python tools/provider_table.py"


# --- docs/troubleshooting.md ---------------------------------------------------------------------


def printed_texts() -> list[str]:
    """Every text in the packages' code but docstrings; "…" stands for what is filled in."""
    texts = []
    for source in product_sources():
        nodes = list(ast.walk(ast.parse(source)))
        inner = {id(part) for node in nodes if isinstance(node, ast.JoinedStr)
                 for part in node.values}  # fmt: skip
        apart = inner | {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts = [str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and id(node) not in apart:
                texts.append(str(node.value))
    return texts


def test_every_line_of_status_in_the_runbook_is_one_that_the_code_prints() -> None:
    """The words of each stand in one text, in this order; "…" is what a program fills in."""
    lines = [
        row["You see"].strip("`")
        for rows in docs.tables(text_of("docs/troubleshooting.md"))
        for row in rows
        if "You see" in row
    ]
    assert len(lines) >= 20
    texts = "\0".join(printed_texts())
    unknown = [
        line
        for line in lines
        if not re.search("[^\0]*".join(re.escape(part.strip()) for part in line.split("…")), texts)
    ]
    assert unknown == []


# --- CONTRIBUTING.md -----------------------------------------------------------------------------


def how_to(title: str) -> dict[str, str]:
    """The files that a how-to lists, each with what to do there."""
    section = docs.section(text_of("CONTRIBUTING.md"), title)
    found = {}
    for rows in docs.tables(section):
        for row in rows:
            for file in re.findall(r"`([^`]+)`", row["File"]):
                found[file] = row["What to do"]
    return found


def files_with(word: str) -> set[str]:
    """Product files, and hand-written prices, in which a word stands."""
    found = re.compile(rf"(?<![\w]){word}(?![\w])")
    return {
        file
        for file in docs.files()
        if file.split("/")[0] in docs.PACKAGES
        and file.endswith((".py", ".toml", ".c", ".js"))
        and not file.startswith("pricing/data/")
        and found.search((ROOT / file).read_text())
    }


def _title_alone(value: object) -> str:
    """A set has no order that all workers share."""
    return str(value)[:20] if isinstance(value, str) else ""


# What to follow through the code, and files that name it for another reason.
EXAMPLES_OF = [
    (
        "Add a provider",
        "cohere",
        {"pricing/overlay/bedrock.toml", "halton_meter/providers/refusal.py"},
    ),
    ("Add a TLS library", "leave_go_read", set()),
    (
        "Add an event field",
        "git_branch",
        {
            "halton_meter/cli/project.py",
            "halton_meter/live/in_flight.py",
            "halton_meter/cli/report.py",
        },
    ),
    ("Add a client that names its session", "x-opencode-session-id", set()),
    ("Add a report dimension", "error_class", None),
    (
        "Add a command",
        "retag",
        {
            "halton_meter/store/store.py",
            "halton_meter/store/schema.py",
            "halton_meter/cli/project.py",
        },
    ),
]


@pytest.mark.parametrize(("title", "word", "others"), EXAMPLES_OF, ids=_title_alone)
def test_the_files_of_a_how_to_are_those_where_its_example_stands(
    title: str, word: str, others: set[str] | None
) -> None:
    listed = {file for file in how_to(title) if file.split("/")[0] in docs.PACKAGES}
    standing = files_with(word)
    assert listed <= standing, f"{word} does not stand in {sorted(listed - standing)}"
    if others is not None:
        assert standing - listed <= others, f"not listed: {sorted(standing - listed - others)}"


def test_every_module_of_providers_is_where_the_how_to_says() -> None:
    package = ROOT / "halton_meter" / "providers"
    with_a_provider = {
        path.relative_to(package).with_suffix("").as_posix().replace("/", ".")
        for path in package.rglob("*.py")
        if re.search(r"^PROVIDERS?\b.*=", path.read_text(), re.MULTILINE)
    }
    assert with_a_provider == set(registry.MODULES)


def test_every_provider_has_a_fixture_or_shares_the_api_of_one_that_has() -> None:
    captures = {path.name.partition("_")[0] for path in (ROOT / "fixtures/pcaps").glob("*.pcapng")}
    modules = {name.partition(".")[0] for name in registry.MODULES}
    assert {"anthropic", "openai", "gemini", "xai", "groq", "mistral"} <= captures & modules


def test_every_dimension_of_reports_is_a_column_of_events() -> None:
    assert {column for column in DIMENSIONS.values() if column} <= set(EVENT_COLUMNS)


def test_the_tree_in_contributing_is_the_trees() -> None:
    section = docs.section(text_of("CONTRIBUTING.md"), "Layout")
    drawn = section.partition("```\n")[2].partition("```")[0].splitlines()
    named, top = [], ""
    for line in filter(None, drawn):
        name = line.split()[0].rstrip("/")
        top = top if line.startswith(" ") else name
        named.append(f"{top}/{name}" if line.startswith(" ") else name)
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert set(docs.PACKAGES) <= set(named)
