"""Fetches the chat templates and vocabularies that llama.cpp tests itself with, as reference data for our tests.

They are in the source package of llama-cpp-python on PyPI (llama.cpp's folder models/, MIT). Run by `make test`:

    python tests/fetch_llama_cpp_models.py FOLDER
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

PACKAGE = "llama-cpp-python==0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
INSIDE = PurePosixPath("llama_cpp_python-0.3.36/vendor/llama.cpp/models")
KINDS = (".jinja", ".gguf", ".inp", ".out")


def fetch(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--dest", scratch, PACKAGE], check=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
            sys.exit(f"{archive.name} is not the file that was pinned")
        with tarfile.open(archive) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if member.isfile() and path.suffix in KINDS and path.is_relative_to(INSIDE):
                    target = folder / path.relative_to(INSIDE)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    source = tar.extractfile(member)
                    assert source is not None
                    target.write_bytes(source.read())


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
