"""Who changed what, when, and how it ended: one log line, `audit`, for every admin change, without its content."""

from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from softprompt_api.errors import SoftpromptError

_log = structlog.get_logger()


@contextmanager
def audited(action: str, **facts: object) -> Iterator[dict[str, object]]:
    """Log the change that is made within; facts that only come to light there are added to what this yields."""
    outcome = "broken off"
    try:
        yield facts
        outcome = "done"
    except SoftpromptError as error:
        outcome = error.reason
        raise
    finally:
        _log.info("audit", action=action, outcome=outcome, **facts)
