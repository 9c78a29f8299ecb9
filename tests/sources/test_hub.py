"""The hub, played by a small server on this machine, through huggingface_hub's own client."""

from __future__ import annotations

import errno
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
from safetensors.numpy import save

from octavo.errors import (
    DownloadError,
    GatedModelError,
    IncompatibleModelError,
    InvalidParameterError,
    ModelNotFoundError,
    NotEnoughDiskError,
    OctavoError,
    UnsafeFileError,
)
from octavo.sources import hub, hub_cache, hub_transfer
from octavo.sources.gguf_names import parts_of
from octavo.sources.resolve import resolve

COMMIT, OLDER = "c" * 40, "b" * 40
TOKEN = "hf_canaryCANARYcanary"
SECRET_QUERY = "X-Amz-Signature=canary"


@dataclass
class FakeHub:
    """Repositories by name: revision -> files. Every request is counted."""

    url: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    gated: set[str] = field(default_factory=set)
    status: int | None = None
    stall_seconds: float = 0.0
    damaged: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    """File -> how many more answers end after half of what was asked for."""
    pause_seconds: float = 0.0
    """Between the halves of a large file."""
    headers: dict[str, str] = field(default_factory=dict)
    """Of every file's answer, in place of the true ones."""
    longer_by: int = 0
    """Bytes that files have beyond what the list says."""
    xet: bool = False
    """Answers for weights say that they are in Xet storage too; their plain address stays as it is."""
    storage: FakeHub | None = None
    """Another host, to which weights are redirected."""
    sent_bytes: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)

    def add(self, name: str, files: dict[str, bytes], commit: str = COMMIT) -> None:
        self.repositories.setdefault(name, {})[commit] = files

    def downloads(self) -> list[str]:
        return [
            request.partition("/resolve/")[2] for request in self.requests if request.startswith("GET /org")
        ]


def is_large(name: str) -> bool:
    """Whether the hub keeps a file by its SHA-256, in a storage of its own."""
    return name.endswith((".safetensors", ".gguf", ".bin"))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: FakeHub

    def do_GET(self) -> None:
        self.respond(with_body=True)

    def do_HEAD(self) -> None:
        self.respond(with_body=False)

    def respond(self, *, with_body: bool) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        if "/org/" in path:  # the library has requests of its own
            hub.tokens.add(self.headers.get("Authorization"))
        time.sleep(hub.stall_seconds)
        if hub.status is not None:
            return self.answer(hub.status, b"an error page with " + SECRET_QUERY.encode(), with_body)
        if path.startswith("/api/models/"):
            name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            return self.listing(name, revision or "main", with_body)
        name, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        return self.file(name, revision, file, with_body)

    def commit(self, name: str, revision: str) -> str | None:
        """None after having answered with an error."""
        if name not in self.hub.repositories:
            self.fail(401, "RepoNotFound")
            return None
        commit = self.hub.branches.get(revision, revision)
        if commit not in self.hub.repositories[name]:
            self.fail(404, "RevisionNotFound")
            return None
        return commit

    def listing(self, name: str, revision: str, with_body: bool) -> None:
        commit = self.commit(name, revision)
        if commit is None:
            return
        siblings = []
        for file, data in self.hub.repositories[name][commit].items():
            sibling = {"rfilename": file, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            if is_large(file):
                sibling["lfs"] = {
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "size": len(data),
                    "pointerSize": 100,
                }
            siblings.append(sibling)
        body = json.dumps({"id": name, "modelId": name, "sha": commit, "siblings": siblings}).encode()
        self.answer(200, body, with_body, {"Content-Type": "application/json"})

    def file(self, name: str, revision: str, file: str, with_body: bool) -> None:
        commit = self.commit(name, revision)
        if commit is None:
            return None
        if name in self.hub.gated:
            return self.fail(403, "GatedRepo")
        files = self.hub.repositories[name][commit]
        if file not in files:
            return self.fail(404, "EntryNotFound")
        data = files[file] + bytes(self.hub.longer_by)
        headers = {"ETag": f'"{hashlib.sha256(files[file]).hexdigest()}"', "X-Repo-Commit": commit}
        headers |= self.hub.headers
        if self.hub.xet and is_large(file):
            headers |= {"X-Xet-Hash": "0" * 64, "X-Xet-Refresh-Route": f"{self.hub.url}/xet"}
        if file in self.hub.damaged:
            data = bytes(len(data))
        if self.hub.storage is not None and is_large(file):
            place = {"Location": f"{self.hub.storage.url}{self.path}?{SECRET_QUERY}"}
            linked = {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(data))}
            return self.answer(302, b"", with_body, headers | place | linked)
        status, asked = 200, self.headers.get("Range")
        if asked is not None:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status, data = 206, data[start:]
        if not with_body or not is_large(file):
            return self.answer(status, data, with_body, headers)
        half = len(data) // 2
        self.answer(status, data, False, headers)
        self.send(file, data[:half])
        time.sleep(self.hub.pause_seconds)
        if self.hub.cut.get(file, 0):
            self.hub.cut[file] -= 1
            self.close_connection = True
            return None
        return self.send(file, data[half:])

    def send(self, file: str, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()
        self.hub.sent_bytes[file] = self.hub.sent_bytes.get(file, 0) + len(data)

    def fail(self, status: int, code: str) -> None:
        self.answer(status, b"", self.command == "GET", {"X-Error-Code": code})

    def answer(
        self, status: int, body: bytes, with_body: bool, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def served(fake: FakeHub) -> Iterator[None]:
    handler = type("Bound", (Handler,), {"hub": fake})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up are meant to
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    fake = FakeHub()
    with served(fake):
        point_at(fake, monkeypatch, tmp_path)
        yield fake


def point_at(fake: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = huggingface_hub.constants  # read from HF_ENDPOINT and HF_HOME when the library is imported
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("TRANSFORMERS_CACHE", "HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def closed(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing listens at the hub's address."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )


DOCUMENTS = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b'{"top_k": 5}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"chat_template": "hello"}',
}
NOT_NEEDED = {
    "README.md": b"x" * 1000,
    "pytorch_model.bin": b"never",
    "onnx/model.onnx": b"never",
    "original/consolidated.00.pth": b"never",
    "modeling_custom.py": b"raise SystemExit",
}
WEIGHTS = save({"a": np.arange(1000, dtype=np.float32)})
SHARDS = {
    "model-00001-of-00002.safetensors": save({"a": np.ones(300, np.float32)}),
    "model-00002-of-00002.safetensors": save({"b": np.ones(500, np.float32)}),
}
INDEX = json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}).encode()
SINGLE = DOCUMENTS | NOT_NEEDED | {"model.safetensors": WEIGHTS}
SHARDED = DOCUMENTS | NOT_NEEDED | SHARDS | {"model.safetensors.index.json": INDEX}


def raises(kind: type[OctavoError], *says: str, model: str = "org/name", **options: object) -> OctavoError:
    with pytest.raises(kind) as caught:
        resolve(model, **options)
    error = caught.value
    assert type(error) is kind
    for part in says:
        assert part in error.message
    for part in (TOKEN, SECRET_QUERY, "Traceback"):
        assert part not in error.message + error.remedy
    assert error.remedy
    return error


# --- what works -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("files", "weights"), [(SINGLE, {"model.safetensors"}), (SHARDED, set(SHARDS))])
def test_only_the_needed_files_are_fetched(
    fake_hub: FakeHub, capfd, files: dict[str, bytes], weights: set[str]
):
    fake_hub.add("org/name", files)
    seen: list[tuple[str, int, int | None]] = []
    source = resolve("org/name", progress=lambda *facts: seen.append(facts))
    assert source.location == "org/name"
    assert source.revision == COMMIT
    assert source.generation_config == {"top_k": 5}
    assert source.chat_template == "hello"
    assert source.notices == ()
    assert {tensor.file.path.stat().st_size for tensor in source.tensors.values()} == {
        len(files[name]) for name in weights
    }
    index = {"model.safetensors.index.json"} & set(files)
    fetched = {request.partition("/")[2] for request in fake_hub.downloads()}
    assert fetched == set(DOCUMENTS) | weights | index
    assert {stage for stage, _, _ in seen} == {"downloading"}
    done = [done for _, done, _ in seen]
    assert done == sorted(done)
    total = sum(len(files[name]) for name in (set(DOCUMENTS) | weights) - {"config.json"})
    assert {total_bytes for _, _, total_bytes in seen} == {total}
    assert done[-1] == total
    assert fake_hub.tokens == {f"Bearer {TOKEN}"}
    assert capfd.readouterr() == ("", "")


def test_a_second_start_downloads_nothing(fake_hub: FakeHub):
    fake_hub.add("org/name", SHARDED)
    first = resolve("org/name")
    before = len(fake_hub.downloads())
    seen: list[object] = []
    second = resolve("org/name", progress=lambda *facts: seen.append(facts))
    assert len(fake_hub.downloads()) == before
    assert seen == []
    assert second.fingerprint == first.fingerprint


def test_a_pinned_commit_on_disk_asks_nobody(fake_hub: FakeHub):
    fake_hub.add("org/name", SINGLE)
    resolve("org/name", revision=COMMIT)
    before = len(fake_hub.requests)
    assert resolve("org/name", revision=COMMIT).revision == COMMIT
    assert len(fake_hub.requests) == before


def test_a_branch_is_pinned_to_its_commit(fake_hub: FakeHub):
    fake_hub.branches["test"] = OLDER
    fake_hub.add("org/name", SINGLE)
    fake_hub.add("org/name", SINGLE | {"generation_config.json": b'{"top_k": 1}'}, OLDER)
    older, newer = resolve("org/name", revision="test"), resolve("org/name")
    assert (older.revision, newer.revision) == (OLDER, COMMIT)
    assert older.generation_config == {"top_k": 1}
    assert older.fingerprint != newer.fingerprint


def test_a_branch_that_moves_during_the_download_gives_one_commit(fake_hub: FakeHub, monkeypatch):
    fake_hub.add("org/name", SINGLE)
    fake_hub.add("org/name", SHARDED | {"generation_config.json": b"{}"}, OLDER)
    real = huggingface_hub.HfApi.model_info

    def then_move(*args: object, **options: object) -> object:
        info = real(*args, **options)
        fake_hub.branches["main"] = OLDER
        return info

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", then_move)
    source = resolve("org/name")
    assert source.revision == OLDER
    assert source.generation_config == {}
    assert set(source.tensors) == {"a", "b"}


# --- without a network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [SINGLE, SHARDED])
def test_offline_uses_what_is_there_and_asks_nobody(fake_hub: FakeHub, monkeypatch, files: dict[str, bytes]):
    fake_hub.add("org/name", files)
    online = resolve("org/name")
    before = len(fake_hub.requests)
    assert resolve("org/name", offline=True).fingerprint == online.fingerprint
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/name").fingerprint == online.fingerprint
    assert len(fake_hub.requests) == before


def test_offline_and_not_there(fake_hub: FakeHub):
    error = raises(DownloadError, "org/name", "offline", offline=True)
    assert "--offline" in error.remedy
    assert fake_hub.requests == []


def test_offline_and_only_a_part_there(fake_hub: FakeHub, tmp_path: Path):
    fake_hub.add("org/name", SHARDED)
    resolve("org/name")
    (shard,) = (tmp_path / "cache").rglob("model-00002-of-00002.safetensors")
    shard.unlink()
    raises(DownloadError, "not all of it", offline=True)


def test_no_connection(fake_hub: FakeHub, monkeypatch):
    closed(fake_hub, monkeypatch)
    error = raises(DownloadError, "org/name", "127.0.0.1:9")
    assert "HF_ENDPOINT" in error.remedy


def test_no_connection_but_downloaded_before(fake_hub: FakeHub, monkeypatch):
    fake_hub.add("org/name", SINGLE)
    online = resolve("org/name")
    closed(fake_hub, monkeypatch)
    source = resolve("org/name")
    assert source.fingerprint == online.fingerprint
    (notice,) = source.notices
    assert COMMIT[:12] in notice
    assert "could not be downloaded" in notice


def test_a_hub_that_does_not_answer(fake_hub: FakeHub, monkeypatch):
    monkeypatch.setattr(hub, "_TIMEOUT_SECONDS", 0.2)
    fake_hub.stall_seconds = 1.0
    start = time.monotonic()
    raises(DownloadError, "no answer")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble(fake_hub: FakeHub, monkeypatch, status: int):
    fake_hub.status = status
    raises(DownloadError, f"HTTP {status}")


# --- refusals -------------------------------------------------------------------------------------------


def test_no_such_repository(fake_hub: FakeHub):
    raises(ModelNotFoundError, "no model org/name")


def test_no_such_revision(fake_hub: FakeHub):
    fake_hub.add("org/name", SINGLE)
    error = raises(ModelNotFoundError, "no revision typo", revision="typo")
    assert "--revision" in error.remedy


def test_gated(fake_hub: FakeHub):
    fake_hub.add("org/name", SINGLE)
    fake_hub.gated.add("org/name")
    error = raises(GatedModelError, "org/name", "gated")
    assert "HF_TOKEN" in error.remedy
    assert f"{fake_hub.url}/org/name" in error.remedy


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_the_hub_does_not_take(fake_hub: FakeHub, status: int):
    fake_hub.status = status
    with pytest.raises(ModelNotFoundError) as caught:
        resolve("org/name")
    assert "HF_TOKEN" in caught.value.remedy
    assert TOKEN not in caught.value.message + caught.value.remedy


def test_pickles_are_refused_before_anything_is_downloaded(fake_hub: FakeHub):
    fake_hub.add("org/name", DOCUMENTS | NOT_NEEDED)
    raises(UnsafeFileError, "pytorch_model.bin")
    assert fake_hub.downloads() == []


def test_a_repository_without_weights(fake_hub: FakeHub):
    fake_hub.add("org/name", {"README.md": b"x"})
    raises(IncompatibleModelError, "README.md")


@pytest.mark.parametrize("shard", ["../../../../escaped.safetensors", "/tmp/escaped.safetensors"])
def test_a_hostile_index_writes_nothing_outside(fake_hub: FakeHub, tmp_path: Path, shard: str):
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    fake_hub.add("org/name", SHARDED | {"model.safetensors.index.json": index, shard: WEIGHTS})
    raises(UnsafeFileError, "no plain file name")
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


def test_an_index_that_names_a_missing_shard(fake_hub: FakeHub):
    files = SHARDED.copy()
    del files["model-00002-of-00002.safetensors"]
    fake_hub.add("org/name", files)
    raises(ModelNotFoundError, "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("revision", ["../../etc/passwd", "a b", "", "-x", "a" * 300])
def test_a_revision_that_can_be_none(fake_hub: FakeHub, revision: str):
    error = raises(InvalidParameterError, revision=revision)
    assert error.parameter == "revision"
    assert fake_hub.requests == []


def test_too_little_disk(fake_hub: FakeHub, monkeypatch, tmp_path: Path):
    fake_hub.add("org/name", SINGLE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    error = raises(NotEnoughDiskError, "1000 bytes are free")
    needed = sum(len(data) for name, data in SINGLE.items() if name in (*DOCUMENTS, "model.safetensors"))
    assert error.needed_bytes == needed - len(DOCUMENTS["config.json"])
    assert error.available_bytes == 1000
    assert "HF_HOME" in error.remedy
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_disk_that_fills_up_on_the_way(fake_hub: FakeHub, monkeypatch):
    fake_hub.add("org/name", SINGLE)
    real = huggingface_hub.hf_hub_download

    def full(repository: str, name: str, **options: object) -> str:
        if name == "model.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return str(real(repository, name, **options))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    error = raises(NotEnoughDiskError, "org/name")
    assert error.needed_bytes == len(WEIGHTS)


def test_a_file_that_arrives_damaged_is_not_kept(fake_hub: FakeHub):
    fake_hub.add("org/name", SINGLE)
    fake_hub.damaged.add("model.safetensors")
    raises(DownloadError, "model.safetensors", "SHA-256")
    raises(DownloadError, "not all of it", offline=True)
    fake_hub.damaged.clear()
    assert set(resolve("org/name").tensors) == {"a"}


# --- transfers that end early, and hosts that are not what they say -----------------------------------------


def parts_left(tmp_path: Path) -> list[int]:
    return [path.stat().st_size for path in tmp_path.rglob("*.octavo-part")]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_transfer, "_PAUSE_SECONDS", 0.01)


@pytest.mark.usefixtures("hasty")
def test_a_transfer_that_is_cut_goes_on_where_it_was(fake_hub: FakeHub, tmp_path: Path):
    fake_hub.add("org/name", SINGLE)
    fake_hub.cut["model.safetensors"] = 2
    seen: list[int] = []
    source = resolve("org/name", progress=lambda _, done, __: seen.append(done))
    np.testing.assert_array_equal(source.tensors["a"].read(), np.arange(1000, dtype=np.float32))
    assert fake_hub.sent_bytes["model.safetensors"] == len(WEIGHTS)  # none twice
    assert seen == sorted(seen)
    assert parts_left(tmp_path) == []


@pytest.mark.usefixtures("hasty")
def test_a_transfer_that_failed_is_gone_on_with_by_the_next_try(
    fake_hub: FakeHub, monkeypatch, tmp_path: Path
):
    fake_hub.add("org/name", SINGLE)
    monkeypatch.setattr(hub_transfer, "TIMEOUT_SECONDS", 0.3)
    fake_hub.pause_seconds = 5.0
    fake_hub.cut["model.safetensors"] = 1
    real = hub_transfer._Transfer._append
    monkeypatch.setattr(hub_transfer, "_TRIES", 1)

    def then_no_more(self: object, start: int) -> bool:
        if start:
            raise TimeoutError("the network went away")
        return bool(real(self, start))

    monkeypatch.setattr(hub_transfer._Transfer, "_append", then_no_more)
    raises(DownloadError)
    assert parts_left(tmp_path) == [len(WEIGHTS) // 2]
    monkeypatch.setattr(hub_transfer._Transfer, "_append", real)
    fake_hub.pause_seconds = 0.0
    fake_hub.cut.clear()
    needed = len(WEIGHTS) - len(WEIGHTS) // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))  # for the rest only
    assert set(resolve("org/name").tensors) == {"a"}
    assert fake_hub.sent_bytes["model.safetensors"] == len(WEIGHTS)


@pytest.mark.usefixtures("hasty")
def test_a_file_in_xet_storage_is_gone_on_with_too(fake_hub: FakeHub, tmp_path: Path):
    fake_hub.add("org/name", SINGLE)
    fake_hub.xet = True
    fake_hub.cut["model.safetensors"] = 1
    assert set(resolve("org/name").tensors) == {"a"}
    assert fake_hub.sent_bytes["model.safetensors"] == len(WEIGHTS)
    assert parts_left(tmp_path) == []


def test_who_asks_for_xet_transfers_gets_the_librarys(fake_hub: FakeHub, monkeypatch):
    """The control of the test above: it asks for the right to read the storage, which this hub cannot give."""
    fake_hub.add("org/name", SINGLE)
    fake_hub.xet = True
    monkeypatch.setattr("huggingface_hub.constants.HF_XET_HIGH_PERFORMANCE", True)
    with pytest.raises(OctavoError):
        resolve("org/name")
    assert "GET /xet" in fake_hub.requests
    assert "model.safetensors" not in fake_hub.sent_bytes


@pytest.mark.usefixtures("hasty")
def test_a_part_that_is_damaged_is_found_and_fetched_anew(fake_hub: FakeHub, tmp_path: Path):
    fake_hub.add("org/name", SINGLE)
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    part = hub_transfer.part_path("org/name", sha256)
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 100)
    raises(DownloadError, "model.safetensors", "SHA-256")
    assert not part.exists()
    part.write_bytes(b"x" * (len(WEIGHTS) + 1))
    assert set(resolve("org/name").tensors) == {"a"}


@pytest.mark.usefixtures("hasty")
def test_a_transfer_that_stalls_ends_at_a_deadline(fake_hub: FakeHub, monkeypatch):
    fake_hub.add("org/name", SINGLE)
    monkeypatch.setattr(hub_transfer, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(hub_transfer, "_TRIES", 2)
    fake_hub.pause_seconds = 3.0
    start = time.monotonic()
    raises(DownloadError, "no answer")
    assert time.monotonic() - start < 15


def test_a_download_in_a_killed_process_is_gone_on_with(fake_hub: FakeHub, monkeypatch, tmp_path: Path):
    fake_hub.add("org/name", SINGLE)
    fake_hub.pause_seconds = 30.0
    environment = {**os.environ, "HF_ENDPOINT": fake_hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
    child = subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment)
    try:
        deadline = time.monotonic() + 60
        while parts_left(tmp_path) != [len(WEIGHTS) // 2]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not list((tmp_path / "cache").rglob("model.safetensors"))
    fake_hub.pause_seconds = 0.0
    assert set(resolve("org/name").tensors) == {"a"}
    assert fake_hub.sent_bytes["model.safetensors"] == len(WEIGHTS)
    assert parts_left(tmp_path) == []


def test_another_host_never_sees_the_token(fake_hub: FakeHub):
    """Weights lie in a storage that the hub redirects to: another port is another host."""
    fake_hub.add("org/name", SINGLE)
    with served(storage := FakeHub()):
        storage.add("org/name", SINGLE)
        fake_hub.storage = storage
        assert set(resolve("org/name").tensors) == {"a"}
    assert fake_hub.tokens == {f"Bearer {TOKEN}"}
    assert [request.partition(" ")[0] for request in storage.requests] == ["GET"]
    assert storage.tokens == {None}


def test_a_chain_of_hosts_never_sees_the_token(fake_hub: FakeHub):
    fake_hub.add("org/name", SINGLE)
    with served(first := FakeHub()), served(second := FakeHub()):
        for storage in (first, second):
            storage.add("org/name", SINGLE)
        fake_hub.storage, first.storage = first, second
        assert set(resolve("org/name").tensors) == {"a"}
    assert first.tokens == second.tokens == {None}


def test_a_storage_that_sends_something_else(fake_hub: FakeHub, tmp_path: Path):
    fake_hub.add("org/name", SINGLE)
    with served(storage := FakeHub(damaged={"model.safetensors"})):
        storage.add("org/name", SINGLE)
        fake_hub.storage = storage
        raises(DownloadError, "SHA-256")
    assert not list((tmp_path / "cache").rglob("model.safetensors"))


ESCAPES = [
    "../../../escaped",
    "../../../../escaped",
    "/escaped",
    "..",
    "a/b",
    "..\\..\\escaped",
    "%2e%2e/escaped",
    "a\tb",
    " ",
]


@pytest.mark.parametrize("header", ["ETag", "X-Linked-ETag", "X-Repo-Commit"])
@pytest.mark.parametrize("value", ESCAPES)
def test_an_answer_that_leads_out_of_the_cache(fake_hub: FakeHub, tmp_path: Path, header: str, value: str):
    fake_hub.add("org/name", SINGLE)
    fake_hub.headers = {header: value}
    with pytest.raises((UnsafeFileError, DownloadError)):
        resolve("org/name")
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert not any("escaped" in name for name in written)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_missing_file_that_leads_out_of_the_cache(fake_hub: FakeHub, tmp_path: Path, monkeypatch):
    fake_hub.add("org/name", SINGLE)

    def lost(self: Handler, name: str, revision: str, file: str, with_body: bool) -> None:
        headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "../../../escaped"}
        self.answer(404, b"", with_body, headers)

    monkeypatch.setattr(Handler, "file", lost)
    raises(UnsafeFileError, "X-Repo-Commit")
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


@pytest.mark.parametrize(
    "name", ["../escaped.gguf", "/escaped.gguf", "a/../../../../escaped.gguf", "..\\escaped.gguf"]
)
def test_a_list_that_leads_out_of_the_cache(fake_hub: FakeHub, write_gguf, tmp_path: Path, name: str):
    """The tag stands in the hostile name alone."""
    data = write_gguf("kept.gguf").read_bytes()
    (tmp_path / "kept.gguf").unlink()
    hostile = name.replace("escaped", "escaped-Q4_0")
    fake_hub.add("org/name", {hostile: data, "name-Q8_0.gguf": data})
    for model in ("org/name:Q4_0", f"org/name:{hostile}"):
        with pytest.raises(OctavoError):
            resolve(model)
    assert fake_hub.downloads() == []
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("by", [1, 4 << 20])
def test_files_longer_than_the_list_says(fake_hub: FakeHub, tmp_path: Path, by: int):
    fake_hub.add("org/name", SINGLE)
    fake_hub.longer_by = by
    raises(DownloadError)
    assert (
        sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < len(WEIGHTS) + 2000 + by
    )
    assert not list(tmp_path.rglob("model.safetensors"))


@pytest.mark.usefixtures("hasty")
def test_a_file_that_always_ends_early(fake_hub: FakeHub, tmp_path: Path):
    fake_hub.add("org/name", SINGLE)
    fake_hub.cut["model.safetensors"] = 1000
    raises(DownloadError, "no answer")
    assert not list(tmp_path.rglob("model.safetensors"))


# --- GGUF -----------------------------------------------------------------------------------------------


@pytest.fixture
def gguf_repository(fake_hub: FakeHub, write_gguf) -> FakeHub:
    data = write_gguf("source.gguf").read_bytes()
    names = ["name-Q8_0.gguf", "name-Q4_1.gguf", "sub/name-F16.gguf", "split-00001-of-00002.gguf"]
    fake_hub.add("org/name", dict.fromkeys(names, data) | {"mmproj-name.gguf": b"x", "config.json": b"{}"})
    return fake_hub


def test_a_gguf_repository_is_not_chosen_from(gguf_repository: FakeHub):
    error = raises(ModelNotFoundError, "name-Q8_0.gguf", "name-Q4_1.gguf", "sub/name-F16.gguf")
    assert "mmproj" not in error.message
    assert "-m org/name:name-Q4_1.gguf" in error.remedy
    assert gguf_repository.downloads() == []


@pytest.mark.parametrize("name", ["name-Q8_0.gguf", "sub/name-F16.gguf"])
def test_a_named_gguf_file(gguf_repository: FakeHub, name: str):
    source = resolve(f"org/name:{name}")
    assert source.location == f"org/name:{name}"
    assert source.revision == COMMIT
    assert source.naming == "gguf"
    assert gguf_repository.downloads() == [f"{COMMIT}/{name}"]
    assert resolve(f"org/name:{name}", offline=True).fingerprint == source.fingerprint


def test_a_gguf_file_that_is_not_there(gguf_repository: FakeHub):
    error = raises(ModelNotFoundError, "no file name-Q2_K.gguf", model="org/name:name-Q2_K.gguf")
    assert "name-Q4_1.gguf" in error.remedy


@pytest.mark.parametrize(
    ("tag", "file"), [("Q8_0", "name-Q8_0.gguf"), ("q4_1", "name-Q4_1.gguf"), ("F16", "sub/name-F16.gguf")]
)
def test_a_tag_names_a_gguf_file(gguf_repository: FakeHub, tag: str, file: str):
    source = resolve(f"org/name:{tag}")
    assert source.location == f"org/name:{file}"
    assert gguf_repository.downloads() == [f"{COMMIT}/{file}"]
    assert resolve(f"org/name:{tag}", offline=True).fingerprint == source.fingerprint
    assert resolve(f"org/name:{file}", offline=True).fingerprint == source.fingerprint


@pytest.mark.parametrize("tag", ["Q2_K", "Q4", "0"])
def test_a_tag_that_is_not_there(gguf_repository: FakeHub, tag: str):
    error = raises(ModelNotFoundError, f"no GGUF model tagged {tag}", model=f"org/name:{tag}")
    for name in ("name-Q8_0.gguf (", "name-Q4_1.gguf (", "sub/name-F16.gguf ("):
        assert name in error.remedy
    assert gguf_repository.downloads() == []


def test_a_listing_says_how_to_name_one(gguf_repository: FakeHub):
    error = raises(ModelNotFoundError, "4 GGUF models")
    assert "-m org/name:name-Q4_1.gguf" in error.remedy
    assert "-m org/name:Q4_1" in error.remedy


def test_a_repository_with_one_gguf_model(fake_hub: FakeHub, write_gguf):
    fake_hub.add("org/name", {"name-Q8_0.gguf": write_gguf().read_bytes(), "mmproj-F16.gguf": b"x"})
    source = resolve("org/name")
    assert source.location == "org/name:name-Q8_0.gguf"
    assert resolve("org/name", offline=True).fingerprint == source.fingerprint


def test_a_gguf_file_beside_safetensors_has_to_be_named(fake_hub: FakeHub, write_gguf):
    fake_hub.add("org/name", SINGLE | {"name-Q8_0.gguf": write_gguf().read_bytes()})
    assert resolve("org/name").naming == "huggingface"
    assert resolve("org/name:Q8_0").naming == "gguf"
    assert resolve("org/name", offline=True).naming == "huggingface"


@pytest.fixture
def split_repository(fake_hub: FakeHub, write_gguf) -> FakeHub:
    first = write_gguf(
        "name-F32.gguf",
        tensors={f"blk.{i}.attn_norm.weight": np.full(64, i, np.float32) for i in range(4)},
        split_tensors=2,
    )
    parts = {f"F32/{name}": first.with_name(name).read_bytes() for name in parts_of(first.name)}
    fake_hub.add("org/name", parts | {"name-Q8_0.gguf": b"another"})
    return fake_hub


@pytest.mark.parametrize("named", ["F32", "F32/name-F32-00002-of-00003.gguf"])
def test_all_parts_of_a_split_gguf_are_fetched(split_repository: FakeHub, named: str):
    seen: list[tuple[str, int, int | None]] = []
    source = resolve(f"org/name:{named}", progress=lambda *facts: seen.append(facts))
    assert source.location == "org/name:F32/name-F32-00001-of-00003.gguf"
    assert len(source.tensors) == 5
    assert [request.rpartition("/")[2] for request in split_repository.downloads()] == [
        f"name-F32-0000{i}-of-00003.gguf" for i in (1, 2, 3)
    ]
    total = sum(
        len(data) for name, data in split_repository.repositories["org/name"][COMMIT].items() if "F32" in name
    )
    assert seen[-1] == ("downloading", total, total)
    done = [bytes_ for _, bytes_, _ in seen]
    assert done == sorted(done)
    assert resolve(f"org/name:{named}", offline=True).fingerprint == source.fingerprint


def test_a_split_gguf_that_is_not_all_there(split_repository: FakeHub, tmp_path: Path):
    resolve("org/name:F32")
    (part,) = (tmp_path / "cache").rglob("name-F32-00002-of-00003.gguf")
    part.unlink()
    raises(DownloadError, "not all of it", model="org/name:F32", offline=True)
    del split_repository.repositories["org/name"][COMMIT]["F32/name-F32-00002-of-00003.gguf"]
    raises(ModelNotFoundError, "lacks 1 of the 3 parts", "00002-of-00003", model="org/name:F32")


def test_the_disk_is_checked_for_all_parts(split_repository: FakeHub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    error = raises(NotEnoughDiskError, model="org/name:F32")
    files = split_repository.repositories["org/name"][COMMIT]
    assert error.needed_bytes == sum(len(data) for name, data in files.items() if "F32" in name)
    assert split_repository.downloads() == []


def test_a_gguf_file_outside_the_repository(gguf_repository: FakeHub):
    raises(InvalidParameterError, model="org/name:../../x.gguf")
    assert gguf_repository.requests == []


# --- the cache ------------------------------------------------------------------------------------------


def test_cached_models_are_listed_and_removed(fake_hub: FakeHub, tmp_path: Path):
    assert hub_cache.cached_models() == ()
    fake_hub.add("org/name", SINGLE)
    fake_hub.add("org/other", SHARDED)
    resolve("org/name")
    resolve("org/other")
    first, second = hub_cache.cached_models()
    assert (first.name, second.name) == ("org/name", "org/other")
    assert first.commits == (COMMIT,)
    assert first.size_bytes >= len(WEIGHTS)
    assert hub_cache.remove_cached("org/name") == first.size_bytes
    assert [model.name for model in hub_cache.cached_models()] == ["org/other"]
    raises(DownloadError, offline=True)
    with pytest.raises(ModelNotFoundError, match="org/name"):
        hub_cache.remove_cached("org/name")


def test_one_gguf_model_of_several_is_removed(fake_hub: FakeHub, write_gguf):
    data = {name: write_gguf(metadata={"general.name": name}).read_bytes() for name in ("Q8_0", "Q4_1")}
    files = {f"name-{tag}.gguf": content for tag, content in data.items()}
    fake_hub.add("org/name", files | {"again/name-BF16.gguf": data["Q8_0"]})
    for tag in ("Q8_0", "Q4_1", "BF16"):
        resolve(f"org/name:{tag}")
    assert hub_cache.cached_name("org/name:q4_1") == "org/name:name-Q4_1.gguf"
    assert hub_cache.cached_name("org/name") == "org/name"
    assert hub_cache.cached_name("org/other:Q4_1") is None
    assert hub_cache.remove_cached("org/name:Q4_1") == len(data["Q4_1"])
    raises(DownloadError, model="org/name:Q4_1", offline=True)
    assert hub_cache.remove_cached("org/name:Q8_0") == 0  # the other name still needs its bytes
    resolve("org/name:BF16", offline=True)
    with pytest.raises(ModelNotFoundError, match="no GGUF model tagged Q4_1"):
        hub_cache.remove_cached("org/name:Q4_1")
    assert hub_cache.remove_cached("org/name:BF16") >= len(data["Q8_0"])
    assert hub_cache.cached_models() == ()


def test_transformers_cache_is_used_where_only_that_is_set(fake_hub: FakeHub, monkeypatch, tmp_path: Path):
    fake_hub.add("org/name", SINGLE)
    monkeypatch.setenv("TRANSFORMERS_CACHE", str(tmp_path / "older"))
    resolve("org/name")
    assert (tmp_path / "older" / "models--org--name").is_dir()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    resolve("org/name")
    assert (tmp_path / "cache" / "models--org--name").is_dir()


SCRIPT = """
from octavo.sources.resolve import resolve
source = resolve("org/name")
assert source.revision, source
"""


def test_in_a_process_of_its_own_by_environment_variables_and_in_silence(fake_hub: FakeHub, tmp_path: Path):
    fake_hub.add("org/name", SINGLE)
    environment = {
        **os.environ,
        "HF_ENDPOINT": fake_hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "0",
    }
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert (tmp_path / "home" / "hub" / "models--org--name").is_dir()
