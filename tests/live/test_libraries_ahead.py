"""TLS libraries that a command will load are named before it begins, wherever they lie."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from halton_meter.live.probes.libraries import Libraries
from halton_meter.live.probes.remembered import LIBRARIES_MAX, remember, remembered


def linked(target: Path, *flags: str) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    target.parent.mkdir(parents=True, exist_ok=True)
    source = (
        "int main(void) { return 0; }" if target.suffix != ".so" else "int own(void) { return 1; }"
    )
    shared = ["-shared", "-fPIC"] if target.suffix == ".so" else []
    command = [compiler, "-xc", "-", "-o", str(target), *shared, "-Wl,--no-as-needed", *flags]
    subprocess.run(command, input=source.encode(), check=True)
    return target


def library(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"stands in")
    return str(path)


def found(
    folder: Path, words: Sequence[str] = (), programs: Sequence[Path] = (), **environment: str
) -> list[str]:
    libraries = Libraries(environment)
    libraries.look(words, programs, folder)
    return list(libraries.found)


@pytest.mark.parametrize("kind", ["--enable-new-dtags", "--disable-new-dtags"])
@pytest.mark.parametrize("origin", ["absolute", "$ORIGIN"])
def test_a_programs_runpath_and_rpath(tmp_path: Path, kind: str, origin: str) -> None:
    ssl = library(tmp_path / "own/libssl.so.3")
    place = str(tmp_path / "own") if origin == "absolute" else "$ORIGIN/../own"
    program = linked(tmp_path / "app/program", f"-Wl,{kind}", f"-Wl,-rpath,{place}")
    assert found(tmp_path, programs=[program]) == [ssl]


def test_what_a_needed_library_has_beside_it(tmp_path: Path) -> None:
    """curl needs libcurl, which needs libssl: each by paths of its own."""
    ssl = library(tmp_path / "deep/libssl.so.1.1")
    fetch = linked(tmp_path / "mid/libfetch.so", f"-Wl,-rpath,{tmp_path / 'deep'}")
    program = linked(
        tmp_path / "app/program", f"-Wl,-rpath,{fetch.parent}", f"-L{fetch.parent}", "-lfetch"
    )
    assert found(tmp_path, programs=[program]) == [ssl]
    moved = fetch.rename(fetch.parent.parent / fetch.name)  # in no path of the program's
    assert found(tmp_path, programs=[program]) == []
    assert found(tmp_path, programs=[program], LD_LIBRARY_PATH=str(moved.parent)) == [ssl]


@pytest.mark.parametrize(
    ("place", "words", "environment"),
    [
        ("lib/libssl.so.3", [], {"LD_LIBRARY_PATH": "{}/none:{}/lib"}),
        ("lib/libgnutls.so.30", ["sh", "-c", "export LD_LIBRARY_PATH={}/lib; exec curl"], {}),
        ("lib/libssl.so.3", ["env", "LD_LIBRARY_PATH={}/lib", "curl"], {}),
        ("usr/lib/x86_64-linux-gnu/libssl.so.3", ["chroot", "{}", "curl"], {}),
        ("lib/python3.12/site-packages/x.libs/libssl-1f2.so.3", ["{}/bin/python"], {}),
        ("lib/libssl.so.3", [], {"CONDA_PREFIX": "{}"}),
        (
            "lib/libssl.so.3",
            ["python", "-c", "load('{}/lib/libssl.so.3')"],
            {},
        ),
    ],
)
def test_where_else_libraries_lie(
    tmp_path: Path, place: str, words: list[str], environment: dict[str, str]
) -> None:
    ssl = library(tmp_path / place)
    (tmp_path / "usr").mkdir(exist_ok=True)
    library(tmp_path / place.replace("lib", "other", 1))
    said = [word.format(tmp_path, tmp_path) for word in words]
    known = {name: text.format(tmp_path, tmp_path) for name, text in environment.items()}
    assert found(tmp_path, said, **known) == [ssl]


@pytest.mark.parametrize("size", [0, 3, 64, 1000])
def test_a_file_that_is_no_program_leads_nowhere(tmp_path: Path, size: int) -> None:
    whole = linked(tmp_path / "app/program", f"-Wl,-rpath,{tmp_path}").read_bytes()
    cut = tmp_path / "cut"
    cut.write_bytes(whole[:size])
    assert found(tmp_path, programs=[cut, tmp_path / "missing"]) == []


def test_libraries_are_remembered_while_they_are_there(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    assert remembered(home) == []
    first, second = library(tmp_path / "a/libssl.so.3"), library(tmp_path / "b/libssl.so.3")
    remember(home, [first, "/usr/lib/x86_64-linux-gnu/libssl.so.3", "/opt/program"])
    remember(home, [second])
    assert remembered(home) == [second, first]
    Path(first).unlink()
    assert remembered(home) == [second]
    remember(home, [library(tmp_path / f"{n}/libssl.so.3") for n in range(LIBRARIES_MAX + 5)])
    assert len(remembered(home)) == LIBRARIES_MAX
    (home / "libraries.json").write_text('{"libraries": [1, null, "relative.so"]')
    assert remembered(home) == []
