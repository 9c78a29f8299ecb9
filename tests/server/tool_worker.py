"""The real worker, with a template of ours that shows tools, and opens thoughts or closes them: run by path."""

from __future__ import annotations

import dataclasses
import os
import sys

from octavo.server.worker import load_model, main

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Call with <tool_call>.<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is defined and enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
)


def load(settings, progress, planned):
    loaded = load_model(settings, progress, planned)
    return dataclasses.replace(loaded, source=dataclasses.replace(loaded.source, chat_template=TEMPLATE))


if __name__ == "__main__":
    code = main(sys.argv[1:], load)
    os._exit(code)
