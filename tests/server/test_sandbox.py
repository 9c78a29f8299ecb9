"""Children: capped, alone with their socket, killed with all they started, and gone when their parent is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import sys
import time

import psutil
import pytest

from octavo.errors import DeviceError
from octavo.server import link, sandbox

HEAD = "import os, sys, time\nfrom octavo.server.link import connect\nlink = connect(sys.argv[1])\n"

LINKS = ["inherited", "loopback"]
"""The second is what Windows has; every system has it."""


def script(tmp_path, code: str):
    path = tmp_path / "child.py"
    path.write_text(HEAD + code)
    return (str(path),)


def run(
    tmp_path, code: str, caps=sandbox.NO_CAPS, seconds: float = 20, link="inherited"
) -> tuple[int, bytes]:
    async def main() -> tuple[int, bytes]:
        child = sandbox.start(script(tmp_path, code), caps, link=link)
        said = b""
        with child.connection:
            child.connection.settimeout(seconds)
            while chunk := await asyncio.to_thread(child.connection.recv, 65536):
                said += chunk
        async with asyncio.timeout(seconds):
            return await child.wait(), said

    return asyncio.run(main())


@pytest.mark.parametrize("link", LINKS)
def test_it_has_its_socket_and_nothing_else(tmp_path, monkeypatch, link):
    monkeypatch.setenv("OCTAVO_API_KEY", "secret")
    with open(os.devnull) as inherited:
        os.set_inheritable(inherited.fileno(), True)
        code, said = run(
            tmp_path,
            "fds = sorted(int(n) for n in os.listdir('/proc/self/fd'))\n"
            "link.sendall(repr((fds, sys.stdin.read(), 'OCTAVO_API_KEY' in os.environ)).encode())",
            link=link,
        )
    fds, read, has_key = eval(said.decode())
    assert code == 0
    assert len(fds) <= 5  # 0, 1, 2, the socket, and the listing itself
    assert (read, has_key) == ("", False)


@pytest.mark.parametrize("quiet", [True, False])
def test_the_hubs_token_stays_away_from_strangers_text(tmp_path, monkeypatch, quiet):
    monkeypatch.setenv("HF_TOKEN", "secret")
    script = tmp_path / "child.py"
    script.write_text(
        "import os, sys\nfrom octavo.server.link import connect\n"
        "connect(sys.argv[1]).sendall(b'y' if 'HF_TOKEN' in os.environ else b'n')\n"
    )
    child = sandbox.start([str(script)], quiet=quiet)
    child.connection.settimeout(20)
    assert child.connection.recv(1) == (b"n" if quiet else b"y")
    child.connection.close()
    child.process.wait(20)


def test_only_the_child_gets_the_connection(tmp_path, monkeypatch):
    """Over loopback anyone on the machine may connect first: without the token it is turned away."""
    strangers = []

    class Offer(link._Loopback):
        def accept(self, process):
            port = int(self.argument.partition(":")[2])
            for said in (b"", b"x" * 32, b"short"):
                stranger = socket.create_connection(("127.0.0.1", port))
                stranger.sendall(said)
                if len(said) < 32:
                    stranger.shutdown(socket.SHUT_WR)
                strangers.append(stranger)
            return super().accept(process)

    monkeypatch.setattr(link, "_Loopback", Offer)
    code, said = run(tmp_path, "link.sendall(b'mine')", link="loopback")
    assert (code, said) == (0, b"mine")
    for stranger in strangers:
        with stranger:
            stranger.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""


def test_the_token_is_on_no_command_line(tmp_path):
    _, said = run(tmp_path, "link.sendall(open('/proc/self/cmdline', 'rb').read())", link="loopback")
    last = said.strip(b"\0").rpartition(b"\0")[2]
    assert re.fullmatch(rb"loopback:\d{1,5}", last)


def test_a_child_that_never_connects_is_an_error_and_gone(tmp_path):
    (tmp_path / "child.py").write_text("import sys; sys.exit(3)")
    with pytest.raises(DeviceError):
        sandbox.start((str(tmp_path / "child.py"),), link="loopback", quiet=True)


@pytest.mark.skipif(sys.platform != "linux", reason="address space is capped by Linux alone")
def test_memory_is_capped(tmp_path):
    code, said = run(
        tmp_path,
        "try:\n    x = bytearray(1 << 30)\nexcept MemoryError:\n    link.sendall(b'refused')",
        sandbox.Caps(memory_bytes=512 << 20),
    )
    assert (code, said) == (0, b"refused")
    assert run(tmp_path, "x = bytearray(1 << 30); link.sendall(b'taken')")[1] == b"taken"


def test_time_is_capped(tmp_path):
    started = time.monotonic()
    code, _ = run(tmp_path, "while True: pass", sandbox.Caps(cpu_seconds=1))
    assert code < 0
    assert time.monotonic() - started < 20


def test_it_writes_no_core_file(tmp_path):
    _, said = run(
        tmp_path, "import resource; link.sendall(repr(resource.getrlimit(resource.RLIMIT_CORE)).encode())"
    )
    assert said == b"(0, 0)"


def test_killing_it_kills_what_it_started(tmp_path):
    async def main() -> list[psutil.Process]:
        code = "import subprocess\nsubprocess.Popen(['sleep', '100'])\nlink.sendall(b'x')\ntime.sleep(100)"
        child = sandbox.start(script(tmp_path, code))
        await asyncio.to_thread(child.connection.recv, 1)
        family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
        assert len(family) == 2
        child.kill()
        assert await child.wait() == -9
        child.connection.close()
        return family

    assert not psutil.wait_procs(asyncio.run(main()), timeout=5)[1]


def test_one_that_does_not_end_is_killed(tmp_path):
    async def main() -> int:
        child = sandbox.start(script(tmp_path, "time.sleep(100)"))
        child.connection.close()
        await child.end(grace_seconds=0.3)
        return await child.wait()

    assert asyncio.run(main()) == -9
