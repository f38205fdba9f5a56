"""Whether the code that root is about to run is our own, and who may change it.

Our packages have names that others have, too (`capture` and `pricing` are on PyPI): installed
beside us they overwrite our files, and a folder that is earlier on the path hides them. Before root
starts anything, this checks that all four packages come from one folder, also for the processes
that root starts (they ignore PYTHONPATH and a user's own site folder), and are as pip wrote them.
That protects from accidents and foreign packages. Who may write to our folder needs no trick:
`changeable_by_others` finds that. Standard library only, and `Problem`.
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from halton_meter import __version__, installed
from halton_meter.problem import Problem

PACKAGES = ("halton_meter", "capture", "proxy_fallback", "pricing")
# What Python or root's helper runs: modules, and the kernel's program with its source.
_CODE = (".py", ".o", ".c")
_ELSEWHERE = "unset PYTHONPATH, and run it from another folder"


def _away() -> str:
    return f"install it alone: {installed.for_root()}"


def problems() -> list[Problem]:
    """Why root should not run this code; nothing where all is well."""
    place = place_of_ours()
    for name in PACKAGES:
        found = _folder(name, sys.path)
        if found is not None and found != place / name:
            return [_foreign(found, _ELSEWHERE)]
    for name in PACKAGES:
        found = _folder(name, isolated_path())
        if found is None:
            what = f"root's processes would not find {place / name}: they ignore PYTHONPATH and ~"
            return [Problem(what, _away())]
        if found != place / name:
            return [_foreign(found, _away())]
    if (changed := _unlike_its_record(place)) is not None:
        what = f"root would run {changed}, which has changed since Halton Meter was installed"
        return [Problem(what, _away())]
    return []


def _foreign(found: Path, fix: str) -> Problem:
    return Problem(f"root would run code of {found}, which is not Halton Meter's", fix)


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of ours in a process of its own.

    What root starts, and what that starts, is isolated: no variable and no folder of a user's
    changes what it imports. Other users may have us in their own site folder; the current folder
    never counts.
    """
    isolated = sys.flags.isolated or os.geteuid() == 0
    return [sys.executable, "-I" if isolated else "-P", "-m", module, *arguments]


def place_of_ours() -> Path:
    """The folder that our packages lie in."""
    return Path(__file__).resolve().parents[2]


def isolated_path() -> list[str]:
    """Where a process that we start as root (`python -I`) looks for modules."""
    hidden = {""}
    if not sys.flags.safe_path and sys.path:
        hidden.add(sys.path[0])  # the script's folder, or where one is
    if not sys.flags.ignore_environment:
        hidden.update(os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if (site := sys.modules.get("site")) is not None:
        hidden.add(str(getattr(site, "USER_SITE", "")))
    hidden |= {os.path.abspath(entry) for entry in hidden if entry}
    return [entry for entry in sys.path if entry not in hidden]


def _folder(name: str, entries: Sequence[str]) -> Path | None:
    """The folder of the package that Python would import, of these entries of its path."""
    spec = PathFinder.find_spec(name, entries)
    for finder in sys.meta_path:  # an editable install has one of its own
        if spec is not None and spec.origin is not None:
            break
        find = getattr(finder, "find_spec", None)
        if find is not None and finder is not PathFinder:
            spec = find(name, None)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).resolve().parent


def _unlike_its_record(place: Path) -> Path | None:
    """The first file of ours that is not as pip recorded it; None where there is no record."""
    for name, digest in _recorded(place / f"halton_meter-{__version__}.dist-info" / "RECORD"):
        try:
            found = hashlib.sha256((place / name).read_bytes()).digest()
        except OSError:
            return place / name
        if base64.urlsafe_b64encode(found).rstrip(b"=").decode() != digest:
            return place / name
    return None


def _recorded(record: Path) -> Iterator[tuple[str, str]]:
    """(path, digest) of each file of code; PEP 376: path,sha256=digest,size."""
    try:
        lines = record.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        name, _, rest = line.partition(",")
        kind, _, digest = rest.partition(",")[0].partition("=")
        if kind == "sha256" and name.endswith(_CODE) and name.split("/")[0] in PACKAGES:
            yield name, digest


# --- who may change it ----------------------------------------------------------------------------


def changeable_by_others() -> Path | None:
    """A file that root would run and another user could change; None where there is none."""
    seen: set[str] = set()
    for path in _run_as_root():
        for each in (path, *path.parents):
            if str(each) in seen:
                continue
            seen.add(str(each))
            try:
                found = each.lstat()
            except OSError:
                continue
            if found.st_uid != 0 or _is_open(found):
                return path
    return None


def _is_open(found: os.stat_result) -> bool:
    """Whether others than the owner may write there; a sticky folder keeps its files safe."""
    return bool(found.st_mode & 0o022) and not (
        stat.S_ISLNK(found.st_mode) or found.st_mode & stat.S_ISVTX
    )


def _run_as_root() -> Iterable[Path]:
    """The interpreter, what it loads by itself, the folders that it imports from, and our files."""
    yield Path(sys.executable)
    yield Path(sys.executable).resolve()
    yield Path(os.__file__).resolve()
    for name in ("sitecustomize", "usercustomize"):
        if origin := getattr(sys.modules.get(name), "__file__", None):
            yield Path(origin).resolve()
    for entry in isolated_path():
        if os.path.exists(entry):
            yield Path(entry).resolve()
            yield from Path(entry).resolve().glob("*.pth")
    place = place_of_ours()
    for name in PACKAGES:
        for folder, _, files in os.walk(place / name):
            yield Path(folder)
            yield from (Path(folder, file) for file in files)
