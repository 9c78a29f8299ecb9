"""The one validator: every limit and range, for the command line, Python and HTTP alike.

Each function takes whatever a caller gave, of any type, and returns clean values or raises a typed error that
names the field, what it was and what it may be. Nothing is cut, clamped or guessed. Whether a load fits the
machine is `octavo.plan`'s question.
"""

from octavo.validate.grammar import resolve_grammar
from octavo.validate.limits import DEFAULT_LIMITS, Limits
from octavo.validate.prompts import (
    resolve_max_new_tokens,
    split_prompts,
    validate_messages,
    validate_prompt_ids,
    validate_text,
)
from octavo.validate.sampling import (
    BEAM_SEARCH_NAMES,
    BEAM_SEARCH_REMEDY,
    SamplingDefaults,
    read_sampling_defaults,
    resolve_sampling,
    validate_sampling_params,
)
from octavo.validate.settings import validate_settings
from octavo.validate.tools import validate_template_options, validate_tool_choice, validate_tools

__all__ = [
    "BEAM_SEARCH_NAMES",
    "BEAM_SEARCH_REMEDY",
    "DEFAULT_LIMITS",
    "Limits",
    "SamplingDefaults",
    "read_sampling_defaults",
    "resolve_grammar",
    "resolve_max_new_tokens",
    "resolve_sampling",
    "split_prompts",
    "validate_messages",
    "validate_prompt_ids",
    "validate_sampling_params",
    "validate_settings",
    "validate_template_options",
    "validate_text",
    "validate_tool_choice",
    "validate_tools",
]
