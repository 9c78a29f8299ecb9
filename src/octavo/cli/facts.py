"""What a finished request is said to have been: one line for a person, one object for --json.

Every number is measured: `Completion.timings`, `Completion.usage` and `LLM.info()`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from octavo.settings import SamplingParams
from octavo.types import Completion, FinishReason, ModelSource

UNFINISHED_GRAMMAR = "the grammar was not finished: raise --max-new-tokens"


def facts_line(done: Completion, info: Mapping[str, Any]) -> str:
    """All of one request on one line: `model_facts`, then `answer_facts`."""
    return f"{model_facts(info)}: {answer_facts(done)}"


def model_facts(info: Mapping[str, Any]) -> str:
    """`MODEL, int8 from q4_1 on cpu (reference runner; no GPU), load 2.05 s, weights + kv 875 MiB`."""
    from octavo.units import readable_bytes

    stored = " + ".join(info["quantized_as"])
    weights = info["quant"] if stored in ("", info["quant"]) else f"{info['quant']} from {stored}"
    # What was asked for needs no reason; what auto fell back to does.
    why = "" if info["device_reason"].startswith("as asked") else f"; {info['device_reason']}"
    held = {part: nbytes for part, nbytes in info["memory"].items() if nbytes}
    memory = f"{' + '.join(held)} {readable_bytes(sum(held.values()))}"
    if card := info["card"]:
        memory += f", {card_memory(card)}"
    return (
        f"{info['model']}, {weights} on {info['device']} ({info['runner']} runner{why}), "
        f"load {info['load_seconds']:.2f} s, {memory}"
    )


def card_memory(card: Mapping[str, Any]) -> str:
    """`76.1 GiB of 79.6 GiB free on the card, 1.2 GiB other processes'`."""
    from octavo.units import readable_bytes

    memory = f"{readable_bytes(card['free_bytes'])} of {readable_bytes(card['total_bytes'])} free on the card"
    others = card["others_bytes"]
    return f"{memory}, {readable_bytes(others)} other processes'" if others else memory


def answer_facts(done: Completion) -> str:
    """`37 prompt + 64 new tokens, 31.2 tok/s, first token 0.19 s, seed 7`."""
    timings = done.timings
    facts = [f"{done.usage.prompt_tokens} prompt + {done.usage.completion_tokens} new tokens"]
    if done.finish_reason is FinishReason.LENGTH:
        facts[0] += " (cut at the limit)"
    elif done.finish_reason is FinishReason.CONTENT_FILTER:
        facts[0] += " (stopped by the output filter: content_filter)"
    if timings.decode_tokens_per_second is not None:
        facts.append(f"{timings.decode_tokens_per_second:.1f} tok/s")
    if timings.first_token_seconds is not None:
        facts.append(f"first token {timings.first_token_seconds:.2f} s")
    return ", ".join([*facts, f"seed {done.seed}"])


def with_grammar_notice(done: Completion, params: SamplingParams) -> Completion:
    """The same, with a notice in each choice whose text ends before its grammar does."""
    if all(
        each is None or each is False
        for each in (params.json_object, params.json_schema, params.regex, params.lark)
    ):
        return done

    def said(each: Completion) -> Completion:
        cut = each.finish_reason is FinishReason.LENGTH
        return dataclasses.replace(each, notices=(*each.notices, UNFINISHED_GRAMMAR)) if cut else each

    return dataclasses.replace(said(done), others=tuple(map(said, done.others)))


def completion_json(done: Completion) -> dict[str, Any]:
    """The first choice's fields; where there are several, `choices` has them all."""
    facts = dataclasses.asdict(done) | {"usage": _usage_json(done)}
    del facts["others"]
    if done.others:
        facts["choices"] = [completion_json(dataclasses.replace(each, others=())) for each in done.choices]
    return facts


def facts_json(done: Completion, info: Mapping[str, Any]) -> dict[str, Any]:
    """The completion and the model's facts in one object; `load_seconds` stands with the other timings."""
    facts = completion_json(done)
    rest = {name: value for name, value in info.items() if name != "load_seconds"}
    return {**facts, "timings": {"load_seconds": info["load_seconds"], **facts["timings"]}, **rest}


def _usage_json(done: Completion) -> dict[str, int]:
    return dataclasses.asdict(done.usage) | {"total_tokens": done.usage.total_tokens}


def storage_facts(source: ModelSource) -> list[str]:
    """What "full precision" means for a checkpoint that is quantized already."""
    names = " and ".join(name.upper() for name in source.quantized_as)
    return [f"weights are stored as {names}: full precision here is the dequantized file"] if names else []
