"""Logs on stderr: coloured on a terminal, key=value otherwise, JSON where asked for."""

import logging
import sys

import structlog
from structlog.typing import Processor


def configure_logs(log_format: str) -> None:
    """Send structlog's events to stderr; `log_format` is "json" or "auto"."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: list[Processor]
    if log_format == "json":
        renderer = [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    elif sys.stderr.isatty():
        renderer = [structlog.dev.ConsoleRenderer()]
    else:
        keys = ["timestamp", "level", "event"]
        renderer = [
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=keys, drop_missing=True),
        ]
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
