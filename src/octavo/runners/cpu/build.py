"""Compiles csrc/ into the shared library beside this file: all instruction sets in one, chosen at run time.

`hatch_build.py` runs it when the package is built; in a checkout `python src/octavo/runners/cpu/build.py` does.
Imports the standard library alone, since it also runs where the package is not installed yet.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKOUT = Path(__file__).parents[4]
LIBRARY = Path(__file__).with_name(
    "_native" + {"Darwin": ".dylib", "Windows": ".dll"}.get(platform.system(), ".so")
)

_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    # The arithmetic is written out: the compiler must neither fuse a product and a sum in one place and not in
    # another, nor reorder sums, or results would depend on the tile a row came in.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    # gcc's own AVX-512 headers set these off
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
_ISA_FLAGS = {
    "avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "avx512.cpp": [
        *("-mavx2", "-mfma", "-mf16c"),
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
    ],
}
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]


class NoCompilerError(Exception):
    """No C++20 compiler was found."""


def find_compiler() -> list[str]:
    """The command of the first compiler of $CXX, c++, g++, clang++ that knows C++20. Raises NoCompilerError."""
    candidates = [shlex.split(os.environ.get("CXX", "")), ["c++"], ["g++"], ["clang++"]]
    probe = "#include <atomic>\n#include <concepts>\nint main() { std::atomic<int> a{0}; a.notify_all(); }\n"
    for command in filter(None, candidates):
        if shutil.which(command[0]) is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text(probe)
            compiled = subprocess.run(
                [*command, "-std=c++20", "-c", str(source), "-o", str(source.with_suffix(".o"))],
                capture_output=True,
                check=False,
            )
        if compiled.returncode == 0:
            return command
    raise NoCompilerError("no C++20 compiler ($CXX, c++, g++ or clang++)")


def build(
    sources: Path, library: Path, *, jobs: int, sanitize: bool = False, objects: Path | None = None
) -> None:
    """Compile the .cpp files under `sources` into `library`.

    `objects` is a folder where object files are kept and reused while nothing they include has changed.
    Raises NoCompilerError, or subprocess.CalledProcessError with the compiler's messages on stderr.
    """
    compiler = find_compiler()
    with tempfile.TemporaryDirectory() as temporary:
        folder = objects or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        extra = _SANITIZERS if sanitize else []

        def compile_one(source: Path) -> Path:
            made = folder / (source.stem + ".o")
            if not _is_current(made):
                flags = [*_FLAGS, *_ISA_FLAGS.get(source.name, []), *extra]
                subprocess.run([*compiler, *flags, "-MMD", "-c", str(source), "-o", str(made)], check=True)
            return made

        with ThreadPoolExecutor(jobs) as pool:
            made = list(pool.map(compile_one, _sources(sources)))
        # Written beside and moved: a process that has the old library loaded keeps it.
        unfinished = library.with_name(f"{library.name}.{os.getpid()}")
        subprocess.run(
            [*compiler, *extra, "-shared", "-pthread", *map(str, made), "-o", str(unfinished)], check=True
        )
        unfinished.replace(library)


def _sources(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.cpp"), key=lambda path: path.name)
    if platform.machine().lower() not in ("x86_64", "amd64"):
        found = [path for path in found if path.name not in _ISA_FLAGS]
    return found


def _is_current(made: Path) -> bool:
    """Whether an object file is newer than everything its dependency file names."""
    rule = made.with_suffix(".d")
    if not made.exists() or not rule.exists():
        return False
    needed = rule.read_text().replace("\\\n", " ").partition(":")[2].split()
    return all(Path(path).exists() and Path(path).stat().st_mtime < made.stat().st_mtime for path in needed)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the CPU kernels of a checkout.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UBSan")
    parser.add_argument("--output", type=Path, default=LIBRARY)
    options = parser.parse_args(arguments)
    sources = CHECKOUT / "csrc"
    if not sources.is_dir():
        print(
            f"{sources} does not exist: reinstall octavo instead, which compiles its kernels", file=sys.stderr
        )
        return 1
    objects = CHECKOUT / "build" / ("cpu-sanitize" if options.sanitize else "cpu")
    try:
        build(sources, options.output, jobs=options.jobs, sanitize=options.sanitize, objects=objects)
    except NoCompilerError as error:
        print(f"{error}: install g++ 10 or clang++ 12 or newer", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
