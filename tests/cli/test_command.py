"""Flags of simple types are taken as typer would have taken them, without its validators."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.core import TyperCommand

from octavo.cli.command import Command

_TEXTS = [
    "",
    "7",
    "-7",
    "+7",
    "007",
    "9" * 5000,
    "1.5",
    ".5",
    "5.",
    "1_000",
    " 3",
    "1e3",
    "nan",
    "inf",
    "²",
    "٣",
    "low",
    "Low",
    "x",
]


def taken(cls: type[TyperCommand], arguments: list[str]) -> Any:
    """The values a command gets, or the complaint."""
    app = typer.Typer(add_completion=False)

    @app.command(cls=cls)
    def command(
        text: Annotated[str | None, typer.Argument()] = None,
        *,
        count: Annotated[int | None, typer.Option("--count")] = None,
        share: Annotated[float | None, typer.Option("--share")] = None,
        level: Annotated[Literal["low", "high"] | None, typer.Option("--level")] = None,
        names: Annotated[list[str] | None, typer.Option("--name")] = None,
        limited: Annotated[int | None, typer.Option("--limited", min=1, max=9)] = None,
        on: Annotated[bool | None, typer.Option("--on/--no-on")] = None,
    ) -> None:
        values.append(repr((text, count, share, level, names, limited, on)))

    values: list[str] = []
    try:
        app(args=arguments, standalone_mode=False)
    except Exception as error:
        return type(error).__name__, str(error)
    return values


@pytest.mark.parametrize("option", ["--count", "--share", "--level", "--name", "--limited"])
@pytest.mark.parametrize("text", _TEXTS)
def test_a_value_is_what_typer_makes_of_it(option: str, text: str) -> None:
    arguments = [f"{option}={text}"]
    assert taken(Command, arguments) == taken(TyperCommand, arguments)


@given(
    st.lists(
        st.sampled_from(
            ["a", "--on", "--no-on", "--count=3", "--name=x", "--name=y", "--level=low", "--", "-x"]
        )
    )
)
def test_so_is_a_line(arguments: list[str]) -> None:
    assert taken(Command, arguments) == taken(TyperCommand, arguments)


def test_values_and_complaints_differ() -> None:
    assert taken(Command, ["--count=3"]) != taken(Command, ["--count=4"])
    assert taken(Command, ["--count=x"])[0] == "BadParameter"
