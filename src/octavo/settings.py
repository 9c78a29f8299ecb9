"""What the user said: `Settings` (which model, where and how) and `SamplingParams` (how to sample).

Frozen dataclasses whose fields are the single source of the command line's flags, the OCTAVO_* variables,
the keys of octavo.toml and the server's defaults; `help` metadata is the flag's help text. None means "not
said": the model's own value or a default applies, and `octavo.validate` decides which and checks ranges.
Reading the environment and octavo.toml is `octavo.cli.configuration`'s work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

QuantName = Literal["auto", "none", "int8", "llm-int8", "int4", "nf4"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
RunnerName = Literal["auto", "cuda", "cpu", "reference"]
IsaName = Literal["auto", "avx512", "avx2", "portable"]
SpeculationName = Literal["auto", "off", "prompt-lookup"]
ActivationsName = Literal["int16", "int8"]
KVDtypeName = Literal["auto", "int8"]


DEFAULT_CONTEXT_TOKENS = 8192
"""Most context taken when none is asked for."""


def _option(default: Any, help: str, **more: Any) -> Any:
    """`more`: `cli=False` no flag; `env` the variable's name; `flag` the flag's, where it is not the field's;
    `reads` "file" or "file or text": what the flag takes; `python=True`: for Python alone."""
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How to load a model. Every field has a flag, an OCTAVO_ variable and an octavo.toml key of its name."""

    model: str | None = _option(
        None,
        "Hub id, folder, .gguf file, either with :TAG (org/name:Q4_K_M), or name from octavo.toml "
        "[default: SmolLM2-135M-Instruct].",
    )
    revision: str | None = _option(None, "Hub revision: branch, tag or commit.")
    quant: QuantName = _option("auto", "Weight format: auto is as stored if already quantized, else int8.")
    device: str = _option("auto", "auto, cpu, cuda, cuda:N or mps.")
    dtype: DtypeName = _option("auto", "Compute type: auto, float32, bfloat16 or float16.")
    runner: RunnerName = _option(
        "auto", "What computes: auto (the fastest that can), cuda, cpu or reference."
    )
    isa: IsaName = _option("auto", "The CPU runner's instruction set: auto, avx512, avx2 or portable.")
    activations: ActivationsName = _option(
        "int16",
        "What the inputs of 8-bit weights are rounded to: int16 (as good as exact) or int8 (a faster prefill, with"
        " AVX-512 VNNI and on CUDA, less exact).",
    )
    deterministic: bool = _option(
        False,
        "The same tokens alone, in any batch and however a prompt is cut: always so on the CPU, slower on CUDA.",
    )
    kv_dtype: KVDtypeName = _option(
        "auto",
        "How keys and values are kept: auto (16 bits; 32 by the reference runner) or int8 (half the memory, a little"
        " less exact; CUDA runner).",
    )
    context: int | None = _option(None, "Context in tokens [default: the model's, at most 8192, what fits].")
    max_sequences: int | None = _option(
        None,
        "Sequences generated together, with memory for as many full contexts as fit "
        "[default: 8 that share the memory of one].",
    )
    speculation: SpeculationName = _option(
        "auto",
        "Guess tokens from the text so far, which never changes the output: auto, off or prompt-lookup.",
    )
    threads: int | None = _option(None, "CPU threads [default: physical cores].")
    offline: bool = _option(False, "Use only what is already on this machine.")
    cache_dir: Path | None = _option(
        None, "Folder of packed weights [default: the platform's cache folder].", env="OCTAVO_CACHE"
    )
    cache: bool = _option(True, "Keep packed weights on disk for the next start.")
    filter: str | None = _option(
        None, "Output filter, module:function: it sees an answer's text before it is shown."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to sample. None: the model's generation_config, else the law's neutral value.

    `max_new_tokens` None: 256 in generate, what is left of the context in chat. `json_object`, `json_schema`,
    `regex` and `lark` exclude each other: the text then matches from its first character to its last, unless it
    is cut by `max_new_tokens`, `stop` or `stop_token_ids`.
    """

    max_new_tokens: int | None = _option(
        None, "Most tokens to generate [default: 256; in chat, what is left]."
    )
    temperature: float | None = _option(None, "0 is greedy [default: the model's].")
    top_k: int | None = _option(None, "Keep the k most probable tokens; 0 is off [default: the model's].")
    top_p: float | None = _option(None, "Keep the smallest set with this probability [default: the model's].")
    min_p: float | None = _option(None, "Drop tokens below this share of the best one's probability.")
    repetition_penalty: float | None = _option(None, "Over prompt and answer; 1 is off.")
    presence_penalty: float | None = _option(None, "Over the answer; 0 is off.")
    frequency_penalty: float | None = _option(None, "Over the answer; 0 is off.")
    logit_bias: Mapping[int, float] | None = _option(None, "Added to tokens' logits.", cli=False)
    n: int = _option(1, "Answers to the same prompt, of the same seed.")
    seed: int | None = _option(None, "Same seed, same tokens [default: drawn and reported].")
    stop: tuple[str, ...] = _option((), "Stop at this text; may be repeated.")
    stop_token_ids: tuple[int, ...] = _option((), "More ids to stop at.", cli=False)
    ignore_eos: bool = _option(False, "Go on past the model's own stop tokens.")
    logprobs: int | None = _option(None, "With --json: logprobs of each token and of this many alternatives.")
    prompt_logprobs: int | None = _option(None, "With --json: the same for each prompt token but the first.")
    json_object: bool = _option(False, "Answer with a JSON object.")
    json_schema: Mapping[str, Any] | str | None = _option(
        None, "Answer with JSON that this schema allows: a file, or the schema itself.", reads="file or text"
    )
    regex: str | None = _option(None, "Answer with text that matches this regular expression as a whole.")
    lark: str | None = _option(
        None, "Answer with text that the Lark grammar in this file allows.", flag="--grammar", reads="file"
    )
    logits_processors: tuple[Callable[[Sequence[int], Any], Any], ...] = _option((), "", python=True)
    """Each gets (token ids so far, fp32 [V] logits) and returns the logits to sample from; applied in order,
    before penalties. They run on the CPU between two steps, and cost that."""
