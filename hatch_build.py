"""Compiles kframe/source/drain.c while the package is built; without a C compiler kframe does without it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("kframe/source/drain.c")
LIBRARY = SOURCE.with_name("_drain.so")


class DrainBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or not self.compiled():
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["artifacts"].append(str(LIBRARY))

    def compiled(self) -> bool:
        command = shlex.split(os.environ.get("CC", "cc"))
        if os.name != "posix" or not shutil.which(command[0]):
            self.app.display_warning("No C compiler: kframe will take Kafka's records apart in Python.")
            return False
        flags = ["-O2", "-shared", "-fPIC", "-o", str(LIBRARY), str(SOURCE)]
        done = subprocess.run([*command, *flags], cwd=self.root, capture_output=True, text=True, check=False)
        if done.returncode:
            self.app.display_warning(f"drain.c was not compiled, kframe does without it: {done.stderr}")
        return done.returncode == 0
