"""The build hook of pyproject.toml: compiles the CPU kernels into the wheel, or says what runs without them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Without kernels Octavo runs on its reference runner, and says so: a failure here fails no build, unless
        OCTAVO_REQUIRE_KERNELS is set, as it is for wheels that are published."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        kernels = _load(root / "src/octavo/runners/cpu/build.py")
        try:
            kernels.build(
                root / "csrc", kernels.LIBRARY, jobs=os.cpu_count() or 1, objects=root / "build" / "cpu"
            )
        except (kernels.NoCompilerError, subprocess.CalledProcessError, OSError) as error:
            if os.environ.get("OCTAVO_REQUIRE_KERNELS"):
                raise
            self.app.display_warning(
                f"octavo: CPU kernels not built ({error}); the slower reference runner takes their place. "
                "Install a C++20 compiler (g++ 10, clang++ 12) and reinstall for the fast path."
            )
            return
        build_data["artifacts"].append(str(kernels.LIBRARY.relative_to(root)))
        # The library has a C interface: it fits every Python of its platform.
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("octavo_kernel_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
