"""Where this program was installed from, so that a person installs the same one again.

Its name alone says nothing: an index may have another program of that name.
"""

from __future__ import annotations

import shlex

from halton_meter import __version__

NAME = "halton-meter"


def requirement() -> str:
    """What pip or uv is given to install this program, quoted for a shell.

    The file, folder or repository that it was installed from (PEP 610), else name and version.
    """
    import importlib.metadata  # with its like it takes longer than all else of some commands
    import json
    from urllib.parse import unquote, urlsplit

    try:
        text = importlib.metadata.distribution(NAME).read_text("direct_url.json")
        found = json.loads(text or "{}")
        url, version = str(found["url"]), dict(found.get("vcs_info", {}))
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError, LookupError, TypeError):
        return f"{NAME}=={__version__}"
    if commit := version.get("commit_id"):
        return shlex.quote(f"{NAME} @ git+{url}@{commit}")
    parts = urlsplit(url)
    return shlex.quote(unquote(parts.path) if parts.scheme == "file" else url)


def update(more: str = "") -> str:
    """What a person does to have a newer version, whatever it was installed from."""
    return f"Install a newer Halton Meter{more}. This one was installed as {requirement()}"


def for_root() -> str:
    """The commands that install this program where only root can write."""
    return (
        "sudo python3 -m venv /opt/halton-meter && "
        f"sudo /opt/halton-meter/bin/pip install {requirement()}"
    )
