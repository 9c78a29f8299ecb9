"""`octavo generate --batch`: JSON Lines in, a JSON line out for each, in order. A bad line fails alone.

As many lines run at once as the model was loaded for sequences (--max-sequences). Where answers go, and which of
them are there already, is `octavo.cli.answers`' work.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.cli.answers import answer_key, answers_to, earlier_answers
from octavo.cli.configuration import Configuration
from octavo.cli.facts import completion_json, model_facts, with_grammar_notice
from octavo.cli.loading import Loaded, loaded_model
from octavo.cli.output import note, note_all, stderr_console
from octavo.cli.prompt import bounded, chat_turns, read_file
from octavo.errors import InvalidInputError, NotTextError, OctavoError, UsageError
from octavo.settings import SamplingParams
from octavo.types import Completion, Message

if TYPE_CHECKING:
    from concurrent.futures import Future

_GRAMMARS: Mapping[str, Any] = {"json_object": False, "json_schema": None, "regex": None, "lark": None}


def run_batch(
    configuration: Configuration, path: Path, *, system: str | None, raw: bool, output: Path | None
) -> None:
    """Answer every line of a file (of standard input, for "-"), then raise InvalidInputError if any failed.

    With `output` the answers go there, and what an earlier run answered is not asked again.
    """
    lines = list(enumerate(line for line in _read(path).split(b"\n") if line.strip()))
    if not lines:
        raise InvalidInputError(f"{path} has no lines", remedy='Give lines such as {"prompt": "Hello"}.')
    earlier = Counter[str]() if output is None else earlier_answers(output)
    todo = [(number, line) for number, line in lines if not _is_answered(number, line, earlier)]
    if output is not None and len(todo) < len(lines):
        note(f"{len(lines) - len(todo)} of {len(lines)} lines are answered in {output} already")
    used = _answer_all(configuration, todo, system=system, raw=raw, output=output) if todo else Counter[str]()
    if used["failed"]:
        raise InvalidInputError(
            f"{used['failed']} of {len(todo)} lines failed", remedy="See the error objects in the output."
        )


def _answer_all(
    configuration: Configuration,
    lines: list[tuple[int, bytes]],
    *,
    system: str | None,
    raw: bool,
    output: Path | None,
) -> Counter[str]:
    """Sums of the usage of all lines, and how many `failed`."""
    used: Counter[str] = Counter()
    with loaded_model(configuration) as loaded, answers_to(output) as write_answer:
        note_all(loaded.llm.notices)
        batch = _Batch(loaded, system, raw, _line_schema())
        started = time.perf_counter()
        for result in _watched(batch.answers(lines), len(lines)):
            used += _usage(result)
            write_answer(result)
        new_tokens, seconds = used["completion_tokens"], time.perf_counter() - started
        note(
            f"{model_facts(loaded.llm.info())}: {len(lines) - used['failed']} lines, {used['prompt_tokens']} "
            f"prompt + {new_tokens} new tokens in {seconds:.2f} s, {new_tokens / seconds:.1f} tok/s"
        )
    return used


def _usage(result: dict[str, Any]) -> Counter[str]:
    """Of all choices of a line."""
    used: Counter[str] = Counter()
    for each in result.get("choices", [result]):
        used += Counter(each.get("usage", {"failed": 1}))
    return used


def _read(path: Path) -> bytes:
    return sys.stdin.buffer.read() if str(path) == "-" else read_file(path)


def _is_answered(number: int, line: bytes, earlier: Counter[str]) -> bool:
    """Whether an earlier run answered the line; each of its answers is for one line."""
    try:
        identity = answer_key(_object(line).get("id", number))
    except OctavoError:  # it is reported with the others that fail
        return False
    answered = earlier[identity] > 0
    earlier[identity] -= answered
    return answered


@dataclasses.dataclass(frozen=True, slots=True)
class _Batch:
    """What all lines share."""

    loaded: Loaded
    system: str | None
    raw: bool
    schema: Any

    def answers(self, lines: list[tuple[int, bytes]]) -> Iterator[dict[str, Any]]:
        """Results in the order of the lines; few lines are read ahead of the one that is written."""
        from concurrent.futures import ThreadPoolExecutor

        at_once = self.loaded.llm.info()["max_sequences"]
        pool = ThreadPoolExecutor(at_once, thread_name_prefix="octavo-batch")
        pending: list[Future[dict[str, Any]]] = []
        try:
            for number, line in lines:
                pending.append(pool.submit(self.answer, number, line))
                if len(pending) > 2 * at_once:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        finally:
            # Without waiting: after Ctrl-C, closing the model ends what still runs.
            pool.shutdown(wait=False, cancel_futures=True)

    def answer(self, number: int, line: bytes) -> dict[str, Any]:
        """One result; its id is the line's own, else the line's place in the file, from 0."""
        identity: Any = number
        try:
            data = _object(line)
            identity = data.get("id", number)
            return {"id": identity, **completion_json(self._complete(data))}
        except OctavoError as error:
            said = {"code": error.code, "message": error.message, "remedy": error.remedy}
            return {"id": identity, "error": said}

    def _complete(self, data: dict[str, Any]) -> Completion:
        prompt, turns, sampling = _request(data, self.schema)
        llm = self.loaded.llm
        base = self.loaded.resolved.sampling
        if _GRAMMARS.keys() & sampling.keys():  # a line's grammar stands in for the command line's
            base = dataclasses.replace(base, **_GRAMMARS)
        params = dataclasses.replace(base, **sampling)
        if turns is None:
            turns = chat_turns(llm, prompt, system=self.system, raw=self.raw)
        if turns is None:
            return with_grammar_notice(llm.generate(prompt, params), params)
        if self.system is not None and not any(turn.get("role") == "system" for turn in turns):
            turns = [{"role": "system", "content": self.system}, *turns]
        return with_grammar_notice(llm.chat(turns, bounded(llm, turns, params)), params)


def _line_schema() -> Any:
    from octavo.cli import schema

    text: Any = (str | None, None)
    turns: Any = (list[dict[str, str]] | None, None)
    return schema.table(SamplingParams, id=(Any, None), prompt=text, messages=turns)


def _object(line: bytes) -> dict[str, Any]:
    from octavo.validate import validate_text

    try:
        data = json.loads(validate_text(line))
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise NotTextError(
            "the line has half a surrogate pair, which is no text", remedy="Write both halves of it."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the line is not JSON: {error}", remedy="Write one JSON object a line.") from error
    if not isinstance(data, dict):
        raise UsageError("the line is not a JSON object", remedy="Write one JSON object a line.")
    return data


def _request(data: dict[str, Any], model: Any) -> tuple[str, list[Message] | None, dict[str, Any]]:
    """The line's prompt, its messages (None: it has a prompt), and its sampling fields."""
    from pydantic import ValidationError

    from octavo.cli import schema

    try:
        given = schema.given(schema.strict(model, data))
    except ValidationError as error:
        first: Any = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the line"
        raise schema.explain(first, where, "this line", list(model.model_fields)) from error
    given.pop("id", None)
    prompt, turns = given.pop("prompt", None), given.pop("messages", None)
    if (prompt is None) == (turns is None):
        raise UsageError("the line needs prompt or messages, and not both", remedy="Give one of them.")
    return prompt or "", turns, given


def _watched(results: Iterator[dict[str, Any]], total: int) -> Iterable[dict[str, Any]]:
    """The results, with a progress bar on standard error where it is a terminal."""
    console = stderr_console()
    if not console.is_terminal:
        return results
    from rich.progress import track

    return track(results, "answering", total=total, console=console, transient=True)
