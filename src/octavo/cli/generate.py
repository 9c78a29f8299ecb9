"""`octavo generate`: one prompt, or a file of them, and the text alone on standard output."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from octavo.cli.batch import run_batch
from octavo.cli.configuration import read_configuration
from octavo.cli.facts import facts_json, facts_line
from octavo.cli.loading import loaded_model
from octavo.cli.options import Given, accepts
from octavo.cli.output import note, note_all, write, write_json
from octavo.cli.prompt import bounded, chat_turns, read_prompt
from octavo.errors import UsageError
from octavo.settings import SamplingParams, Settings
from octavo.types import Completion, TextEvent


@accepts(Settings, SamplingParams)
def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The prompt; - reads standard input.")
    ] = None,
    *,
    file: Annotated[Path | None, typer.Option("--file", help="Read the prompt from this file.")] = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            "--batch",
            help="Answer each line of this JSON Lines file: an object with prompt or messages, any sampling "
            "field and an optional id.",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="The system message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without template.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object with all facts.")] = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print the text when it is done.")] = False,
    said: Given,
) -> None:
    """Generate text from a prompt.

    The text goes to standard output, and one line of facts to standard error. An instruct model gets its
    chat template unless --raw is given.
    """
    if raw and system is not None:
        raise UsageError("--raw and --system contradict each other", remedy="Leave one of them out.")
    configuration = read_configuration(said)
    if batch is not None:
        if prompt is not None or file is not None:
            raise UsageError("a prompt and --batch were given", remedy="Give one of them.")
        run_batch(configuration, batch, system=system, raw=raw)
        return
    text = read_prompt(prompt, file)
    with loaded_model(configuration) as loaded:
        llm, params = loaded.llm, loaded.resolved.sampling
        turns = chat_turns(llm, text, system=system, raw=raw)
        events = (
            llm.stream(text, params) if turns is None else llm.stream_chat(turns, bounded(llm, turns, params))
        )
        note_all(llm.notices)
        done = follow(events, show=not (json or no_stream))
        note_all(done.notices)
        if json:
            write_json(facts_json(done, llm.info()))
        elif no_stream:
            write(done.text + "\n")
        note(facts_line(done, llm.info()))


def follow(events: Iterator[TextEvent], *, show: bool) -> Completion:
    """Follow an answer to its end, and print its text as it comes if `show`."""
    done: Completion | None = None
    try:
        for event in events:
            if show:
                write(event.text)
            done = event.completion or done
    finally:  # what is said after an error or an interrupt begins on a line of its own
        if show and (done is not None or sys.stdout.isatty()):
            write("\n")
    assert done is not None, "the last event carries the completion"
    return done
