"""Which GGUF files of a checkpoint are one model, and which one is meant, from their names alone.

A model is one file, or parts that llama.cpp calls NAME-00001-of-00003.gguf. It is named by its file, by any of
its parts, or by the tag of its quantization, which ends the file's name: NAME-Q4_K_M.gguf. What the files say of
themselves is gguf_split.py's work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from octavo.errors import ModelNotFoundError
from octavo.sources.listing import listed

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)
_SUFFIX = ".gguf"
_MOST_LISTED = 20


def gguf_names(names: Collection[str]) -> list[str]:
    """The GGUF files with a language model among `names`; vision projectors are left out."""
    found = (name for name in names if is_gguf(name))
    return sorted(name for name in found if not name.rpartition("/")[2].lower().startswith("mmproj"))


def gguf_models(names: Collection[str]) -> list[str]:
    """The first file of each GGUF model among `names`."""
    return sorted({_first(name) for name in gguf_names(names)})


def is_gguf(name: str) -> bool:
    return name.lower().endswith(_SUFFIX)


def parts_of(name: str) -> tuple[str, ...]:
    """The names of all parts of the model that a file belongs to, in order: itself alone where it is no part."""
    match = _part(name)
    if match is None:
        return (name,)
    return tuple(_numbered(match, number) for number in range(1, int(match["count"]) + 1))


def _first(name: str) -> str:
    match = _part(name)
    return name if match is None else _numbered(match, 1)


def _part(name: str) -> re.Match[str] | None:
    match = _PART.fullmatch(name)
    return match if match is not None and 1 <= int(match["number"]) <= int(match["count"]) else None


def _numbered(match: re.Match[str], number: int) -> str:
    return f"{match['stem']}-{number:05}-of-{match['count']}{match['suffix']}"


def choose_gguf(
    names: Collection[str], named: str | None, where: str, *, shown: Callable[[str], str] = str
) -> tuple[str, ...]:
    """The files, in order, of the one GGUF model of `names` that is meant.

    `named` is a file, a tag, or None for the only model there is; `where` is what the user writes before the
    colon; `shown` tells of the model that a file begins. Raises ModelNotFoundError, listing what
    there is, where none or several are meant and where parts are missing.
    """
    models = gguf_models(names)
    if named is None:
        chosen = models
    elif is_gguf(named):
        chosen = [_first(named)] if named in names else []
    else:
        chosen = _tagged(models, named)
    if len(chosen) != 1:
        raise _not_one(chosen, models, named, where, shown)
    parts = parts_of(chosen[0])
    if missing := [part for part in parts if part not in names]:
        raise ModelNotFoundError(
            f"{where} lacks {len(missing)} of the {len(parts)} parts of {chosen[0]}: {listed(missing)}",
            remedy="Fetch the missing files as well: a split model is read from all of its parts.",
        )
    return parts


def _tagged(models: list[str], tag: str) -> list[str]:
    """Models whose file names end with the tag; else those in a folder whose name does."""
    end = re.compile(rf"(?:.*[-.])?{re.escape(tag)}", re.IGNORECASE)
    paths = {model: _stem(model).split("/") for model in models}
    by_file = [model for model, path in paths.items() if end.fullmatch(path[-1])]
    return by_file or [model for model, path in paths.items() if any(map(end.fullmatch, path[:-1]))]


def _stem(name: str) -> str:
    match = _part(name)
    return name[: -len(_SUFFIX)] if match is None else match["stem"]


def _not_one(
    chosen: list[str], models: list[str], named: str | None, where: str, shown: Callable[[str], str]
) -> ModelNotFoundError:
    if not models:
        return ModelNotFoundError(
            f"{where} has no GGUF files", remedy="Leave out what follows the colon, or choose another model."
        )
    tag = _tag(chosen[0] if chosen else models[0])
    examples = f"-m {where}:{(chosen or models)[0]}" + (
        f", or by its tag: -m {where}:{tag}" if tag and named is None else ""
    )
    if chosen:
        which = "" if named is None else f" that {named} may mean"
        return ModelNotFoundError(
            f"{where} has {len(chosen)} GGUF models{which} and Octavo does not choose among them: "
            f"{listed([shown(model) for model in chosen], _MOST_LISTED)}",
            remedy=f"Name one: {examples}",
        )
    kind = "file" if named is not None and is_gguf(named) else "GGUF model tagged"
    return ModelNotFoundError(
        f"{where} has no {kind} {named}",
        remedy=f"It has: {listed([shown(model) for model in models], _MOST_LISTED)}. Name one: {examples}",
    )


def _tag(name: str) -> str | None:
    """How a model can be named in short: the end of its name, where that looks like a quantization."""
    match = re.search(r"[-.]((?:I?Q\d|BF16|F16|F32|TQ\d|MXFP4)\w*)$", _stem(name), re.IGNORECASE)
    return None if match is None else match[1]
