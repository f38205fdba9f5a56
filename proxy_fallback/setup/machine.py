"""The machine and the user that `init` sets up, as data and questions, so that tests can stand in.

It knows where files go and which commands can be run. What is done with it is plan.py's.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from proxy_fallback.setup.changes import Commands

CA_FOLDER_NAME = "proxy-ca"


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine and the user to set up.

    `home` is Halton Meter's data folder, `user_home` the user's home directory. `witness` is a file
    of the package: without it, the package was removed. `upstream` is whether config.toml names a
    proxy that leads out of this network. `healthy` tells whether the edge answers, `metering`
    whether the worker behind it is ready, `port_taken` whether any program listens on its port.
    """

    platform: str
    uid: int
    user_home: Path
    home: Path
    environ: Mapping[str, str]
    commands: Commands
    python: str
    witness: Path
    port: int
    hosts: tuple[str, ...]
    now: datetime.datetime
    upstream: bool = False
    healthy: Callable[[], bool] = lambda: True
    metering: Callable[[], bool] = lambda: True
    port_taken: Callable[[], bool] = lambda: False
    sleep: Callable[[float], None] = time.sleep

    @property
    def ca_folder(self) -> Path:
        """Where the CA and the bundles are."""
        return self.home / CA_FOLDER_NAME

    @property
    def config_home(self) -> Path:
        """XDG_CONFIG_HOME."""
        return Path(self.environ.get("XDG_CONFIG_HOME") or self.user_home / ".config")

    @property
    def proxy_url(self) -> str:
        """The value of proxy variables."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid_file(self) -> Path:
        """The id of the proxy that runs in the background where nothing restarts it."""
        return self.home / "proxy.pid"

    @property
    def log_file(self) -> Path:
        """What launchd's agents and the background process print."""
        return self.home / "proxy.log"

    def command(self, *arguments: str) -> tuple[str, ...]:
        """A command of ours, as services run it."""
        return (self.python, "-P", "-m", "halton_meter", *arguments)

    def supervised(self) -> bool:
        """Whether launchd, or systemd --user, restarts the service."""
        if self.platform == "macos":
            return True
        if not self.commands.has("systemctl"):
            return False
        version = ("systemctl", "--user", "show", "--property=Version")
        return self.commands.run(version).code == 0
