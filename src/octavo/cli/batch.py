"""`octavo generate --batch`: a JSON Lines file in, a JSON line out for each, in order. A bad line fails alone.

As many lines run at once as the model was loaded for sequences (--max-sequences).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.cli.configuration import Configuration
from octavo.cli.facts import completion_json, model_facts
from octavo.cli.loading import Loaded, loaded_model
from octavo.cli.output import note, note_all, stderr_console, write_json
from octavo.cli.prompt import bounded, chat_turns, read_file
from octavo.errors import InvalidInputError, NotTextError, OctavoError, UsageError
from octavo.settings import SamplingParams
from octavo.types import Completion, Message

if TYPE_CHECKING:
    from concurrent.futures import Future


def run_batch(configuration: Configuration, path: Path, *, system: str | None, raw: bool) -> None:
    """Answer every line, then raise InvalidInputError if any failed (the others have been written)."""
    lines = [line for line in read_file(path).split(b"\n") if line.strip()]
    if not lines:
        raise InvalidInputError(f"{path} has no lines", remedy='Give lines such as {"prompt": "Hello"}.')
    used: Counter[str] = Counter()
    with loaded_model(configuration) as loaded:
        note_all(loaded.llm.notices)
        batch = _Batch(loaded, system, raw, _line_schema())
        started = time.perf_counter()
        for result in _watched(batch.answers(lines), len(lines)):
            used += Counter(result.get("usage", {"failed": 1}))
            write_json(result)
        new_tokens, seconds = used["completion_tokens"], time.perf_counter() - started
        note(
            f"{model_facts(loaded.llm.info())}: {len(lines) - used['failed']} lines, {used['prompt_tokens']} "
            f"prompt + {new_tokens} new tokens in {seconds:.2f} s, {new_tokens / seconds:.1f} tok/s"
        )
    if used["failed"]:
        raise InvalidInputError(
            f"{used['failed']} of {len(lines)} lines failed", remedy="See the error objects in the output."
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Batch:
    """What all lines share."""

    loaded: Loaded
    system: str | None
    raw: bool
    schema: Any

    def answers(self, lines: list[bytes]) -> Iterator[dict[str, Any]]:
        """Results in the order of the lines; few lines are read ahead of the one that is written."""
        from concurrent.futures import ThreadPoolExecutor

        at_once = self.loaded.resolved.settings.max_sequences
        pool = ThreadPoolExecutor(at_once, thread_name_prefix="octavo-batch")
        pending: list[Future[dict[str, Any]]] = []
        try:
            for number, line in enumerate(lines):
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
        params = dataclasses.replace(self.loaded.resolved.sampling, **sampling)
        if turns is None:
            turns = chat_turns(llm, prompt, system=self.system, raw=self.raw)
        if turns is None:
            return llm.generate(prompt, params)
        if self.system is not None and not any(turn.get("role") == "system" for turn in turns):
            turns = [{"role": "system", "content": self.system}, *turns]
        return llm.chat(turns, bounded(llm, turns, params))


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
