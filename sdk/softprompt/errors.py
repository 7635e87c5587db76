"""What a call of this package may raise: the errors of all services, and one for what is not installed."""

from softprompt_api.errors import (
    AdapterConflict,
    AdapterInvalid,
    AdapterNotFound,
    BaseModelUnknown,
    ContextLengthExceeded,
    DataCorrupted,
    DeadlineExceeded,
    InternalError,
    InvalidArgument,
    KeyNotFound,
    Overloaded,
    PermissionDenied,
    RateLimited,
    SoftpromptError,
    Unauthenticated,
    Unavailable,
    Unsupported,
)

__all__ = [
    "AdapterConflict",
    "AdapterInvalid",
    "AdapterNotFound",
    "BaseModelUnknown",
    "ContextLengthExceeded",
    "DataCorrupted",
    "DeadlineExceeded",
    "InternalError",
    "InvalidArgument",
    "KeyNotFound",
    "MissingExtra",
    "Overloaded",
    "PermissionDenied",
    "RateLimited",
    "SoftpromptError",
    "Unauthenticated",
    "Unavailable",
    "Unsupported",
]


class MissingExtra(ImportError):
    """A part of this package needs libraries that are not installed; the text names the pip command."""
