"""`octavo chat`: a conversation in the terminal, or one user message a line from a pipe."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.configuration import read_configuration, refuse_unseen_logprobs
from octavo.cli.facts import answer_facts, model_facts, with_grammar_notice
from octavo.cli.loading import loaded_model
from octavo.cli.options import Given, accepts
from octavo.cli.output import note, note_all, write
from octavo.cli.report import report
from octavo.errors import ChatTemplateError, ContextLengthError, InvalidInputError, InvalidParameterError
from octavo.settings import SamplingParams, Settings
from octavo.types import Message

if TYPE_CHECKING:
    from octavo.llm import LLM

HELP = """\
/system TEXT  set the system message (without TEXT: remove it)
/reset        forget the conversation
/exit         leave; so does Ctrl-D
Ctrl-C        stop the answer"""


@accepts(Settings, SamplingParams)
def chat(
    *,
    system: Annotated[str | None, typer.Option("--system", help="The system message.")] = None,
    said: Given,
) -> None:
    """Talk with a model, in several turns.

    Answers go to standard output, and facts about the model and each answer to standard error. Type /help
    for the commands. The oldest turns are dropped, with a notice, when the conversation outgrows the context.
    """
    configuration = read_configuration(said)
    refuse_unseen_logprobs(configuration, remedy="Leave it out, or use octavo generate --json.")
    with loaded_model(configuration) as loaded:
        llm = loaded.llm
        if loaded.resolved.sampling.n > 1:
            raise InvalidParameterError(
                f"n is {loaded.resolved.sampling.n}; a chat goes on from one answer",
                remedy="Leave n out, or use octavo generate.",
                parameter="n",
            )
        if not llm.has_chat_template:
            raise ChatTemplateError(
                f"{llm.info()['model']} has no chat template",
                remedy="Use octavo generate, which continues a text, or take an instruct model.",
            )
        note_all(llm.notices)
        conversation = _Conversation(llm, loaded.resolved.sampling, system)
        note(model_facts(llm.info()))
        if sys.stdin.isatty():
            note("type a message, or /help")
        for line in _lines():
            if line.startswith("/"):
                if not conversation.obey(line):
                    break
            elif line.strip():
                conversation.say(line)


@dataclasses.dataclass(slots=True)
class _Conversation:
    llm: LLM
    params: SamplingParams
    system: str | None
    turns: list[Message] = dataclasses.field(default_factory=list)
    """User and assistant by turns, without the system message."""

    def obey(self, line: str) -> bool:
        """Do what a /command says; False: leave."""
        command, _, rest = line.strip().partition(" ")
        match command:
            case "/exit":
                return False
            case "/reset":
                self.turns = []
                note("the conversation is forgotten")
            case "/system":
                self.system = rest.strip() or None
                note("the system message is removed" if self.system is None else "the system message is set")
            case "/help":
                for each in HELP.splitlines():
                    note(each)
            case _:
                note(f"{command} is not a command: /help lists them; a space before the / sends it as text")
        return True

    def say(self, text: str) -> None:
        """One turn. A message that is refused, or interrupted before its answer begins, is forgotten."""
        turns: list[Message] = [*self.turns, {"role": "user", "content": text}]
        answer = ""
        try:
            turns = self._fitting(turns)
            events = self.llm.stream_chat(self._messages(turns), self.params)
            if dropped := len(self.turns) + 1 - len(turns):
                note(
                    f"the oldest {dropped} messages are forgotten: the context is {self.llm.context_tokens} tokens"
                )
            for event in events:
                answer += event.text
                write(event.text)
                if event.completion is not None:
                    write("\n")
                    note_all(with_grammar_notice(event.completion, self.params).notices)
                    note(answer_facts(event.completion))
        except InvalidInputError as error:
            report(error)
        except KeyboardInterrupt:
            write("\n")
            note("stopped")
        if answer:
            self.turns = [*turns, {"role": "assistant", "content": answer}]

    def _messages(self, turns: list[Message]) -> list[Message]:
        first: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *turns]

    def _fitting(self, turns: list[Message]) -> list[Message]:
        """The turns without the oldest questions and answers, so that the rest leaves room for an answer."""
        from octavo.text.chat_history import trim_history

        context = self.llm.context_tokens
        room = min(self.params.max_new_tokens or context // 4, context // 2)
        try:
            kept = trim_history(self._messages(turns), context - room, self.llm.count_chat_tokens)
        except ContextLengthError:  # alone it may still fit, with less room for the answer
            return turns[-1:]
        return turns[len(kept.dropped) :]


def _lines() -> Iterator[str]:
    """What the user types, or what is piped in (UTF-8, else NotTextError)."""
    if not sys.stdin.isatty():
        from octavo.validate import validate_text

        for line in sys.stdin.buffer:
            yield validate_text(line).rstrip("\r\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    while True:
        try:
            if sys.stdout.isatty():
                yield input("> ")
            else:  # input() would write its prompt to standard output
                print("> ", end="", file=sys.stderr, flush=True)
                line = sys.stdin.readline()
                if not line:
                    raise EOFError
                yield line.rstrip("\n")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            note("/exit or Ctrl-D leaves")
