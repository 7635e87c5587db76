"""What can be wrong with MODEL before anything is loaded.

ModelSourceError(ValueError)
├── ModelNotFoundError   reason "model_not_found"    there is nothing usable under that name
└── ModelFormatError     reason "model_format"       there is something, in a form that cannot be served
"""

from typing import ClassVar


class ModelSourceError(ValueError):
    """MODEL cannot be turned into a model folder; the text says what was wrong and what to do."""

    reason: ClassVar[str] = "model_source"


class ModelNotFoundError(ModelSourceError):
    """Nothing usable was found under the given name."""

    reason: ClassVar[str] = "model_not_found"


class ModelFormatError(ModelSourceError):
    """Something was found, in a form that cannot be served."""

    reason: ClassVar[str] = "model_format"


def one_line(error: Exception) -> str:
    """The first line of an error's text, without its full stop, to stand inside a sentence."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
