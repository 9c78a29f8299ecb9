"""A worker whose model answers with its own prompt, and fails on demand: run by path in place of the real one.

Real are the process, the wire and the driver; fake are the loader and the backend. `Settings.model` carries
options, "fake?load_s=0.5&pace_ms=1&needed=100"; a prompt carries orders, "!crash:3" and so on (`_ORDERS`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from urllib.parse import parse_qsl

from octavo.backends.base import Capabilities
from octavo.errors import ClosedError, NotEnoughDiskError, NotEnoughMemoryError, NumericalError
from octavo.server.worker import LoadedModel, main
from octavo.types import FinishReason, ModelSource, TokenEvent, TokenizerSource, TokenLogprob

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_ORDERS = re.compile(r"!(crash|break|nan|oom|slow|hang|stop):?(\d*)")


def byte_alphabet() -> list[str]:
    """GPT-2's: a printable character for each byte, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable}
    names |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [names[byte] for byte in range(256)]


def tokenizer_json(markers=()) -> bytes:
    """A token for each byte, three of ChatML, and `markers`."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *markers]
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": 256 + place,
                    "content": text,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for place, text in enumerate(special)
            ],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": False,
            },
            "post_processor": None,
            "decoder": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": {name: byte for byte, name in enumerate(byte_alphabet())},
                "merges": [],
            },
        }
    ).encode()


def markers_of(options):
    return tuple(filter(None, options.get("markers", "").split(",")))


class Sequence:
    def __init__(self, request_id, request, markers):
        self.id = request_id
        self.markers = markers
        self.request = request
        ids = request.prompt_token_ids
        text = bytes(i for i in ids if i < 256).decode("utf-8", "replace")
        self.orders = {name: int(number or 0) for name, number in _ORDERS.findall(text)}
        self.reply = self._marked(self._reply(list(ids)))
        self.made = 0
        self.next_at = 0.0
        self.first = True
        self.submitted_at = time.perf_counter()

    def _marked(self, ids):
        """With markers' tokens for their text: what a prompt may not have, an answer may."""
        for token, marker in enumerate(self.markers, 259):
            text, place = list(marker.encode()), 0
            while place < len(ids):
                if ids[place : place + len(text)] == text:
                    ids[place : place + len(text)] = [token]
                place += 1
        return ids

    def _reply(self, ids):
        """The last user message; a raw prompt whole."""
        if 257 in ids:
            starts = [place for place, token in enumerate(ids) if token == 257]
            body = ids[starts[-2] + 1 : starts[-1]] if len(starts) > 1 else ids
            body = body[body.index(10) + 1 :]
            return body[: body.index(258)] if 258 in body else body
        return ids


class FakeBackend:
    def __init__(self, options, max_sequences, context):
        self.markers = markers_of(options)
        self.pace = float(options.get("pace_ms", 0)) / 1000
        self.max_sequences = max_sequences
        self.capabilities = Capabilities(
            vocab_size=259 + len(self.markers),
            context_tokens=context,
            prompt_logprobs=True,
            max_logprobs=20,
            adapters=False,
            grammars=False,
        )
        self.lock = threading.Condition()
        self.waiting = deque()
        self.running = []
        self.cancelled = set()
        self.ids = 0
        self.counts = {"submitted": 0, "ended": 0, "cancelled": 0, "tokens": 0}
        self.closed = False

    def submit(self, request):
        with self.lock:
            if self.closed:
                raise ClosedError("closed", remedy="")
            self.ids += 1
            self.counts["submitted"] += 1
            self.waiting.append(Sequence(self.ids, request, self.markers))
            self.lock.notify()
            return self.ids

    def cancel(self, request_id):
        self.cancelled.add(request_id)

    def step(self, timeout_seconds):
        with self.lock:
            if not (self.waiting or self.running):
                self.lock.wait(timeout_seconds)
            events = []
            for sequence in [*self.running, *self.waiting]:
                if sequence.id in self.cancelled:
                    self.cancelled.discard(sequence.id)
                    self.counts["cancelled"] += 1
                    events.append(self._end(sequence, FinishReason.CANCELLED))
            while self.waiting and len(self.running) < self.max_sequences:
                self.running.append(self.waiting.popleft())
            now = time.perf_counter()
            for sequence in list(self.running):
                if now >= sequence.next_at:
                    sequence.next_at = now + sequence.orders.get("slow", 0) / 1000
                    event = self._advance(sequence)
                    if event is not None:
                        events.append(event)
        time.sleep(self.pace if self.pace else 0 if events else 0.001)
        return events

    def _end(self, sequence, reason, **more):
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
        self.counts["ended"] += 1
        return TokenEvent(sequence.id, finish_reason=reason, **more)

    def _advance(self, sequence):
        orders, made, request = sequence.orders, sequence.made, sequence.request
        if "hang" in orders and made >= orders["hang"]:
            return None
        if "crash" in orders and made >= orders["crash"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if "break" in orders and made >= orders["break"]:
            raise RuntimeError("the step broke at 0x7f00deadbeef in /secret/path")
        if "nan" in orders and made >= orders["nan"]:
            error = NumericalError("the logits are not finite", remedy="Try another.")
            return self._end(sequence, FinishReason.ERROR, error=error)
        if "oom" in orders and made >= orders["oom"]:
            return self._end(sequence, FinishReason.ERROR, error=MemoryError("at 0x7f00deadbeef"))
        more = {}
        if sequence.first:
            sequence.first = False
            more["queued_seconds"] = time.perf_counter() - sequence.submitted_at
            if request.prompt_logprobs is not None:
                ids = request.prompt_token_ids
                more["prompt_logprobs"] = tuple(TokenLogprob(i, -1.0, ((i, -1.0),)) for i in ids[1:])
        if request.max_new_tokens == 0:
            return self._end(sequence, FinishReason.LENGTH, **more)
        ended = "stop" in orders and made >= len(sequence.reply)
        token = 258 if ended else sequence.reply[made % len(sequence.reply)]
        sequence.made += 1
        self.counts["tokens"] += 1
        if request.sampling.logprobs is not None:
            top = tuple((token, -0.5) for _ in range(min(1, request.sampling.logprobs)))
            more["logprob"] = TokenLogprob(token, -0.5, top)
        if ended or token in request.stop_token_ids:
            return self._end(sequence, FinishReason.STOP, token_id=token, **more)
        if sequence.made == request.max_new_tokens:
            return self._end(sequence, FinishReason.LENGTH, token_id=token, **more)
        return TokenEvent(sequence.id, token_id=token, **more)

    def info(self):
        running, waiting = len(self.running), len(self.waiting)
        return {
            "memory": {"weights": 1000},
            "engine": {**self.counts, "running": running, "waiting": waiting},
        }

    def close(self):
        with self.lock:
            self.closed = True
            self.lock.notify_all()


def load(settings, progress, planned):
    options = dict(parse_qsl((settings.model or "").partition("?")[2]))
    progress("loading", 0, 100)
    needed = int(options.get("needed", 1000))
    room = int(options.get("room", 1 << 40))
    if needed > room:
        raise NotEnoughMemoryError("too large", remedy="Less.", needed_bytes=needed, available_bytes=room)
    if "fails" in options:
        raise RuntimeError("cannot be loaded: /secret/path at 0x7f00deadbeef")
    if "disk" in options:
        raise NotEnoughDiskError("full", remedy="Free some.", needed_bytes=needed, available_bytes=0)
    planned(needed)
    time.sleep(float(options.get("load_s", 0)))
    progress("loading", 100, 100)
    context = settings.context or 512
    source = ModelSource(
        location="fake",
        revision=None,
        naming="huggingface",
        config={"eos_token_id": 258, **({"_note": 1 << 128} if "long_number" in options else {})},
        generation_config={},
        tokenizer=TokenizerSource(
            "tokenizer.json", tokenizer_json(markers_of(options)), config={"eos_token": "<|im_end|>"}
        ),
        chat_template=None if "no_template" in options else options.get("template", CHATML),
        tensors={},
        fingerprint=options.get("name", "fake"),
    )
    notices = (options["notice"],) if "notice" in options else ()
    backend = FakeBackend(options, settings.max_sequences, context)
    return LoadedModel(backend, source, settings.max_sequences, {"quant": "none", "runner": "fake"}, notices)


if __name__ == "__main__":
    code = main(sys.argv[1:], load)
    os._exit(code)
