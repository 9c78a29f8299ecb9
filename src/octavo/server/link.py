"""The socket between a process and its child: an inherited pair, or loopback TCP with a token where there is none.

`offer` is the parent's end, before the child is started; `connect` is the child's. The token goes through the child's
standard input: other users can read a command line, and anyone can connect to a port.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Protocol

from octavo.errors import DeviceError

if TYPE_CHECKING:
    from octavo.server.settings import LinkName

_TOKEN_BYTES = 32
_LOOPBACK = "127.0.0.1"
_CONNECT_SECONDS = 60.0
"""For a child to start and connect: a busy machine takes its time."""
_TOKEN_SECONDS = 2.0
"""For whoever connects to say the token."""


class Offer(Protocol):
    """A place for one child to connect to."""

    argument: str
    """What `connect` takes."""
    descriptors: tuple[int, ...]
    """To be inherited."""
    standard_input: int
    """For subprocess.Popen."""

    def accept(self, process: subprocess.Popen[bytes]) -> socket.socket:
        """Our end, once the child is there. Raises DeviceError where it does not come."""

    def close(self) -> None:
        """What is not needed any more, or was not accepted."""


def offer(name: LinkName) -> Offer:
    """Raises DeviceError for "inherited" where the system has no such thing."""
    can_inherit = os.name == "posix"  # Windows has no Unix sockets to pass on
    if name == "inherited" and not can_inherit:
        raise DeviceError(
            "this system cannot pass a socket on to a child process", remedy="Use --worker-link loopback."
        )
    return _Inherited() if can_inherit and name != "loopback" else _Loopback()


def connect(argument: str) -> socket.socket:
    """The child's end of what `offer` made. Raises OSError, ValueError."""
    kind, _, place = argument.partition(":")
    if kind == "inherited":
        link = socket.socket(fileno=int(place))
        link.set_inheritable(False)
        return link
    token = sys.stdin.buffer.read(_TOKEN_BYTES)
    link = socket.create_connection((_LOOPBACK, int(place)), timeout=_CONNECT_SECONDS)
    link.settimeout(None)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.sendall(token)
    return link


class _Inherited:
    """One end of a socket pair: nobody else can ever connect to it."""

    standard_input = subprocess.DEVNULL

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self.descriptors: tuple[int, ...] = (self._theirs.fileno(),)
        self.argument = f"inherited:{self._theirs.fileno()}"

    def accept(self, process: subprocess.Popen[bytes]) -> socket.socket:
        return self._ours.dup()

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()


class _Loopback:
    """A port of this machine for as long as it takes the child to come and say the token."""

    standard_input = subprocess.PIPE
    descriptors: tuple[int, ...] = ()

    def __init__(self) -> None:
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self._listener = socket.create_server((_LOOPBACK, 0))
        self.argument = f"loopback:{self._listener.getsockname()[1]}"

    def accept(self, process: subprocess.Popen[bytes]) -> socket.socket:
        assert process.stdin is not None
        with contextlib.suppress(OSError), process.stdin:  # a child that ended at once is told from below
            process.stdin.write(self._token)
        end = time.monotonic() + _CONNECT_SECONDS
        self._listener.settimeout(0.2)
        while time.monotonic() < end and process.poll() is None:
            try:
                link, _ = self._listener.accept()
            except TimeoutError:
                continue
            if self._is_our_child(link):
                link.settimeout(None)
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return link
            link.close()
        raise DeviceError(
            "a child process did not connect", remedy="Look at what it wrote to standard error."
        )

    def _is_our_child(self, link: socket.socket) -> bool:
        said = b""
        end = time.monotonic() + _TOKEN_SECONDS
        try:
            while len(said) < _TOKEN_BYTES:
                link.settimeout(max(0.001, end - time.monotonic()))
                if not (more := link.recv(_TOKEN_BYTES - len(said))):
                    break
                said += more
        except OSError:
            return False
        return hmac.compare_digest(said, self._token)

    def close(self) -> None:
        self._listener.close()
