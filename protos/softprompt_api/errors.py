"""Every error that crosses a service's border.

    SoftpromptError
    ├── InvalidArgument        a field of the request is not acceptable
    │   ├── ContextLengthExceeded
    │   ├── AdapterInvalid     the adapter's config or tensors are not acceptable
    │   └── Unsupported        understood, and refused by name
    ├── AdapterNotFound
    ├── AdapterConflict        exists already with other content
    │   ├── AdapterInUse       pinned, or what an alias or a running request stands on
    │   └── AliasMoved         the alias points elsewhere than the caller thought
    ├── Unauthenticated        no key, or none that is known
    ├── PermissionDenied       the key does not allow it
    ├── KeyNotFound
    ├── CursorExpired          a watch must begin anew
    ├── BaseModelUnknown       no base model to check an adapter against
    ├── Overloaded             try again later
    │   └── AdapterLoading     too many wait until there is room for their adapters
    ├── RateLimited            the key has used up what it may take for now
    ├── Unavailable            a service or the store is away, starting or stopping
    ├── DeadlineExceeded
    ├── DataCorrupted          stored bytes are not what was stored
    └── InternalError          our defect

Each leaf has a stable `reason`. `softprompt_api.rpc.status` translates to and from gRPC, the gateway to HTTP.
"""

from collections.abc import Mapping
from typing import ClassVar


class SoftpromptError(Exception):
    """Base of all errors with a stable reason.

    Args:
        message: what was wrong, what was expected, what to do; without paths, hosts or class names.
        field: the request field at fault, as the caller spells it; "" when none is.
        details: further facts as text, for example {"did_you_mean": "tweet_adapter"}.
    """

    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, field: str = "", details: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.details = dict(details or {})


class InvalidArgument(SoftpromptError):
    """A field of the request is not acceptable."""

    reason = "INVALID_ARGUMENT"


class ContextLengthExceeded(InvalidArgument):
    """Virtual tokens, prompt and output do not fit the context."""

    reason = "CONTEXT_LENGTH_EXCEEDED"


class AdapterInvalid(InvalidArgument):
    """The adapter's config or tensors are not acceptable."""

    reason = "ADAPTER_INVALID"


class Unsupported(InvalidArgument):
    """The request is understood and refused by name."""

    reason = "UNSUPPORTED"


class AdapterNotFound(SoftpromptError):
    """No such adapter, version or digest."""

    reason = "ADAPTER_NOT_FOUND"


class AdapterConflict(SoftpromptError):
    """It exists already with other content."""

    reason = "ADAPTER_CONFLICT"


class AdapterInUse(AdapterConflict):
    """It is pinned, or an alias or a running request stands on it."""

    reason = "ADAPTER_IN_USE"


class AliasMoved(AdapterConflict):
    """The alias points elsewhere than the caller thought."""

    reason = "ALIAS_MOVED"


class Unauthenticated(SoftpromptError):
    """There is no API key, or none that is known; the caller is not told more."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(SoftpromptError):
    """The API key is known and does not allow this."""

    reason = "PERMISSION_DENIED"


class KeyNotFound(SoftpromptError):
    """No API key has this id."""

    reason = "KEY_NOT_FOUND"


class CursorExpired(SoftpromptError):
    """The cursor of a watch is older than what is kept."""

    reason = "CURSOR_EXPIRED"


class BaseModelUnknown(SoftpromptError):
    """There is no base model to check an adapter against."""

    reason = "BASE_MODEL_UNKNOWN"


class Overloaded(SoftpromptError):
    """Too much is queued; try again later."""

    reason = "OVERLOADED"


class AdapterLoading(Overloaded):
    """Too many wait until there is room for their adapters; try again later."""

    reason = "ADAPTER_LOADING"


class RateLimited(SoftpromptError):
    """The API key has used up what it may take for now; `details` has `retry_after_ms`, and may have headers."""

    reason = "RATE_LIMITED"


class Unavailable(SoftpromptError):
    """A service or the store is away, starting or stopping; try again."""

    reason = "UNAVAILABLE"


class DeadlineExceeded(SoftpromptError):
    """The request's deadline passed."""

    reason = "DEADLINE_EXCEEDED"


class DataCorrupted(SoftpromptError):
    """Stored bytes are not what was stored; they are never served."""

    reason = "DATA_CORRUPTED"


class InternalError(SoftpromptError):
    """A defect of ours; the log has the details."""

    reason = "INTERNAL"
