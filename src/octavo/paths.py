"""Where Octavo keeps files of its own, and that nobody else can have put them there.

One folder, private to the user: `cache_root`. Packed weights lie in it, and whatever else can be made
again. Reading and writing what is inside is the callers' work.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from octavo.errors import CacheError

_ELSEWHERE = "Set OCTAVO_CACHE (or --cache-dir) to a folder of your own, or use --no-cache."


def cache_root(override: Path | None = None) -> Path:
    """The cache folder: `override`, else $OCTAVO_CACHE, else the platform's; made (0700) where missing.

    Returns its real path. Raises CacheError where it cannot be made, or another user could change it.
    """
    if override is None:
        named = os.environ.get("OCTAVO_CACHE")
        override = Path(named) if named else _platform_cache()
    return private_folder(override.expanduser())


def private_folder(path: Path) -> Path:
    """Make `path` with mode 0700 where it is missing, and return its real path if only this user can write it.

    On POSIX the folder must belong to this user and be writable by nobody else; every link on the way must
    be this user's or root's; and no folder above it may let others rename what is in it (writable by all
    without the sticky bit). Windows keeps a user's folders private by inherited access lists, which modes
    and owners do not show, so nothing is checked there. Raises CacheError.
    """
    path = path.absolute()
    try:
        _refuse_foreign_links(path)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        real = path.resolve(strict=True)
        if os.name == "posix":
            _refuse_foreign_folder(real)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        reason = getattr(error, "strerror", None) or str(error)
        raise CacheError(f"cannot use the cache folder {path}: {reason}", remedy=_ELSEWHERE) from error
    return real


def _platform_cache() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("octavo", appauthor=False)


def _refuse_foreign_links(path: Path) -> None:
    """A link that another user planted may lead into a folder of ours that is not a cache."""
    if os.name != "posix":
        return
    for step in (path, *path.parents):
        try:
            found = step.lstat()
        except FileNotFoundError:
            continue
        if stat.S_ISLNK(found.st_mode) and found.st_uid not in (0, os.geteuid()):
            raise CacheError(
                f"the cache folder {path} goes through {step}, a link made by user {found.st_uid}",
                remedy=_ELSEWHERE,
            )


def _refuse_foreign_folder(real: Path) -> None:
    found = real.stat()
    if found.st_uid != os.geteuid():
        raise CacheError(
            f"the cache folder {real} belongs to user {found.st_uid}, not to user {os.geteuid()} who runs this",
            remedy=_ELSEWHERE,
        )
    if found.st_mode & 0o022:
        raise CacheError(
            f"other users can write to the cache folder {real} (mode {stat.S_IMODE(found.st_mode):04o})",
            remedy=f"Run: chmod go-w {real}   or set OCTAVO_CACHE (or --cache-dir) to another folder.",
        )
    for parent in real.parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise CacheError(
                f"other users can replace the cache folder {real}: anyone can write to {parent}",
                remedy=_ELSEWHERE,
            )
