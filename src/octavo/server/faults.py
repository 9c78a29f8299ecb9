"""Errors as clients see them: one shape, a status, and headers that tell an SDK whether to try again.

`{"error": {"message", "type", "param", "code"}}` always, also in a stream. Nothing of the inside gets out: an
error that is not ours is a fixed text and the request's id. The table is in docs/server.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from octavo import errors
from octavo.errors import OctavoError

INVALID = "invalid_request_error"


@dataclass(slots=True)
class HttpFault(Exception):  # noqa: N818  (the word for what an error is on the wire)
    """An error with its status. `retry`: whether the same request may succeed later (None: leave it to the SDK)."""

    status: int
    message: str
    code: str
    type: str = INVALID
    param: str | None = None
    retry: bool | None = None
    retry_after_seconds: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further numbers for the error object."""

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
                **self.more,
            }
        }

    def headers(self) -> dict[str, str]:
        found: dict[str, str] = {}
        if self.retry is not None:
            found["x-should-retry"] = "true" if self.retry else "false"
        if self.retry_after_seconds is not None:
            found["retry-after"] = str(self.retry_after_seconds)
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found


def bad_request(message: str, *, code: str = "invalid_value", param: str | None = None) -> HttpFault:
    """400: the request will never be right as it is."""
    return HttpFault(400, message, code, param=param)


def unsupported(param: str, why: str) -> HttpFault:
    """400 for a field that is known and not honoured here."""
    return HttpFault(400, f"{param} is not supported: {why}", "unsupported_parameter", param=param)


def unavailable(message: str, code: str, retry_after_seconds: int) -> HttpFault:
    return HttpFault(503, message, code, "server_error", retry_after_seconds=retry_after_seconds)


def overloaded(message: str, code: str, retry_after_seconds: int) -> HttpFault:
    return HttpFault(429, message, code, "rate_limit_error", retry_after_seconds=retry_after_seconds)


def internal(request_id: str) -> HttpFault:
    """500 for what should not have happened; the log has it under the same id."""
    return HttpFault(
        500,
        f"internal error; the server's log has it under {request_id}",
        "internal_error",
        "server_error",
        retry=False,
    )


_STATUS: Mapping[type[OctavoError], tuple[int, str, str]] = {
    errors.ContextLengthError: (400, INVALID, "context_length_exceeded"),
    errors.UnsupportedParameterError: (400, INVALID, "unsupported_parameter"),
    errors.InvalidParameterError: (400, INVALID, "invalid_value"),
    errors.ChatTemplateError: (400, INVALID, "template_error"),
    errors.InvalidGrammarError: (400, INVALID, "invalid_grammar"),
    errors.InvalidInputError: (400, INVALID, "invalid_value"),
    errors.ModelNotFoundError: (503, "server_error", "model_unavailable"),
    errors.ResourceError: (503, "server_error", "not_enough_memory"),
    errors.DeviceError: (503, "server_error", "model_unavailable"),
    errors.IncompatibleModelError: (503, "server_error", "model_unavailable"),
    errors.NumericalError: (500, "server_error", "numerical_error"),
    errors.ClosedError: (503, "server_error", "engine_restarting"),
}
_OF_LOADING = ("model_unavailable", "not_enough_memory")
_RENAMED = {"max_new_tokens": "max_tokens", "json_schema": "response_format", "lark": "response_format"}
"""Settings' names -> the API's, where a route does not call them otherwise."""
_FLAG = re.compile(r"--(max-new-tokens|stop|raw)\b")
_FOR_OPERATORS = re.compile(r",? or (raise|lower) --[a-z-]+")


def fault_from(error: BaseException, request_id: str, names: Mapping[str, str]) -> HttpFault:
    """What a client is told of `error`. `names`: how this route calls our parameters, `prompt_token_ids` too."""
    names = {**_RENAMED, **names}
    if isinstance(error, HttpFault):
        return error
    if not isinstance(error, OctavoError):
        return internal(request_id)
    if error.code == "engine_restarting":
        return unavailable(str(error), "engine_restarting", 1)
    if error.code == "no_child":
        return overloaded("too many templates or grammars are at work", "queue_full", 2)
    for cls, (status, kind, code) in _STATUS.items():
        if isinstance(error, cls):
            return _known(error, status, kind, code, names)
    return internal(request_id)


def _known(error: OctavoError, status: int, kind: str, code: str, names: Mapping[str, str]) -> HttpFault:
    param = getattr(error, "parameter", "response_format" if code == "invalid_grammar" else None)
    if isinstance(error, errors.ContextLengthError):
        too_long = error.prompt_tokens >= error.context_tokens
        param = "prompt_token_ids" if too_long else "max_new_tokens"
    elif param is None and isinstance(error, errors.InvalidInputError):
        param = names.get("prompt_token_ids")
    numbers = {
        name: getattr(error, name) for name in ("prompt_tokens", "context_tokens") if hasattr(error, name)
    }
    message, remedy = error.message, error.remedy
    for ours, theirs in names.items():
        message = message.replace(ours, theirs)
        remedy = remedy.replace(ours, theirs)
    if code in _OF_LOADING:  # its reasons name files and sizes of this machine: they are for the log
        message, remedy = f"the model cannot be loaded: {error.code.replace('_', ' ')}", ""
    elif status >= 500:
        remedy = ""
    remedy = _FOR_OPERATORS.sub("", remedy)
    if status == 400 and _FLAG.search(remedy):
        remedy = ""  # it speaks of flags, to someone who has none
    return HttpFault(
        status,
        f"{message}. {remedy}".strip().removesuffix(" ") if remedy else message,
        code,
        kind,
        param=None if param is None else names.get(param, param),
        retry=False if code == "numerical_error" else None,
        retry_after_seconds=5 if status == 503 else None,
        more=numbers,
    )
