"""A machine in the lab: systemd as process 1 of namespaces of its own, on a copy-on-write root.

`with Machine(lab) as machine: machine.run(["systemctl", …])`. What it writes is in memory and goes
with it; its network is the lab's. Its process ids are its own, as in a WSL2 guest or a container,
so this is also where a service meters from inside a process-id namespace. Needs root, systemd and
overlayfs; `unavailable()` says what is missing. Run as a program it is the first process, before
systemd takes its place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.lab.inside import tls_files
from tests.support.lab.lab import Lab, User

BOOT_SECONDS_MAX = 120.0
_SYSTEMD = Path("/lib/systemd/systemd")
_CGROUPS = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
# Started by basic.target or by a package's timer, and of no use here or harmful to the host.
_MASKED = (
    *("getty", "network", "timesync", "resolve", "udev", "apt-", "dpkg-", "man-db", "fstrim"),
    *("e2scrub", "logrotate", "modules-load", "systemd-sysctl", "hwdb", "machine-id", "remount"),
    *("quotacheck", "fsck", "binfmt", "pstore", "random-seed", "tmpfiles", "swap", "hugepages"),
    *("mqueue", "sys-kernel", "sys-fs", "boot-update", "journal-flush", "catalog", "sysusers"),
)
_TARGET = "[Unit]\nDescription=The lab's machine\nRequires=basic.target\nAfter=basic.target\n"


def unavailable() -> str | None:
    """Why no machine can be booted here; None when it can."""
    if not _SYSTEMD.exists():
        return f"no systemd at {_SYSTEMD}: apt-get install systemd"
    if not any((folder / "cgroup.procs").exists() for folder in _CGROUPS):
        return "no cgroup v2 hierarchy that can be written"
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "the kernel has no overlayfs"
    return None


class Machine:
    """See the file's head; boots on entry, is gone on exit."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._cgroup = next(f for f in _CGROUPS if (f / "cgroup.procs").exists()) / (
            f"lab-{os.getpid()}"
        )
        self._outer: subprocess.Popen[Any] | None = None
        self._pid = 0

    def __enter__(self) -> Machine:
        self._cgroup.mkdir(exist_ok=True)
        command = ["unshare", "--pid", "--fork", "--mount", "--uts", "--ipc", "--cgroup"]
        command += ["--propagation", "private", "--kill-child", sys.executable]
        command += ["-m", "tests.support.lab.machine", str(self.lab.folder)]
        # A process must be in its control group before it makes a namespace of it.
        join = ["/bin/sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(self._cgroup)]
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(_repository())}
        log = (self.lab.folder / "boot.log").open("wb")
        enter = ["nsenter", "-t", str(self.lab.pid), "-n", "--"]
        self._outer = subprocess.Popen(
            [*join, *enter, *command], stdout=log, stderr=log, env=environment
        )
        try:
            self._wait_until_up()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_until_up(self) -> None:
        assert self._outer is not None
        deadline = time.monotonic() + BOOT_SECONDS_MAX
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        while time.monotonic() < deadline and self._outer.poll() is None:
            self._pid = self._pid or int((children.read_text().split() or ["0"])[0])
            if self._pid:
                state = self.run(["systemctl", "is-system-running"]).stdout.strip()
                if state in ("running", "degraded"):
                    return
            time.sleep(0.1)
        raise AssertionError((self.lab.folder / "boot.log").read_text()[-2000:])

    def close(self) -> None:
        """Take its first process away, and every other one with it."""
        if self._outer is not None:
            self._outer.kill()
            self._outer.wait()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                for folder, _, _ in os.walk(self._cgroup, topdown=False):
                    os.rmdir(folder)
                return
            except OSError:  # its processes are still on their way out
                time.sleep(0.05)

    def run(
        self, argv: Sequence[str], user: User | None = None, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine, as root or as `user`, with `extra` in its environment."""
        become = []
        if user is not None:
            become = ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups"]
        enter = ["nsenter", "-t", str(self._pid), "-a", "--"]
        environment: Mapping[str, str] = self.lab.environment(user, **extra)
        return subprocess.run(
            [*enter, *become, *argv],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


def _repository() -> Path:
    return Path(__file__).resolve().parents[3]


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _open_to_all(root: Path, path: Path) -> None:
    """Let everybody enter the folders above `path`, in the copy only."""
    for folder in path.parents:
        inside = root / folder.relative_to("/")
        mode = inside.stat().st_mode
        if not mode & 0o001:
            inside.chmod(mode | 0o011)


def _lay_out(folder: Path, root: Path) -> None:
    units = root / "etc/systemd/system"
    units.mkdir(parents=True, exist_ok=True)
    (units / "lab.target").write_text(_TARGET)
    for unit in (root / "lib/systemd/system").iterdir():
        masked = any(unit.name.startswith((m, f"systemd-{m}")) for m in _MASKED)
        if masked and not unit.is_dir():
            mask = units / unit.name
            mask.unlink(missing_ok=True)
            mask.symlink_to("/dev/null")
    (root / "etc/fstab").write_text("")
    for name in ("passwd", "group"):
        shutil.copyfile(folder / "etc" / name, root / "etc" / name)
    hosts = (folder / "etc/hosts").read_text()
    (root / "etc/hosts").write_text(hosts)
    # Written to, a file becomes the copy's own: a probe on it sees nobody but this machine.
    for original in tls_files():
        os.utime(root / original.relative_to("/"))
    for path in (_repository(), Path(sys.prefix), Path(sys.base_prefix), folder):
        if path.stat().st_dev != Path("/").stat().st_dev:
            _mount("--rbind", str(path), str(root / path.relative_to("/")))
        _open_to_all(root, path)


def _boot(folder: Path) -> None:
    place = folder / f"machine-{time.monotonic_ns()}"
    place.mkdir()
    _mount("-t", "tmpfs", "tmpfs", str(place))
    upper, work, root = place / "upper", place / "work", place / "root"
    for each in (upper, work, root):
        each.mkdir()
    upper.chmod(0o755)
    options = f"lowerdir=/,upperdir={upper},workdir={work}"
    _mount("-t", "overlay", "overlay", "-o", options, str(root))
    _lay_out(folder, root)
    _mount("-t", "proc", "proc", str(root / "proc"))
    _mount("-t", "sysfs", "sysfs", str(root / "sys"))
    _mount("--rbind", "/dev", str(root / "dev"))
    for name in ("run", "sys/fs/cgroup"):
        _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(root / name))
    _mount("-t", "cgroup2", "cgroup2", str(root / "sys/fs/cgroup"))
    (root / "mnt/old").mkdir(exist_ok=True)
    os.chdir(root)
    subprocess.run(["pivot_root", ".", "mnt/old"], check=True)
    subprocess.run(["umount", "-l", "/mnt/old"], check=True)
    environment = {"container": "lxc", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    arguments = [str(_SYSTEMD), "--system", "--unit=lab.target", "--log-target=console"]
    os.execve(_SYSTEMD, arguments, environment)


if __name__ == "__main__":
    _boot(Path(sys.argv[1]))
