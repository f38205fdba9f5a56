"""Compile the BPF program into the wheel, so that no user needs clang or kernel headers.

Everything else about the build is in pyproject.toml. Without clang the wheel is built all the
same: the program is then compiled, or loaded through bcc, where it is first used as root.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path
from sysconfig import get_platform

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

SOURCE = Path("capture/probe.bpf.c")


class BuildWithProbes(build_py):
    """Python files, and the object beside its source."""

    def run(self) -> None:
        """Copy, then compile. An editable install compiles on first use instead."""
        super().run()
        if self.editable_mode or not sys.platform.startswith("linux"):
            return
        clang = shutil.which("clang")
        if clang is None:
            print(
                "halton-meter: clang is missing; the wheel will not hold the compiled BPF program"
            )
            return
        machine = "arm64" if platform.machine() in ("aarch64", "arm64") else "x86"
        target = Path(self.build_lib) / SOURCE.with_name("probe.bpf.o")
        command = [clang, "-O2", "-g", "-target", "bpf", f"-D__TARGET_ARCH_{machine}"]
        done = subprocess.run([*command, "-c", SOURCE, "-o", target], check=False)
        if strip := shutil.which("llvm-strip"):  # debug information, not the BTF that loading needs
            subprocess.run([strip, "-g", target], check=False)
        if done.returncode:
            target.unlink(missing_ok=True)
            print("halton-meter: clang failed, so the wheel will not hold the compiled BPF program")


class WheelForOneMachine(bdist_wheel):
    """The object is for one machine type, so the wheel is too."""

    def get_tag(self) -> tuple[str, str, str]:
        """Name the platform where there is an object to ship."""
        if sys.platform.startswith("linux") and shutil.which("clang"):
            return ("py3", "none", get_platform().replace("-", "_"))
        return super().get_tag()


setup(cmdclass={"build_py": BuildWithProbes, "bdist_wheel": WheelForOneMachine})
