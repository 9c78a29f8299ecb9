"""The cache folder is private to its user, or refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from octavo.errors import CacheError
from octavo.paths import cache_root, private_folder

posix = pytest.mark.skipif(os.name != "posix", reason="modes and owners are POSIX's")
root_only = pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0, reason="only root can give files to another user"
)
NOBODY = 65534


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_the_override_comes_first_then_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "variable"))
    assert cache_root(tmp_path / "override") == (tmp_path / "override").resolve()
    assert cache_root() == (tmp_path / "variable").resolve()


@pytest.mark.skipif(os.name != "posix" or os.uname().sysname == "Darwin", reason="XDG's variable")
def test_the_platform_folder_is_the_default(tmp_path, monkeypatch):
    monkeypatch.delenv("OCTAVO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path.resolve() / "octavo"
    monkeypatch.setenv("OCTAVO_CACHE", "")
    assert cache_root() == tmp_path.resolve() / "octavo"


def test_a_relative_folder_and_a_home_are_resolved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert cache_root(Path("here")) == tmp_path.resolve() / "here"
    assert cache_root(Path("~/there")) == tmp_path.resolve() / "there"


@posix
def test_it_is_made_private(tmp_path):
    old = os.umask(0)
    try:
        assert mode(cache_root(tmp_path / "cache")) == 0o700
    finally:
        os.umask(old)


@posix
@pytest.mark.parametrize("bad", [0o770, 0o702, 0o777, 0o1777])
def test_others_may_not_write(tmp_path, bad):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(bad)
    with pytest.raises(CacheError, match=f"{bad:04o}") as raised:
        cache_root(tmp_path / "cache")
    assert "chmod go-w" in raised.value.remedy


@posix
def test_others_may_read(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o755)
    cache_root(tmp_path / "cache")


@posix
def test_a_folder_that_anyone_can_replace_is_refused(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(CacheError, match="anyone can write to"):
        cache_root(tmp_path / "open" / "cache")
    (tmp_path / "open").chmod(0o1777)
    cache_root(tmp_path / "open" / "cache")


@root_only
def test_another_users_folder_is_refused(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o700)
    os.chown(tmp_path / "cache", NOBODY, NOBODY)
    with pytest.raises(CacheError, match=f"belongs to user {NOBODY}") as raised:
        cache_root(tmp_path / "cache")
    assert "OCTAVO_CACHE" in raised.value.remedy


@root_only
@pytest.mark.parametrize("inside", ["", "below/it"])
def test_another_users_link_is_refused_wherever_it_leads(tmp_path, inside):
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    cache_root(tmp_path / "link" / inside)
    os.chown(tmp_path / "link", NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(CacheError, match=f"link made by user {NOBODY}"):
        cache_root(tmp_path / "link" / inside)


@posix
def test_ones_own_link_is_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert cache_root(tmp_path / "link") == (tmp_path / "elsewhere").resolve()


@posix
def test_a_link_to_a_folder_others_can_write_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="other users can write"):
        cache_root(tmp_path / "link")


@posix
@pytest.mark.parametrize("what", ["a file", "below a file", "a loop", "a dangling link"])
def test_what_cannot_be_a_folder_is_refused(tmp_path, what):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at all")
    paths = {"a file": "file", "below a file": "file/cache", "a loop": "loop", "a dangling link": "dangling"}
    with pytest.raises(CacheError, match="cannot use the cache folder") as raised:
        private_folder(tmp_path / paths[what])
    assert "--no-cache" in raised.value.remedy


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(CacheError, match="Permission denied"):
        cache_root(tmp_path / "closed" / "cache")
