"""Every error a user can meet, drawn as a tree.

    OctavoError                      exit  code
    ├── UsageError                   2     usage
    │   └── InvalidParameterError    2     invalid_parameter      (names the parameter)
    │       └── UnsupportedParameterError 2 unsupported_parameter  (what the model or runner at hand cannot do)
    ├── ModelNotFoundError           3     model_not_found
    │   ├── GatedModelError          3     gated_model
    │   └── DownloadError            3     download_failed
    ├── ResourceError                4     not_enough_resources
    │   ├── NotEnoughMemoryError     4     not_enough_memory
    │   └── NotEnoughDiskError       4     not_enough_disk
    ├── DeviceError                  5     device_unavailable
    ├── IncompatibleModelError       6     incompatible_model
    │   ├── ModelFormatError         6     model_format           (a damaged or hostile file)
    │   ├── UnsafeFileError          6     unsafe_file            (pickle, remote code, escaping paths)
    │   ├── UnsupportedConfigError   6     unsupported_config     (names the config key)
    │   └── ChatTemplateError        6     chat_template
    ├── InvalidInputError            7     invalid_input
    │   ├── EmptyPromptError         7     empty_prompt
    │   ├── NotTextError             7     not_text
    │   ├── InvalidGrammarError      7     invalid_grammar        (names the place)
    │   └── ContextLengthError       7     context_length_exceeded (both numbers)
    ├── CacheError                   4     cache                  (the packed cache cannot be used)
    ├── ClosedError                  1     closed                 (use after close)
    └── NumericalError               1     numerical_error        (NaN or infinity in the logits)

An error is two lines for a person: `message` (what happened, to what) and `remedy` (what to do next).
`exit_code` is what the command line exits with; `code` is the machine-readable name.
"""

from __future__ import annotations

from typing import ClassVar


class OctavoError(Exception):
    """Base of all errors raised on purpose. `str(error)` is the message alone."""

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class UsageError(OctavoError):
    exit_code = 2
    code = "usage"


class InvalidParameterError(UsageError):
    """A setting or sampling parameter out of range, or two that contradict each other."""

    code = "invalid_parameter"

    def __init__(self, message: str, *, remedy: str, parameter: str) -> None:
        super().__init__(message, remedy=remedy)
        self.parameter = parameter


class UnsupportedParameterError(InvalidParameterError):
    """A parameter that is known, and that this model, or what runs it, cannot honor."""

    code = "unsupported_parameter"


class ModelNotFoundError(OctavoError):
    exit_code = 3
    code = "model_not_found"


class GatedModelError(ModelNotFoundError):
    code = "gated_model"


class DownloadError(ModelNotFoundError):
    code = "download_failed"


class ResourceError(OctavoError):
    """Not enough of something: both numbers are attributes, in bytes."""

    exit_code = 4
    code = "not_enough_resources"

    def __init__(self, message: str, *, remedy: str, needed_bytes: int, available_bytes: int) -> None:
        super().__init__(message, remedy=remedy)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class NotEnoughMemoryError(ResourceError):
    code = "not_enough_memory"


class NotEnoughDiskError(ResourceError):
    code = "not_enough_disk"


class DeviceError(OctavoError):
    exit_code = 5
    code = "device_unavailable"


class IncompatibleModelError(OctavoError):
    exit_code = 6
    code = "incompatible_model"


class ModelFormatError(IncompatibleModelError):
    code = "model_format"


class UnsafeFileError(IncompatibleModelError):
    code = "unsafe_file"


class UnsupportedConfigError(IncompatibleModelError):
    """A config key that changes the arithmetic in a way we cannot reproduce."""

    code = "unsupported_config"

    def __init__(self, message: str, *, remedy: str, key: str) -> None:
        super().__init__(message, remedy=remedy)
        self.key = key


class ChatTemplateError(IncompatibleModelError):
    code = "chat_template"


class InvalidInputError(OctavoError):
    exit_code = 7
    code = "invalid_input"


class EmptyPromptError(InvalidInputError):
    code = "empty_prompt"


class NotTextError(InvalidInputError):
    code = "not_text"


class InvalidGrammarError(InvalidInputError):
    """A JSON schema, regular expression or Lark grammar that does not compile, or asks for what cannot be kept."""

    code = "invalid_grammar"


class ContextLengthError(InvalidInputError):
    code = "context_length_exceeded"

    def __init__(self, message: str, *, remedy: str, prompt_tokens: int, context_tokens: int) -> None:
        super().__init__(message, remedy=remedy)
        self.prompt_tokens = prompt_tokens
        self.context_tokens = context_tokens


class CacheError(OctavoError):
    exit_code = 4
    code = "cache"


class ClosedError(OctavoError):
    code = "closed"


class NumericalError(OctavoError):
    code = "numerical_error"
