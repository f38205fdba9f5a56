"""The clients' Python: a venv outside the repository with the providers' own SDKs, made once.

`client_python()` gives its interpreter, installing it on first use with pip (some two minutes).
Set HALTON_METER_TEST_CACHE to keep it elsewhere than ~/.cache/halton-meter-tests.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path

PACKAGES = (
    "anthropic>=0.70",
    "openai>=2.0",
    "groq>=0.30",
    "google-genai>=1.40",
    "google-ai-generativelanguage>=0.6.18",
    "xai-sdk>=1.4",
    "requests>=2.32",
    "aiohttp>=3.10",
    "httpx[http2]>=0.27",
)


def cache_folder() -> Path:
    """Where things installed for tests live."""
    named = os.environ.get("HALTON_METER_TEST_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "halton-meter-tests"


def client_folder() -> Path:
    """The venv's folder: one for each Python and set of packages."""
    wanted = "\n".join((sys.version, sys.base_prefix, *PACKAGES)).encode()
    return cache_folder() / f"clients-{hashlib.sha256(wanted).hexdigest()[:12]}"


def client_python() -> Path:
    """The interpreter with the SDKs; the first call installs them. Raises RuntimeError."""
    folder = client_folder()
    python = folder / "bin" / "python"
    done = folder / ".complete"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
            make = [sys.executable, "-m", "venv", "--clear", str(folder)]
            subprocess.run(make, check=True, env=environment)
            install = [str(python), "-m", "pip", "install", "-q", "--prefer-binary", *PACKAGES]
            if subprocess.run(install, check=False, env=environment).returncode:
                raise RuntimeError(
                    f"the lab's clients could not be installed into {folder}; "
                    "they come from PyPI: see pip's message above"
                )
            done.touch()
    return python


if __name__ == "__main__":
    print(client_python())
