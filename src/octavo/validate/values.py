"""Single values of any type: read as a number, a flag, a path, or refused in one line that says why."""

from __future__ import annotations

import difflib
import numbers
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from octavo.errors import InvalidParameterError


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `least` to `most`, `least` itself left out where `above` is set."""

    kind: type[int] | type[float]
    least: float
    most: float
    above: bool = False

    def read(self, value: object) -> int | float | None:
        """The value as a plain int or float, or None where it is no such number."""
        number = integer(value) if self.kind is int else real(value)
        # Not a number is in no range, because every comparison with it is false.
        if number is None or not self.least <= number <= self.most or (self.above and number == self.least):
            return None
        return number

    def require(self, parameter: str, value: object) -> Any:
        number = self.read(value)
        if number is None:
            raise wrong(parameter, value, str(self))
        return number

    def __str__(self) -> str:
        what = "a whole number" if self.kind is int else "a number"
        if self.above:
            return f"{what} above {self.least:g}, at most {int(self.most)}"
        return f"{what} from {self.least:g} to {int(self.most)}"


def integer(value: object) -> int | None:
    """Integers, numpy's too; True and 1.0 are none."""
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def real(value: object) -> float | None:
    """Real numbers, numpy's too; True is none."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def listed(values: object) -> Sequence[object] | None:
    """The elements of a sequence, an array or a tensor; None for anything else."""
    if isinstance(values, Sequence):
        return values
    to_list = getattr(values, "tolist", None)
    elements = to_list() if callable(to_list) else None
    return elements if isinstance(elements, list) else None


def flag(parameter: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise wrong(parameter, value, "true or false")
    return value


def path(parameter: str, value: object) -> str | None:
    """A str or PathLike as a str."""
    if value is None:
        return None
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text or "\0" in text or not_unicode(text) is not None:
        raise wrong(parameter, value, "a name or path that is not empty")
    return text


def one_of(parameter: str, value: object, names: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in names:
        raise InvalidParameterError(
            f"{parameter} is {shown(value)}; it may be {either(names)}",
            remedy=suggestion(value, names, f"Use --{parameter} with one of these."),
            parameter=parameter,
        )


def at_most(parameter: str, count: int, most: int, what: str) -> None:
    if count > most:
        raise InvalidParameterError(
            f"{parameter} has {count} {what}; at most {most} are taken",
            remedy=f"Give fewer in {parameter}.",
            parameter=parameter,
        )


def wrong(parameter: str, value: object, allowed: str) -> InvalidParameterError:
    return InvalidParameterError(
        f"{parameter} is {shown(value)}; it must be {allowed}",
        remedy=f"Correct {parameter}, or leave it out.",
        parameter=parameter,
    )


def suggestion(value: object, names: Sequence[str], otherwise: str) -> str:
    if not isinstance(value, str) or len(value) > 64:  # no name is longer, and difflib takes its time
        return otherwise
    close = difflib.get_close_matches(value, names, n=1)
    return f"Did you mean {close[0]}?" if close else otherwise


def either(names: Sequence[str]) -> str:
    """a, b or c."""
    return f"{', '.join(names[:-1])} or {names[-1]}"


def shown(value: object) -> str:
    """A value in an error message: short, on one line, and never someone's whole text."""
    if value is None or type(value) in (bool, float):
        return repr(value)
    if type(value) is int:
        return repr(value) if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"
    if type(value) is str:
        return repr(value) if len(value) <= 40 else f"{value[:40]!r}..."
    return f"of type {type(value).__name__}"


def not_unicode(text: str) -> int | None:
    """Place of the first half of a surrogate pair, which UTF-8 cannot say; None: there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
