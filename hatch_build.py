"""Compiles the C files while the package is built; without a C compiler kframe does without them."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARIES = {
    Path(source): Path(source).with_name(f"_{Path(source).stem}.so")
    for source in ("kframe/source/drain.c", "kframe/batch/json_rows.c")
}


class NativeBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or not self.compiler():
            return
        compiled = [str(library) for source, library in LIBRARIES.items() if self.compile(source, library)]
        if not compiled:
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["artifacts"] += compiled

    def compiler(self) -> list[str]:
        command = shlex.split(os.environ.get("CC", "cc"))
        if os.name == "posix" and shutil.which(command[0]):
            return command
        self.app.display_warning("No C compiler: kframe will fetch and decode Kafka's records without C.")
        return []

    def compile(self, source: Path, library: Path) -> bool:
        flags = ["-O3", "-shared", "-fPIC", "-o", str(library), str(source)]
        done = subprocess.run(
            [*self.compiler(), *flags], cwd=self.root, capture_output=True, text=True, check=False
        )
        if done.returncode:
            self.app.display_warning(f"{source} was not compiled, kframe does without it: {done.stderr}")
        return done.returncode == 0
