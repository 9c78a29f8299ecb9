"""`octavo generate`: one prompt, or a file of them, and the text alone on standard output."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from octavo.cli.configuration import read_configuration, refuse_unseen_logprobs
from octavo.cli.facts import answer_facts, facts_json, facts_line, model_facts, with_grammar_notice
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
            help="Answer each line of this JSON Lines file, or of standard input for -: an object with prompt "
            "or messages, any sampling field and an optional id.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="With --batch: add the answers to this file, and skip lines whose ids are answered in it.",
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
    if batch is None and not json:
        refuse_unseen_logprobs(configuration, remedy="Add --json, or leave it out.")
    if batch is not None:
        if prompt is not None or file is not None:
            raise UsageError("a prompt and --batch were given", remedy="Give one of them.")
        if no_stream:
            raise UsageError(
                "--batch and --no-stream contradict each other",
                remedy="Leave --no-stream out: a line's answer is written when it is done.",
            )
        if output is not None and output.resolve() == batch.resolve():
            raise UsageError(f"--batch and --output are both {batch}", remedy="Name another --output.")
        from octavo.cli.batch import run_batch

        run_batch(configuration, batch, system=system, raw=raw, output=output)
        return
    if output is not None:
        raise UsageError("--output goes with --batch", remedy="Leave it out, and redirect standard output.")
    text = read_prompt(prompt, file)
    with loaded_model(configuration) as loaded:
        llm, params = loaded.llm, loaded.resolved.sampling
        turns = chat_turns(llm, text, system=system, raw=raw)
        events = (
            llm.stream(text, params) if turns is None else llm.stream_chat(turns, bounded(llm, turns, params))
        )
        note_all(llm.notices)
        done = with_grammar_notice(follow(events, show=not (json or no_stream or params.n > 1)), params)
        note_all(dict.fromkeys(notice for each in done.choices for notice in each.notices))
        if json:
            write_json(facts_json(done, llm.info()))
        if done.others:
            for each in done.choices:
                if not json:
                    write(each.text + "\n")
                note(f"choice {each.choice + 1} of {params.n}: {answer_facts(each)}")
            note(model_facts(llm.info()))
            return
        if no_stream and not json:
            write(done.text + "\n")
        note(facts_line(done, llm.info()))


def follow(events: Iterator[TextEvent], *, show: bool) -> Completion:
    """Follow an answer, or several, to the end, and print its text as it comes if `show`."""
    done: dict[int, Completion] = {}
    try:
        for event in events:
            if show:
                write(event.text)
            if event.completion is not None:
                done[event.choice] = event.completion
    finally:  # what is said after an error or an interrupt begins on a line of its own
        if show and (done or sys.stdout.isatty()):
            write("\n")
    assert done, "the last event of a choice carries its completion"
    return dataclasses.replace(done[0], others=tuple(done[choice] for choice in range(1, len(done))))
