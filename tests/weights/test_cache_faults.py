"""Full and failing disks, leftovers, locks, and pruning: typed errors, nothing half-written, nothing lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo import file_lock, packed_cache
from octavo.errors import CacheError, NotEnoughDiskError, OctavoError
from octavo.file_lock import Lock, locked
from octavo.quant import format_from_manifest
from octavo.weights import cache_entries, prune

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX's locks and signals")
KEY, OTHER = "a" * 32, "b" * 32
PADDINGS = 7
"""Arrays of padding between those of `checkpoint`."""


def files(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "packed").iterdir())


# --- disks -----------------------------------------------------------------------------------------


def test_a_disk_too_small_is_refused_before_writing(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(os, "write", None)
    with pytest.raises(NotEnoughDiskError) as raised:
        checkpoint.open(tmp_path)
    error = raised.value
    assert str(tmp_path) in error.message
    assert error.available_bytes == 1000 < error.needed_bytes < 1 << 20
    assert "--no-cache" in error.remedy
    assert "OCTAVO_CACHE" in error.remedy
    assert files(tmp_path) == []


@pytest.fixture
def fail_at():
    """fail_at(patch, call, n, code): the n-th such system call fails; the others work."""

    def arm(patch: pytest.MonkeyPatch, name: str, n: int, code: int) -> None:
        real, calls = getattr(os, name), [0]

        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == n:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        patch.setattr(os, name, call)

    return arm


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_fault_at_each_call_is_typed_and_leaves_nothing(
    checkpoint, expected, content, assert_same, tmp_path, fail_at, call, code
):
    faults = 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, call, faults + 1, code)
            try:
                store = checkpoint.open(tmp_path)
                break
            except OctavoError as raised:
                error = raised
        faults += 1
        assert type(error) is (CacheError if code == errno.EIO else NotEnoughDiskError)
        assert str(tmp_path) in error.message
        assert os.strerror(code) in error.message
        if isinstance(error, NotEnoughDiskError):
            assert error.needed_bytes > sum(array.nbytes for array in expected.values())
        assert cache_entries(tmp_path) == []
        if call == "replace" and faults == 2:  # the data had got its name: the next open sweeps it
            assert [Path(name).suffix for name in files(tmp_path)] == [".safetensors"]
        else:
            assert files(tmp_path) == []
    # At the write each array, each padding, the header and the manifest.
    assert faults == (len(expected) + PADDINGS + 2 if call == "write" else 2)
    assert_same(content(store), expected)
    assert len(files(tmp_path)) == 2
    assert checkpoint.open(tmp_path).from_cache


def test_short_writes_are_continued(checkpoint, expected, content, assert_same, tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:1000]))
    assert_same(content(checkpoint.open(tmp_path)), expected)
    monkeypatch.undo()
    assert checkpoint.open(tmp_path).from_cache


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=0700", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up(checkpoint, small_disk, monkeypatch):
    """Refused beforehand where that can be seen; else, as if others took the room meanwhile, at the write."""
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - (20 << 10)))
    with pytest.raises(NotEnoughDiskError, match=r"are free$") as raised:
        checkpoint.open(small_disk)
    assert raised.value.needed_bytes > raised.value.available_bytes == 20 << 10
    usage = shutil.disk_usage(small_disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(NotEnoughDiskError, match="No space left on device"):
        checkpoint.open(small_disk)
    monkeypatch.undo()
    assert files(small_disk) == []
    assert shutil.disk_usage(small_disk).free == 20 << 10, "all of it is free again"
    (small_disk / "other").unlink()
    assert not checkpoint.open(small_disk).from_cache
    assert checkpoint.open(small_disk).from_cache


# --- leftovers -------------------------------------------------------------------------------------


def leave(folder: Path, *, age_seconds: float = 0.0) -> None:
    """What writers of two keys left: a temporary file, data without a manifest, and a lock."""
    folder.mkdir(mode=0o700, exist_ok=True)
    for name in (
        f"{KEY}.{'0' * 32}.tmp",
        f"{KEY}.{'1' * 16}.safetensors",
        f"{OTHER}.{'2' * 32}.tmp",
        f"{KEY}.lock",
    ):
        (folder / name).write_bytes(b"x" * 100)
        os.utime(folder / name, (time.time() - age_seconds,) * 2)


@posix
def test_leftovers_of_the_dead_are_swept(checkpoint, tmp_path):
    leave(tmp_path / "packed")
    (tmp_path / "packed" / "notes.txt").write_text("not ours")
    (tmp_path / "packed" / "model.safetensors").write_text("not ours")
    checkpoint.open(tmp_path)
    left = files(tmp_path)
    assert [name for name in left if name.startswith((KEY, OTHER))] == []
    assert {"notes.txt", "model.safetensors"} < set(left)
    assert len(left) == 4


@posix
def test_files_of_the_living_stay(checkpoint, tmp_path):
    leave(tmp_path / "packed")
    with locked(tmp_path / "packed" / f"{KEY}.lock") as lock:
        assert lock is Lock.HELD
        checkpoint.open(tmp_path)
        assert prune(tmp_path, everything=True) > 0
        assert [name.rpartition(".")[2] for name in files(tmp_path)] == ["tmp", "safetensors", "lock"]
    assert prune(tmp_path) == 200
    assert files(tmp_path) == []


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks, or Windows."""
    monkeypatch.setattr(file_lock, "_try_lock", lambda path: (Lock.UNSUPPORTED, None))


def test_without_locks_only_old_leftovers_go(checkpoint, tmp_path, no_locks):
    leave(tmp_path / "packed", age_seconds=3600)
    checkpoint.open(tmp_path)
    assert len(files(tmp_path)) == 6
    leave(tmp_path / "packed", age_seconds=48 * 3600)
    assert checkpoint.open(tmp_path).from_cache
    assert len(files(tmp_path)) == 3  # the lock's file is of no use to anybody, and in nobody's way


@posix
def test_a_lock_that_stays_busy_does_not_stop_us(
    checkpoint, expected, content, assert_same, tmp_path, monkeypatch
):
    monkeypatch.setattr("octavo.weights._WAIT_SECONDS", 0.2)
    checkpoint.open(tmp_path)
    (entry,) = cache_entries(tmp_path)
    prune(tmp_path, everything=True)
    stages: list[str] = []
    with locked(tmp_path / "packed" / f"{entry.key}.lock"):
        store = checkpoint.open(tmp_path, progress=lambda stage, done, total: stages.append(stage))
    assert_same(content(store), expected)
    assert stages[0].startswith("waiting for another process")
    assert "packed in memory" in store.notices[0]
    assert cache_entries(tmp_path) == []


@posix
def test_whoever_waited_finds_the_entry(checkpoint, tmp_path, monkeypatch):
    """The holder of the lock makes the entry while we wait: nothing is packed twice."""
    checkpoint.open(tmp_path / "ready")
    (entry,) = cache_entries(tmp_path / "ready")
    folder = tmp_path / "packed"
    folder.mkdir(mode=0o700)

    def let_it_finish(seconds: float) -> None:
        for path in (tmp_path / "ready" / "packed").iterdir():
            shutil.copy(path, folder)
        held.close()

    with pytest.MonkeyPatch.context() as patch:
        import fcntl

        held = (folder / f"{entry.key}.lock").open("w")
        fcntl.flock(held, fcntl.LOCK_EX)
        patch.setattr(file_lock.time, "sleep", let_it_finish)
        assert checkpoint.open(tmp_path).from_cache


@posix
def test_a_lock_removed_by_its_last_holder_is_taken_anew(tmp_path, monkeypatch):
    """Locking a file that has no name any more would lock nobody out."""
    import fcntl

    path, real, unlinked = tmp_path / "lock", fcntl.flock, []

    def lose_the_race(descriptor: int, operation: int) -> None:
        if not unlinked:
            path.unlink()
            unlinked.append(True)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lose_the_race)
    with locked(path) as lock:
        assert lock is Lock.HELD
        with locked(path) as second:
            assert second is Lock.BUSY
    assert unlinked
    assert not path.exists()


def test_an_entry_that_vanishes_at_once_is_packed_in_memory(
    checkpoint, expected, content, assert_same, tmp_path, monkeypatch
):
    real = os.replace

    def prune_at_once(source, target):
        real(source, target)
        if str(target).endswith(".json"):
            os.unlink(target)

    monkeypatch.setattr(os, "replace", prune_at_once)
    assert_same(content(checkpoint.open(tmp_path)), expected)


def test_data_that_another_process_has_mapped_on_windows(checkpoint, tmp_path, monkeypatch, no_locks):
    """Replacing it is refused there; it has the same content, so it may stay."""
    checkpoint.open(tmp_path)
    (entry,) = cache_entries(tmp_path)
    (tmp_path / "packed" / f"{entry.key}.json").unlink()
    real, refused = os.replace, []

    def refuse_data(source, target):
        if target == entry.path:
            refused.append(target)
            raise PermissionError(errno.EACCES, "Access is denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse_data)
    assert not checkpoint.open(tmp_path).from_cache
    assert refused
    assert checkpoint.open(tmp_path).from_cache
    assert len(files(tmp_path)) == 2
    prune(tmp_path, everything=True)
    with pytest.raises(CacheError, match="Access is denied"):
        checkpoint.open(tmp_path)


def test_a_read_only_cache_is_still_read(checkpoint, tmp_path, monkeypatch):
    checkpoint.open(tmp_path)

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("utime", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    (tmp_path / "packed" / f"{KEY}.lock").write_text("")
    assert checkpoint.open(tmp_path).from_cache


# --- looking and pruning -----------------------------------------------------------------------------


def three_entries(checkpoint, root: Path) -> None:
    """int8 used now, llm-int8 an hour ago, plain two hours ago."""
    for hours, quant in enumerate(("int8", "llm-int8", "none")):
        checkpoint.open(root, quant=quant)
        newest = max((root / "packed").glob("*.json"), key=lambda path: path.stat().st_mtime)
        os.utime(newest, (time.time() - 3600 * hours - 1,) * 2)


def formats(root: Path) -> list[str]:
    return [entry.format for entry in cache_entries(root)]


def test_entries_say_what_they_are(checkpoint, tmp_path):
    assert cache_entries(tmp_path / "nowhere") == []
    assert prune(tmp_path / "nowhere", everything=True) == 0
    before = time.time()
    checkpoint.open(tmp_path)
    (entry,) = cache_entries(tmp_path)
    assert (entry.model, entry.layout, entry.format) == ("tiny", "ref-1", "int8")
    assert entry.nbytes == entry.path.stat().st_size
    assert before - 1 < entry.last_used < time.time() + 1
    assert entry.path.name.startswith(entry.key)


def test_a_manifest_says_each_parameters_format(checkpoint, tmp_path):
    checkpoint.open(tmp_path)
    (entry,) = cache_entries(tmp_path)
    _, _, facts = packed_cache._read_manifest(tmp_path / "packed", entry.key)
    assert facts.parameters == {
        p.name: "f32" if p.role == "vector" else "int8" for p in checkpoint.parameters
    }
    assert {name: format_from_manifest(form).name for name, form in facts.formats.items()} == {
        "int8": "int8",
        "f32": "f32",
    }


def test_use_is_remembered(checkpoint, tmp_path):
    three_entries(checkpoint, tmp_path)
    assert formats(tmp_path) == ["int8", "llm-int8", "bf16"]
    assert checkpoint.open(tmp_path, quant="none").from_cache
    assert formats(tmp_path) == ["bf16", "int8", "llm-int8"]


def test_prune_by_age(checkpoint, tmp_path):
    three_entries(checkpoint, tmp_path)
    size = sum(path.stat().st_size for path in (tmp_path / "packed").iterdir())
    freed = prune(tmp_path, older_than_seconds=1.5 * 3600)
    assert formats(tmp_path) == ["int8", "llm-int8"]
    assert freed == size - sum(path.stat().st_size for path in (tmp_path / "packed").iterdir()) > 0


def test_prune_by_size_keeps_the_last_used(checkpoint, tmp_path):
    three_entries(checkpoint, tmp_path)
    sizes = [entry.nbytes for entry in cache_entries(tmp_path)]
    prune(tmp_path, max_bytes=sum(sizes))
    assert len(formats(tmp_path)) == 3
    prune(tmp_path, max_bytes=sizes[0] + sizes[1])
    assert formats(tmp_path) == ["int8", "llm-int8"]
    prune(tmp_path, max_bytes=sizes[0] - 1)
    assert formats(tmp_path) == []


def test_prune_everything_but_what_is_being_written(checkpoint, content, assert_same, tmp_path):
    three_entries(checkpoint, tmp_path)
    store = checkpoint.open(tmp_path, quant="int8")
    before = content(store)
    assert prune(tmp_path) == 0
    assert prune(tmp_path, everything=True) > 0
    assert files(tmp_path) == []
    assert_same(content(store), before)  # who has it mapped keeps it
