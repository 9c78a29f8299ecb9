"""How to serve: `ServerSettings`, whose fields are flags, OCTAVO_* variables and keys of [serve] in octavo.toml.

Frozen; the limits are shown in /v1/models/{id}; 0 switches a time limit off. Which models to serve is
`octavo.cli.serve`'s, how each is loaded is `octavo.settings.Settings`. Ranges are checked here, since the one
validator knows nothing of serving.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from octavo.errors import InvalidParameterError, UsageError

LinkName = Literal["auto", "inherited", "loopback"]
"""Between two processes; auto: inherited where the system can."""


def _option(default: Any, help: str, *, least: float = 0, limit: bool = False) -> Any:
    return field(default=default, metadata={"help": help, "least": least, "limit": limit})


def _limit(default: float, help: str, *, least: float = 1) -> Any:
    return _option(default, help, least=least, limit=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Every field has a flag of its name, a variable and a key."""

    host: str = _option("127.0.0.1", "Address to listen on; any but loopback needs --api-key-file.")
    port: int = _option(8000, "Port; 0 takes a free one.")
    api_key_file: Path | None = _option(
        None, "File of API keys, one a line [default: OCTAVO_API_KEY, or none]."
    )
    admin_key_file: Path | None = _option(None, "File of keys for /admin; without it there is no /admin.")
    allow_host: tuple[str, ...] = _option((), "Host name clients may use besides loopback; may be repeated.")
    cors_origin: tuple[str, ...] = _option((), "Web origin that may call from a browser; may be repeated.")
    preload: bool = _option(True, "Load the first model at the start instead of with its first request.")
    memory_bytes: int = _option(0, "Most bytes all loaded models may take together [default: what is free].")
    idle_unload_seconds: float = _option(0, "Unload a model not used for this long [default: never].")
    worker_link: LinkName = _option(
        "auto",
        "Between processes: auto, inherited (a socket pair), or loopback (TCP with a token, where there are no pairs).",
    )
    drain_seconds: float = _option(30, "On SIGTERM, time for running requests to finish.")

    max_body_bytes: int = _limit(8 << 20, "Bytes of a request's body.")
    max_header_bytes: int = _limit(64 << 10, "Bytes of a request's headers.", least=1024)
    max_connections: int = _limit(4096, "Open connections.")
    max_messages: int = _limit(1024, "Messages of a chat.")
    max_prompts: int = _limit(64, "Prompts in one request.")
    max_choices: int = _limit(16, "n: choices for each prompt.")
    max_sequences_each: int = _limit(64, "Prompts times n in one request.")
    max_queue: int = _limit(128, "Requests waiting for their first token; more are refused with 429.")
    max_queue_tokens: int = _limit(1 << 20, "Prompt tokens waiting; more are refused with 429.")
    header_seconds: float = _limit(20, "Time to send the headers.", least=0.1)
    body_seconds: float = _limit(30, "Time to send the body.", least=0.1)
    queue_seconds: float = _limit(120, "Longest wait for a first token, loading included.", least=0.1)
    request_seconds: float = _limit(1800, "Longest time for a whole request.", least=0.1)
    stall_seconds: float = _limit(30, "A client that takes nothing for this long is cut off.", least=0.1)


def check_server_settings(settings: ServerSettings, *, has_keys: bool) -> None:
    """Raises InvalidParameterError for a number out of range, UsageError for an open address without a key."""
    for each in dataclasses.fields(settings):
        value = getattr(settings, each.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            least = each.metadata["least"]
            if not least <= value < 1 << 50:
                raise InvalidParameterError(
                    f"{each.name} is {value}; it must be a number from {least}",
                    remedy=f"Correct --{each.name.replace('_', '-')}, or leave it out.",
                    parameter=each.name,
                )
    if settings.port > 65535:
        raise InvalidParameterError(
            f"port is {settings.port}; ports end at 65535", remedy="Correct --port.", parameter="port"
        )
    if not has_keys and not is_loopback(settings.host):
        raise UsageError(
            f"{settings.host} can be reached from other machines, and there is no API key",
            remedy="Give --api-key-file (or OCTAVO_API_KEY), or listen on 127.0.0.1.",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach this address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def visible_limits(settings: ServerSettings) -> dict[str, Any]:
    """The limits a client may run into, by the name of their setting."""
    return {
        each.name: getattr(settings, each.name)
        for each in dataclasses.fields(settings)
        if each.metadata["limit"]
    }
