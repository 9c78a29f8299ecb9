"""A checkpoint's folder on disk, and where its files may really lie.

A file is inside if its real path is: links out of the folder are refused. In the hub's cache every file is
a link into the blobs of its repository (or the blobs all repositories share), which is allowed where the
folder stands in exactly that layout.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from octavo.errors import ModelNotFoundError, UnsafeFileError
from octavo.sources.fingerprint import local_identity


@dataclass(frozen=True, slots=True)
class ModelFolder:
    path: Path
    roots: tuple[Path, ...]
    """Real folders that files may lie in."""
    commit: str | None = None
    """Set where the hub's client downloaded the folder just now or before: its files are then identified by
    commit and blob, which are hashes of the content."""

    @classmethod
    def open(cls, path: Path, commit: str | None = None) -> ModelFolder:
        """Raises ModelNotFoundError where the folder cannot be read."""
        real = Path(os.path.realpath(path))
        return cls(path, (real, *_blob_folders(path)), commit)

    def names(self) -> frozenset[str]:
        """Of what stands in the folder."""
        try:
            return frozenset(os.listdir(self.path))
        except OSError as error:
            raise ModelNotFoundError(
                f"cannot list {self.path}: {error.strerror}", remedy="Check the path and its permissions."
            ) from error

    def names_below(self) -> frozenset[str]:
        """Of what stands in the folder and, as FOLDER/NAME, in its own folders that can be listed."""
        names = set(self.names())
        for name in self.names():
            with suppress(OSError):
                names.update(f"{name}/{below}" for below in os.listdir(self.path / name))
        return frozenset(names)

    def locate(self, name: str) -> Path | None:
        """The real path of a file of the folder; None where there is none.

        Raises UnsafeFileError where it leads out of the folder.
        """
        path = self.path / name
        if not os.path.lexists(path):
            return None
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(root) for root in self.roots):
            raise UnsafeFileError(
                f"{path} leads out of its folder, to {real}",
                remedy="Name the folder it leads to, or put the file itself in the link's place.",
            )
        return real if real.exists() else None

    def identity(self, name: str) -> str:
        """Which bytes the file `name` holds, for the fingerprint (see fingerprint.py)."""
        path = self.path / name
        if self.commit is None:
            return local_identity(os.stat(path))
        blob = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
        return f"hub {self.commit} {blob} {os.stat(path).st_size}"


def _blob_folders(path: Path) -> tuple[Path, ...]:
    """The blobs a snapshot of the hub's cache may link to: CACHE/models--ORG--NAME/snapshots/COMMIT."""
    snapshots = Path(os.path.realpath(path)).parent
    repository = snapshots.parent
    if snapshots.name != "snapshots" or not repository.name.startswith("models--"):
        return ()
    return (repository / "blobs", repository.parent / "blobs")
