"""The `octavo` command: its subcommands, and the one place where an error becomes two lines and an exit code."""

from __future__ import annotations

import contextlib
import difflib
import errno
import gc
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from octavo.cli.command import Command, Group
from octavo.cli.options import Invocation
from octavo.cli.report import report
from octavo.errors import NotEnoughDiskError, NotEnoughMemoryError, OctavoError, UsageError
from octavo.version import __version__

_COMMANDS = {
    "generate": "generate:generate",
    "chat": "chat:chat",
    "plan": "plan:plan",
    "serve": "serve:serve",
    "explain": "explain:explain",
    "bench": "bench:bench",
    "eval": "eval:evaluate",
    "config": "config:config",
    "models": "models:app",
    "cache": "cache:app",
}
"""Name -> where it is in `octavo.cli`: a function, or an app with commands of its own."""

INTERRUPTED = 130


def run() -> NoReturn:
    """The console script."""
    _replace_closed_streams()
    if not os.environ.get("OCTAVO_DEBUG"):
        # What libraries have to say about themselves is not for the user of a command.
        warnings.simplefilter("ignore")
        logging.getLogger().addHandler(logging.NullHandler())
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    code = main()
    # The interpreter would look through everything for garbage once more, which takes longer than a token.
    gc.freeze()
    sys.exit(code)


def _replace_closed_streams() -> None:
    """Where the shell closed one (`>&-`) Python has None, and the next file opened would take its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (it lives as long as the process)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Never raises, and prints a traceback only for --debug."""
    invocation = Invocation(debug=bool(os.environ.get("OCTAVO_DEBUG")))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a replaced stream may have no encoding to set
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        app = _app(sys.argv[1:] if arguments is None else arguments)
        code = app(args=arguments, prog_name="octavo", standalone_mode=False, obj=invocation)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        if invocation.debug:
            traceback.print_exc()
        known = _known(error)
        report(known)
        return known.exit_code
    return code if isinstance(code, int) else 0


def _app(arguments: Sequence[str]) -> typer.Typer:
    """The command that comes first, or all of them where none does: making one takes a few milliseconds, importing it
    more."""
    app = typer.Typer(
        cls=Group,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(octavo)
    for name in arguments[:1] if arguments and arguments[0] in _COMMANDS else _COMMANDS:
        module, _, attribute = _COMMANDS[name].partition(":")
        command = getattr(importlib.import_module(f"octavo.cli.{module}"), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name, cls=Command)(command)
    return app


def _known(error: Exception) -> OctavoError:
    """The error as one of ours."""
    if isinstance(error, OctavoError):
        return error
    if isinstance(error, TyperException):
        return _usage_error(error)
    text = str(error).strip().partition("\n")[0]
    if _is_out_of_memory(error):
        return NotEnoughMemoryError(
            f"out of memory: {text or 'an allocation failed'}",
            remedy="Try a smaller --context or --max-sequences, or a smaller model; octavo plan shows what "
            "each part takes.",
            needed_bytes=0,
            available_bytes=0,
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return NotEnoughDiskError(
            f"the disk is full: {error}", remedy="Free some space.", needed_bytes=0, available_bytes=0
        )
    return OctavoError(
        f"internal error: {type(error).__name__}: {text}",
        remedy="This is a bug in Octavo: run the command again with --debug and report what it prints.",
    )


def _is_out_of_memory(error: Exception) -> bool:
    """MemoryError, or what torch raises for a GPU (OutOfMemoryError) and for the CPU (a plain RuntimeError)."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _usage_error(error: TyperException) -> UsageError:
    context: typer.Context | None = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "octavo"
    remedy = f"See {path} --help."
    option: str | None = getattr(error, "option_name", None)
    from octavo.validate import BEAM_SEARCH_NAMES, BEAM_SEARCH_REMEDY

    if option is not None and option.lstrip("-").replace("-", "_") in BEAM_SEARCH_NAMES:
        return UsageError(f"{option} is not supported", remedy=BEAM_SEARCH_REMEDY)
    if context is not None and option is not None:
        flags = [flag for parameter in context.command.params for flag in parameter.opts]
        if close := difflib.get_close_matches(option, flags, n=1):
            remedy = f"Did you mean {close[0]}? {remedy}"
    return UsageError(error.format_message().replace("Value error, ", ""), remedy=remedy)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"octavo {__version__}")
        raise typer.Exit


def octavo(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Load any Hugging Face causal language model in 8 bits and generate text.

    Settings come from flags, then OCTAVO_* variables, then octavo.toml; octavo config shows them.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
