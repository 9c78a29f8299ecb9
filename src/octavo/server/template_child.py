"""The child that renders a checkpoint's own chat template: `python -m octavo.server.template_child LINK`.

It imports little, since one is started with every model. `octavo.server.child_renderer` is what asks it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from octavo.server import wire
from octavo.server.child import Answer, QuestionCaps, serve
from octavo.text.template_rendering import LocalRenderer, Rendering

CAPS = QuestionCaps(memory_bytes=128 << 20, cpu_seconds=0.75)
"""A real template needs a megabyte and a millisecond."""


def _set_up(first: Any) -> Answer:
    if not isinstance(first, wire.Template):
        raise wire.WireError("the first message is the template")
    renderer = LocalRenderer(first.source)

    def answer(question: Any) -> wire.FromChild:
        if not isinstance(question, wire.Render):
            raise wire.WireError(f"not a question here: {type(question).__name__}")
        text = renderer.render(Rendering(**json.loads(question.asked)))
        return wire.Rendered(str.__str__(text), text.spans)

    return answer


if __name__ == "__main__":
    serve(sys.argv[1], CAPS, _set_up, decode=wire.decode_trusted)
