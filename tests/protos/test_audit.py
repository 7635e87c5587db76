"""One line for every change by an admin, however it ends."""

import asyncio

import pytest
import structlog
from softprompt_api.audit import audited
from softprompt_api.errors import AdapterNotFound


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "done"),
        (AdapterNotFound("no"), "ADAPTER_NOT_FOUND"),
        (RuntimeError("secret"), "broken off"),
        (asyncio.CancelledError(), "broken off"),
    ],
)
def test_an_outcome_is_told_with_what_is_known(error, outcome):
    def change() -> None:
        with audited("adapter.delete", adapter="tweets") as facts:
            facts["versions"] = 3
            if error is not None:
                raise error

    with structlog.testing.capture_logs() as logged:
        if error is None:
            change()
        else:
            with pytest.raises(type(error)):
                change()
    [line] = logged
    assert line == {
        "event": "audit",
        "log_level": "info",
        "action": "adapter.delete",
        "adapter": "tweets",
        "versions": 3,
        "outcome": outcome,
    }
